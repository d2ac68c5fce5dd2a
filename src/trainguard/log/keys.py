"""The log's signing key: Ed25519, PKCS#8 PEM, mode 0600, with its public `.vkey` beside it.

The key never enters a training process. A file that holds one is made once: it appears under its name complete, by
`link`, so two processes that start together agree on one key.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.log.disk import FILE_MODE, Disk, make_folders, sync_folder, write_file
from trainguard.log.note import NAME_LIMIT_BYTES, Signer, Verifier, parse_vkey
from trainguard.log.tree import read_file

KEY_MODE = 0o600
KEY_LIMIT_BYTES = 64 << 10
_VKEY_LIMIT_BYTES = NAME_LIMIT_BYTES + 100


def vkey_path(key_path: Path) -> Path:
    """Where the public half of `key_path` lies: the same name ending in `.vkey`."""
    return key_path.with_suffix(".vkey")


def load_signer(key_path: Path, origin: str) -> Signer:
    """The key at `key_path`, for the log named `origin`. Raises Unavailable where there is none."""
    try:
        data = read_file(key_path, KEY_LIMIT_BYTES)
        mode = key_path.stat().st_mode & 0o777
    except FileNotFoundError:
        raise Unavailable(
            f"{key_path}: the log's signing key is not there",
            next_step="restore the key; a new one would make a different log",
        ) from None
    if mode & 0o077:
        raise Misuse(
            f"{key_path}: expected a signing key only its owner can read, found mode {mode:o}",
            next_step=f"chmod 600 {key_path}, and ask who could have read it",
        )
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise MalformedEvidence(f"{key_path}: expected an Ed25519 private key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise MalformedEvidence(f"{key_path}: expected an Ed25519 private key, found another kind")
    return Signer.of(origin, key)


def create_signer(disk: Disk, key_path: Path, origin: str) -> Signer:
    """The key at `key_path`, made if there is none; writes the `.vkey` too."""
    make_folders(disk, key_path.parent, 0o700)
    if not key_path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _create(disk, key_path, pem, KEY_MODE)
    signer = load_signer(key_path, origin)
    write_vkey(disk, key_path, signer.verifier)
    return signer


def write_vkey(disk: Disk, key_path: Path, verifier: Verifier) -> None:
    """Put the public half beside the key. Raises VerificationError where another one lies there."""
    path = vkey_path(key_path)
    if not path.exists():
        _create(disk, path, f"{verifier.vkey}\n".encode(), FILE_MODE)
    found = load_verifier(path)
    if found.name != verifier.name:
        raise Misuse(f"{path}: expected a log named {verifier.name!r}, found the key of one named {found.name!r}")
    if found != verifier:
        raise VerificationError(f"{path}: expected the public half of {key_path.name}, {verifier.vkey}; found another")


def _create(disk: Disk, path: Path, data: bytes, mode: int) -> None:
    """Create `path` whole and durable, or leave the one that is there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    write_file(disk, temporary, data, mode)
    with contextlib.suppress(FileExistsError):
        disk.link(temporary, path)
    disk.unlink(temporary)
    sync_folder(disk, path.parent)


def load_verifier(vkey: str | Path) -> Verifier:
    """The public key that `vkey` is (its text), or that lies in the file it names."""
    if isinstance(vkey, str) and vkey.count("+") >= 2 and "\0" not in vkey:
        with contextlib.suppress(MalformedEvidence):
            return parse_vkey(vkey)
    path = Path(vkey)
    try:
        text = read_file(path, _VKEY_LIMIT_BYTES).decode()
    except FileNotFoundError:
        raise Unavailable(f"{str(path)[:200]}: expected a vkey or a file that holds one, found neither") from None
    except UnicodeDecodeError as error:
        raise MalformedEvidence(f"{path}: expected a vkey, found bytes that are not UTF-8") from error
    return parse_vkey(text)
