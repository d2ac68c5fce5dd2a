"""Digests of the storages in a file that `torch.save` wrote, by the rule of watch/saves.py, to be compared with memory.

    prints = read_prints(Path("out.pt"), key)       # None: not torch's zip format, or gone
    prints.storages                                 # [["0", 4096, "…", "…", "model.fc.weight"], …]

Read from the file's directory and pickle without unpickling, like tensors.py. `spec/evidence.md`, "save".
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trainguard.errors import MalformedEvidence
from trainguard.seal.distributed import pieces as pieces_of
from trainguard.seal.skeleton import flatten, read_skeleton
from trainguard.seal.tensors import PICKLE_LIMIT_BYTES, PIECE, read_layout, tiles, torch_records

STORAGES_LIMIT = 20_000
WHOLE_BYTES = 256 << 20
SAMPLED_BYTES = 1 << 20
PIECES = 16
PIECE_BYTES = 1 << 16
DIGEST_DIGITS = 32
"""These five are watch/saves.py's; a test holds them equal."""
CHUNK_BYTES = 1 << 20
BLOB_LIMIT_BYTES = 16 << 20
RECORD = re.compile(r"[^/]+/data/([A-Za-z0-9_]{1,64})\Z")


Storage = tuple[str, int, str, str | None, str]
"""(record, bytes, digest of samples, digest of all or None, tensors in it)"""


class Prints(msgspec.Struct, frozen=True, kw_only=True):
    """The storages of one file as it was when it was read."""

    form: str = "torch"
    """`torch`: of storages, by record; `row`: the same of a row of archives, `.distcp`, by archive and record;
    `safetensors`: of tensors, by name."""
    mtime_ns: int
    """When the file was last written."""
    storages: tuple[tuple[str, int, str, str | None, str], ...]
    """(record, bytes, digest of samples, digest of all or None past WHOLE_BYTES, tensors in it), in file order."""

    def encode(self) -> bytes:
        """JSON, to be stored as a blob."""
        return msgspec.json.encode(self)


def parse_prints(data: bytes) -> Prints:
    """The inverse of `Prints.encode`; raises MalformedEvidence."""
    if len(data) > BLOB_LIMIT_BYTES:
        raise MalformedEvidence(f"prints of {len(data)} bytes, limit {BLOB_LIMIT_BYTES}")
    try:
        return msgspec.json.decode(data, type=Prints)
    except msgspec.DecodeError as error:
        raise MalformedEvidence(f"prints: {error}") from error


def read_prints(path: Path, key: str) -> Prints | None:
    """Prints of the file at `path`, sampled by the secret `key` (hex); None where it has none or changed meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            return None
        form, storages = _read(descriptor, before.st_size, key, path)
        after = os.fstat(descriptor)
        same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        return Prints(form=form, mtime_ns=before.st_mtime_ns, storages=storages) if storages and same else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, struct.error, OverflowError):
        return None
    finally:
        os.close(descriptor)


def _read(descriptor: int, size: int, key: str, path: Path) -> tuple[str, tuple[Storage, ...]]:
    """(form, storages) of the open file."""
    if os.pread(descriptor, 4, 0) != b"PK\x03\x04":
        return "safetensors", _tensors(descriptor, size, key)
    row = tiles(descriptor, size)
    if len(row) < 2:
        return "torch", _storages(descriptor, size, key)
    names = pieces_of(path.parent, path.name)
    found: list[Storage] = []
    for start, end in row:
        room = WHOLE_BYTES - sum(length for _, length, _, whole, _ in found if whole is not None)
        for record, length, sampled, whole, inside in _storages(descriptor, end, key, start, room):
            name = names.get(f"{PIECE}{start}") or inside or f"{PIECE}{start}"
            found.append((f"{start}/{record}", length, sampled, whole, name))
    return "row", tuple(found[:STORAGES_LIMIT])


def _storages(
    descriptor: int, size: int, key: str, base: int = 0, room_bytes: int = WHOLE_BYTES
) -> tuple[Storage, ...]:
    """The storages of the archive in [base, size); `room_bytes` of them are digested whole."""
    records = torch_records(descriptor, size, base)
    names = _names(descriptor, records)
    found: list[Storage] = []
    whole = 0
    for record, (start, end) in records.items():
        match = RECORD.match(record)
        if match is None or start == end or len(found) >= STORAGES_LIMIT:
            continue
        name, length = match[1], end - start
        sampled = _digest(descriptor, [(start + at, n) for at, n in pieces(key, length)])
        everything: str | None = sampled
        if length > SAMPLED_BYTES:
            whole += length
            everything = _digest(descriptor, [(start, length)]) if whole <= room_bytes else None
        found.append((name, length, sampled, everything, names.get(name, "")))
    return tuple(found)


def _tensors(descriptor: int, size: int, key: str) -> tuple[Storage, ...]:
    """As _storages, for the tensors of a safetensors file."""
    layout = read_layout(descriptor, size)
    found: list[tuple[str, int, str, str | None, str]] = []
    whole = 0
    for part in layout.ranges[:STORAGES_LIMIT] if layout is not None else ():
        length = part.end - part.start
        if not length:
            continue
        sampled = _digest(descriptor, [(part.start + at, n) for at, n in pieces(key, length)])
        whole += length if length > SAMPLED_BYTES else 0
        everything = sampled if length <= SAMPLED_BYTES else None
        if everything is None and whole <= WHOLE_BYTES:
            everything = _digest(descriptor, [(part.start, length)])
        found.append((part.name, length, sampled, everything, part.name))
    return tuple(found)


def pieces(key: str, size: int) -> list[tuple[int, int]]:
    """(start, length) of what is sampled of a storage of `size` bytes."""
    if size <= SAMPLED_BYTES:
        return [(0, size)]
    secret = bytes.fromhex(key)[:64]

    def start(index: int) -> int:
        text = f"{size} {index}".encode()
        number = int.from_bytes(hashlib.blake2b(text, key=secret, digest_size=8).digest(), "little")
        return number % (size - PIECE_BYTES)

    return [(at, PIECE_BYTES) for at in sorted(start(index) for index in range(PIECES))]


def _digest(descriptor: int, spans: Sequence[tuple[int, int]]) -> str:
    hasher = hashlib.sha256()
    for start, length in spans:
        for at in range(start, start + length, CHUNK_BYTES):
            hasher.update(os.pread(descriptor, min(CHUNK_BYTES, start + length - at), at))
    return hasher.hexdigest()[:DIGEST_DIGITS]


def _names(descriptor: int, records: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Record → the tensors that lie in it, at most three named."""
    found = [span for name, span in records.items() if name.endswith("/data.pkl")]
    if len(found) != 1 or found[0][1] - found[0][0] > PICKLE_LIMIT_BYTES:
        return {}
    (start, end) = found[0]
    try:
        tensors, _ = flatten(read_skeleton(os.pread(descriptor, end - start, start)))
    except ValueError:
        return {}
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.storage, []).append(name[:200])
    return {storage: ", ".join(inside[:3]) for storage, inside in names.items()}
