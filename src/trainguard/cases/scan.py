"""What an identity knows of a log it has read: which entries are its own, so that no entry is tried twice.

    known = Scan.load(identity, vkey)        # empty where there is none, or it does not open
    known.extend(reader, identity)           # tries what the log has gained since
    known.keep(identity)
    known.given, Marked(reader, known.marks)

Trying an entry takes a key agreement, which is nearly all that a case call costs. What was tried is remembered with the
size and the root of the log it was tried in; before that is relied on, the tree as it is signed now must have the same
root at that size, so that a log that was cut or written anew is tried from its beginning. Nothing of an entry is kept
but its number and its tag: entries themselves are read from the log each time and checked against the signed tree.

The file lies beside the identity and is encrypted with a key drawn from it: which entries a person can open says who
is in which case. Without it, or with an altered one, everything is tried again, and the answer is the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from trainguard import opaque
from trainguard.cases import sealed
from trainguard.cases.identity import Identity
from trainguard.digest import sha256_hex, write_durably
from trainguard.errors import Unavailable
from trainguard.log import LogReader

LIMIT_BYTES = 256 << 20
"""About ten million sealed entries."""
NONCE_BYTES = 12


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is stored, encrypted."""

    size: int
    """Entries of the log that were tried."""
    root: bytes
    """Its root at that size."""
    given: list[int]
    """Entries that opened: deliveries to this identity."""
    marks: dict[bytes, list[int]]
    """Tag of each sealed entry → where it stands."""


@dataclass(slots=True)
class Scan:
    """See the module."""

    path: Path | None = None
    vkey: bytes = b""
    """Public key of the log."""
    size: int = 0
    root: bytes = b""
    given: list[int] = field(default_factory=list)
    marks: dict[bytes, list[int]] = field(default_factory=dict)

    @classmethod
    def load(cls, identity: Identity, vkey: bytes) -> Scan:
        """What was kept for the log with this public key; nothing where that cannot be read."""
        if identity.path is None:
            return cls()
        path = identity.path.with_name(f"{identity.path.name}.scan-{sha256_hex(vkey)[:16]}")
        try:
            with path.open("rb") as file:
                data = file.read(LIMIT_BYTES + 1)
            plain = ChaCha20Poly1305(_key(identity)).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], vkey)
            kept = msgspec.msgpack.decode(plain, type=_File)
        except (OSError, ValueError, InvalidTag, msgspec.DecodeError):
            return cls(path, vkey)
        return cls(path, vkey, kept.size, kept.root, kept.given, kept.marks)

    def extend(self, reader: LogReader, identity: Identity) -> None:
        """Try every entry since. Raises as `LogReader.entries`."""
        size = reader.head().size
        if self.size > size or (self.size and reader.root_at(self.size) != self.root):
            self.size, self.given, self.marks = 0, [], {}
        for leaf, entry in enumerate(reader.entries(self.size, size), self.size):
            if not opaque.is_sealed(entry):
                continue
            self.marks.setdefault(opaque.tag_of(entry), []).append(leaf)
            if sealed.open_delivery(entry, identity.sealing) is not None:
                self.given.append(leaf)
        self.size, self.root = size, reader.root_at(size)

    def keep(self, identity: Identity) -> None:
        """Store it, if there is a place. Where that fails the next call takes longer, and nothing else."""
        if self.path is None:
            return
        kept = _File(size=self.size, root=self.root, given=self.given, marks=self.marks)
        nonce = os.urandom(NONCE_BYTES)
        hidden = ChaCha20Poly1305(_key(identity)).encrypt(nonce, msgspec.msgpack.encode(kept), self.vkey)
        with contextlib.suppress(Unavailable):
            write_durably(self.path, nonce + hidden, mode=0o600)


class Marked(Mapping[bytes, Sequence[tuple[int, bytes]]]):
    """Sealed entries of the log by their tags, each with its leaf; read, and checked, when asked for."""

    def __init__(self, reader: LogReader | None = None, marks: Mapping[bytes, Sequence[int]] | None = None) -> None:
        self._reader, self._marks = reader, marks if marks is not None else {}

    def __getitem__(self, tag: bytes) -> list[tuple[int, bytes]]:
        leaves = self._marks[tag]
        return [(leaf, self._reader.entry(leaf)) for leaf in leaves] if self._reader is not None else []

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._marks)

    def __len__(self) -> int:
        return len(self._marks)

    def __contains__(self, tag: object) -> bool:
        return tag in self._marks


def _key(identity: Identity) -> bytes:
    """Only who holds the identity can draw it."""
    raw, form = serialization.Encoding.Raw, serialization.PrivateFormat.Raw
    secret = identity.sealing.private_bytes(raw, form, serialization.NoEncryption())
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=opaque.INFO + b"/scan").derive(secret)
