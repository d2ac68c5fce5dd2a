"""Entries of the log that say nothing to whoever has no key (spec/case.md, 2).

    entry (1,024 bytes)   "tgseal1\\n" · tag 16 · point 32 · ciphertext 968

`tag` marks an entry for those who can compute it: HMAC(key, number). `point` is a fresh X25519 public key, whether it
is used as one or not, because other 32 bytes could be told from one. All entries of this shape look alike.
"""

from __future__ import annotations

import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from trainguard.errors import VerificationError

MAGIC = b"tgseal1\n"
ENTRY_BYTES = 1024
TAG_BYTES = 16
POINT_BYTES = 32
PLAIN_BYTES = ENTRY_BYTES - len(MAGIC) - TAG_BYTES - POINT_BYTES - 16
INFO = b"trainguard/case/v1"
NONCE = bytes(12)
"""Every key drawn here encrypts one message."""


def is_sealed(entry: bytes) -> bool:
    """Whether a log entry has the shape: nothing more can be said without a key."""
    return len(entry) == ENTRY_BYTES and entry.startswith(MAGIC)


def tag_of(entry: bytes) -> bytes:
    """What the entry is marked with."""
    return entry[len(MAGIC) : len(MAGIC) + TAG_BYTES]


def mark(key: bytes, n: int) -> bytes:
    """The tag of the n-th entry under a key."""
    return hmac.digest(key, b"tag" + n.to_bytes(8, "big"), "sha256")[:TAG_BYTES]


def seal(plain: bytes, key: bytes, n: int) -> bytes:
    """The entry with `plain` (PLAIN_BYTES of it), the n-th under `key`."""
    point = X25519PrivateKey.generate().public_key().public_bytes_raw()
    start = MAGIC + mark(key, n)
    return start + point + ChaCha20Poly1305(_once(key, point)).encrypt(NONCE, plain, start)


def unseal(entry: bytes, key: bytes, *, where: str) -> bytes:
    """The inverse of `seal`. Raises VerificationError where the entry was not sealed with this key."""
    return unseal_once(entry, once(entry, key), where=where)


def once(entry: bytes, key: bytes) -> bytes:
    """The key of this one entry, which opens no other."""
    at = len(MAGIC) + TAG_BYTES
    return _once(key, entry[at : at + POINT_BYTES])


def unseal_once(entry: bytes, key: bytes, *, where: str) -> bytes:
    """`unseal` with the entry's own key. Raises VerificationError."""
    at = len(MAGIC) + TAG_BYTES
    if not is_sealed(entry) or len(key) != 32:
        raise VerificationError(f"{where}: expected a sealed entry of {ENTRY_BYTES} bytes and its key")
    try:
        return ChaCha20Poly1305(key).decrypt(NONCE, entry[at + POINT_BYTES :], entry[:at])
    except InvalidTag:
        raise VerificationError(f"{where}: does not open with its key") from None


def _once(key: bytes, point: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=point, info=INFO + b"/record").derive(key)
