"""What a case leaves in the log and on the disk: entries and files of one size that say nothing (spec/case.md, 2).

    entry (1,024 bytes)   opaque.py
    file  (16 KiB · 2^k)  vault/<SHA-256 of its bytes>

Three kinds of entry look alike to whoever has no key, and so do mutes (veil.py):

    delivery   HPKE (RFC 9180, base mode, X25519, HKDF-SHA256, ChaCha20-Poly1305) of a room's key to one member;
               `point` is HPKE's encapsulated key, `tag` is random
    record     the header of one record, under a key drawn from the room's key and `point`;
               `tag` is HMAC(room key, number), so that members find it and nobody can tell that two belong together
    cover      a delivery to a key that was thrown away

Every call of a case verb writes UNIT_ENTRIES entries and at least UNIT_FILES files, what is missing being cover.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from trainguard import opaque
from trainguard.digest import sha256_hex, write_durably
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.opaque import INFO, MAGIC, NONCE, PLAIN_BYTES, TAG_BYTES

UNIT_ENTRIES = 13
"""What the largest call of one case needs: keys for ten, a new key, a signature, a mute."""
UNIT_FILES = 3
FILE_BYTES = 16 << 10
FILE_LIMIT_BYTES = 16 << 20


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
    return b"%s/delivery\0%s\0%s\0%d\0%s" % (INFO, room.encode(), key.encode(), first, reader.encode())


def deliver(what: Delivery, to: X25519PublicKey) -> bytes:
    """The entry that gives a member the room's key."""
    return MAGIC + os.urandom(TAG_BYTES) + bytes(_suite().encrypt(_padded(what), to, INFO))


def cover() -> bytes:
    """An entry that opens for nobody."""
    thrown_away = X25519PrivateKey.generate().public_key()
    return MAGIC + os.urandom(TAG_BYTES) + bytes(_suite().encrypt(bytes(PLAIN_BYTES), thrown_away, INFO))


def open_delivery(entry: bytes, key: X25519PrivateKey) -> Delivery | None:
    """The delivery in `entry` if it is one to this key; None for everything else."""
    try:
        plain = _suite().decrypt(entry[len(MAGIC) + TAG_BYTES :], key, INFO)
        found: Delivery = _unpadded(plain, Delivery, "delivery")
    except (InvalidTag, ValueError, MalformedEvidence):
        return None
    return found


def seal_header(header: Header, room_key: bytes) -> bytes:
    """The entry of a record."""
    return opaque.seal(_padded(header), room_key, header.n)


def open_header(entry: bytes, room_key: bytes, *, where: str) -> Header:
    """The header in `entry`. Raises VerificationError where it was not sealed with this key."""
    return parse_header(opaque.unseal(entry, room_key, where=where), where=where)


def parse_header(plain: bytes, *, where: str) -> Header:
    """The header in what an entry opens to. Raises MalformedEvidence."""
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
    return ChaCha20Poly1305(key).encrypt(NONCE, plain.ljust(size - 16, b"\0"), INFO), key


def open_file(sealed: bytes, key: bytes, *, where: str) -> bytes:
    """The inverse of `seal_file`. Raises VerificationError."""
    try:
        plain = ChaCha20Poly1305(key).decrypt(NONCE, sealed, INFO)
    except (InvalidTag, ValueError):
        raise VerificationError(f"{where}: does not open with its key") from None
    size = int.from_bytes(plain[:4], "big")
    if size > len(plain) - 4:
        raise MalformedEvidence(f"{where}: expected at most {len(plain) - 4} bytes, its length says {size}")
    return plain[4 : 4 + size]


def seal_to(data: bytes, to: X25519PublicKey) -> str:
    """Any short text for one reader, base64 (HPKE)."""
    return base64.b64encode(_suite().encrypt(data, to, INFO + b"/copy")).decode()


def open_from(text: str, key: X25519PrivateKey) -> bytes | None:
    """The inverse; None where it was sealed to another."""
    try:
        return bytes(_suite().decrypt(base64.b64decode(text, validate=True), key, INFO + b"/copy"))
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
