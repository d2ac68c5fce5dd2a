"""What a case leaves in the log and on the disk: entries and files of one size that say nothing (spec/case.md, 2).

    entry (1,024 bytes)   "tgseal1\\n" · tag 16 · point 32 · ciphertext 968
    file  (16 KiB · 2^k)  vault/<SHA-256 of its bytes>

Three kinds of entry look alike to whoever has no key:

    delivery   HPKE (RFC 9180, base mode, X25519, HKDF-SHA256, ChaCha20-Poly1305) of a room's key to one member;
               `point` is HPKE's encapsulated key, `tag` is random
    record     the header of one record, under a key drawn from the room's key and `point`;
               `tag` is HMAC(room key, number), so that members find it and nobody can tell that two belong together
    cover      a delivery to a key that was thrown away

`point` is always a fresh X25519 public key, because other 32 bytes could be told from one. Every call of a case verb
writes UNIT_ENTRIES entries and at least UNIT_FILES files, what is missing being cover.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from trainguard.digest import sha256_hex, write_durably
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError

MAGIC = b"tgseal1\n"
ENTRY_BYTES = 1024
TAG_BYTES = 16
POINT_BYTES = 32
PLAIN_BYTES = ENTRY_BYTES - len(MAGIC) - TAG_BYTES - POINT_BYTES - 16
UNIT_ENTRIES = 12
UNIT_FILES = 2
FILE_BYTES = 16 << 10
FILE_LIMIT_BYTES = 16 << 20
_INFO = b"trainguard/case/v1"
_NONCE = bytes(12)
"""Every key here encrypts one message."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The key of a room from one record on."""

    room: str
    key: str
    """32 bytes, hex; empty: the room ends here for this reader."""
    first: int
    """Number of the first record under it."""
    author: str
    """Id of the key of who gives it."""
    signature: str
    """Theirs over room, key, number and reader (`delivered`), base64: a former member cannot hand out a key."""


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one record lies and how it opens."""

    room: str
    n: int
    previous: str
    """SHA-256 of the entry of record n - 1; 64 zeros for the first."""
    file: str
    """SHA-256 of the file that holds it."""
    key: str
    """The file's key, hex."""


def delivered(room: str, key: str, first: int, reader: str) -> bytes:
    """What the giver of a key signs. reader: sealing key of who gets it, hex."""
    return b"%s/delivery\0%s\0%s\0%d\0%s" % (_INFO, room.encode(), key.encode(), first, reader.encode())


def is_sealed(entry: bytes) -> bool:
    """Whether a log entry has the shape: nothing more can be said without a key."""
    return len(entry) == ENTRY_BYTES and entry.startswith(MAGIC)


def tag_of(entry: bytes) -> bytes:
    return entry[len(MAGIC) : len(MAGIC) + TAG_BYTES]


def deliver(what: Delivery, to: X25519PublicKey) -> bytes:
    """The entry that gives a member the room's key."""
    return MAGIC + os.urandom(TAG_BYTES) + bytes(_suite().encrypt(_padded(what), to, _INFO))


def cover() -> bytes:
    """An entry that opens for nobody."""
    thrown_away = X25519PrivateKey.generate().public_key()
    return MAGIC + os.urandom(TAG_BYTES) + bytes(_suite().encrypt(bytes(PLAIN_BYTES), thrown_away, _INFO))


def open_delivery(entry: bytes, key: X25519PrivateKey) -> Delivery | None:
    """The delivery in `entry` if it is one to this key; None for everything else."""
    try:
        plain = _suite().decrypt(entry[len(MAGIC) + TAG_BYTES :], key, _INFO)
        found: Delivery = _unpadded(plain, Delivery, "delivery")
    except (InvalidTag, ValueError, MalformedEvidence):
        return None
    return found


def tag(room_key: bytes, n: int) -> bytes:
    """What marks record `n` of a room for those who have its key."""
    return hmac.digest(room_key, b"tag" + n.to_bytes(8, "big"), "sha256")[:TAG_BYTES]


def seal_header(header: Header, room_key: bytes) -> bytes:
    """The entry of a record."""
    point = X25519PrivateKey.generate().public_key().public_bytes_raw()
    mark = tag(room_key, header.n)
    sealed = ChaCha20Poly1305(_once(room_key, point)).encrypt(_NONCE, _padded(header), MAGIC + mark)
    return MAGIC + mark + point + sealed


def open_header(entry: bytes, room_key: bytes, *, where: str) -> Header:
    """The header in `entry`. Raises VerificationError where it was not sealed with this key."""
    at = len(MAGIC) + TAG_BYTES
    try:
        plain = ChaCha20Poly1305(_once(room_key, entry[at : at + POINT_BYTES])).decrypt(
            _NONCE, entry[at + POINT_BYTES :], entry[:at]
        )
    except InvalidTag:
        raise VerificationError(f"{where}: bears the room's mark and was not sealed with its key") from None
    header: Header = _unpadded(plain, Header, where)
    return header


def seal_file(data: bytes) -> tuple[bytes, bytes]:
    """`data` as the bytes of a vault file, and the key that opens it. The size says only its power of two."""
    size = FILE_BYTES
    while size < len(data) + 4 + 16:
        size *= 2
    if size > FILE_LIMIT_BYTES:
        raise Misuse(f"case: expected at most {FILE_LIMIT_BYTES >> 20} MiB in one record, found {len(data)} bytes")
    key = os.urandom(32)
    plain = len(data).to_bytes(4, "big") + data
    return ChaCha20Poly1305(key).encrypt(_NONCE, plain.ljust(size - 16, b"\0"), _INFO), key


def open_file(sealed: bytes, key: bytes, *, where: str) -> bytes:
    """The inverse of `seal_file`. Raises VerificationError."""
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, _INFO)
    except (InvalidTag, ValueError):
        raise VerificationError(f"{where}: does not open with its key") from None
    size = int.from_bytes(plain[:4], "big")
    if size > len(plain) - 4:
        raise MalformedEvidence(f"{where}: expected at most {len(plain) - 4} bytes, its length says {size}")
    return plain[4 : 4 + size]


def seal_to(data: bytes, to: X25519PublicKey) -> str:
    """Any short text for one reader, base16 (HPKE)."""
    return str(_suite().encrypt(data, to, _INFO + b"/copy").hex())


def open_from(text: str, key: X25519PrivateKey) -> bytes | None:
    """The inverse; None where it was sealed to another."""
    try:
        return bytes(_suite().decrypt(bytes.fromhex(text), key, _INFO + b"/copy"))
    except (InvalidTag, ValueError):
        return None


def hash_of(entry: bytes) -> str:
    return sha256_hex(entry)


# -- the vault ---------------------------------------------------------------------------------------------------------


def store(folder: Path, sealed: bytes) -> str:
    """Keep the bytes of a file by their digest, durably. Raises Unavailable."""
    name = sha256_hex(sealed)
    write_durably(folder / name, sealed, mode=0o600)
    return name


def store_cover(folder: Path) -> None:
    """A file that opens for nobody."""
    store(folder, os.urandom(FILE_BYTES))


def fetch(folder: Path, name: str, *, where: str) -> bytes:
    """The bytes of a vault file, checked by its name. Raises VerificationError where it is gone or was altered."""
    path = folder / name
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise VerificationError(
            f"{where}: {path} is gone", next_step="restore it from a copy of the vault; its name is its digest"
        ) from None
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != name:
        raise VerificationError(
            f"{where}: {path} was altered", next_step="restore it from a copy of the vault; its name is its digest"
        )
    return data


# -- bytes -------------------------------------------------------------------------------------------------------------


def _suite() -> Any:
    try:
        from cryptography.hazmat.primitives import hpke
    except ImportError:
        raise Unavailable(
            "cases need HPKE, which this version of cryptography does not have",
            next_step='pip install "cryptography>=47"',
        ) from None
    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


def _once(room_key: bytes, point: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=point, info=_INFO + b"/record").derive(room_key)


def _padded(value: msgspec.Struct) -> bytes:
    data = msgspec.json.encode(value)
    if len(data) > PLAIN_BYTES - 2:
        raise Misuse(f"case: header of {len(data)} bytes, limit {PLAIN_BYTES - 2}")
    return (len(data).to_bytes(2, "big") + data).ljust(PLAIN_BYTES, b"\0")


def _unpadded(plain: bytes, kind: Any, where: str) -> Any:
    size = int.from_bytes(plain[:2], "big")
    try:
        return msgspec.json.decode(plain[2 : 2 + size], type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedEvidence(f"{where}: {error}") from error


def filled(entries: Sequence[bytes]) -> list[bytes]:
    """`entries` with cover up to the next whole unit."""
    missing = -len(entries) % UNIT_ENTRIES or (UNIT_ENTRIES if not entries else 0)
    return [*entries, *(cover() for _ in range(missing))]
