"""The journal: what an append writes, and the only place where an entry is before it is published (spec/log.md).

A folder of segments `journal/<index of the first entry, 20 digits>`, each a sequence of records, one per commit:

    header   | "TGJ1" | payload length u32 | crc32(payload) u32 | crc32(header so far) u32 |
    payload  | index of first entry u64 | entries u32 | note length u32 | signed tree head after them | entry bundle |

All numbers big-endian. The first record of a log has no entries and the head of the empty tree. A segment that was
left for a newer one ends in a header with length 0, so a process that still has it open looks for the newer one.

A record cut short at the very end is *torn*: its writer died before acknowledging it. The header has its own checksum,
so a flipped bit in the length cannot pass for a torn record. Anything else that does not check is damage, and raises.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.log.tiles import decode_bundle

MAGIC = b"TGJ1"
RECORD_LIMIT_BYTES = 32 << 20
"""A writer splits a larger commit; a reader takes no record beyond it."""
SEGMENT_BYTES = 8 << 20
"""A writer starts a new segment once the last is this long. Readers do not care."""
SEGMENT_LIMIT_BYTES = SEGMENT_BYTES + RECORD_LIMIT_BYTES + (1 << 20)

_HEADER = struct.Struct(">4sIII")
_PAYLOAD = struct.Struct(">QII")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Record:
    """One commit."""

    first: int
    """Index of its first entry."""
    entries: list[bytes]
    note: bytes
    """The signed tree head after it. Not verified."""
    start: int
    """Offset of its header in the segment."""
    end: int
    """Offset after it."""

    @property
    def size(self) -> int:
        """Size of the tree after it."""
        return self.first + len(self.entries)


@dataclass(frozen=True, slots=True)
class Tail:
    """How a segment ended."""

    end: int
    """Offset after the last whole record: where the next one goes."""
    torn_bytes: int = 0
    """Bytes after it that no writer ever acknowledged."""
    closed: bool = False
    """The segment says that a newer one follows."""


def encode_record(first: int, count: int, note: bytes, bundle: bytes) -> bytes:
    """The bytes of one commit of `count` entries, `bundle` being their encoding; `parse_records` is the inverse."""
    payload = _PAYLOAD.pack(first, count, len(note)) + note + bundle
    return _header(len(payload), zlib.crc32(payload)) + payload


def encode_close() -> bytes:
    """The header that ends a segment for good."""
    return _header(0, 0)


def _header(length: int, checksum: int) -> bytes:
    fields = _HEADER.pack(MAGIC, length, checksum, 0)[:-4]
    return fields + zlib.crc32(fields).to_bytes(4, "big")


def parse_records(data: bytes, *, base: int = 0, where: str) -> Iterator[Record | Tail]:
    """The records in `data`, then, last, one Tail. `base` is the offset of `data` in its segment.

    Raises MalformedEvidence at the first thing that is neither a record nor a torn end.
    """
    at = 0
    while True:
        if _torn(data, at):
            yield Tail(base + at, torn_bytes=len(data) - at)
            return
        magic, length, checksum, own = _HEADER.unpack_from(data, at)
        place = f"{where}: record at byte {base + at}"
        if magic != MAGIC or own != zlib.crc32(data[at : at + HEADER_BYTES - 4]) or length > RECORD_LIMIT_BYTES:
            raise MalformedEvidence(f"{place}: damaged header", next_step=_NEXT_STEP)
        start = at + HEADER_BYTES
        if length == 0:
            if start != len(data):
                raise MalformedEvidence(f"{place}: {len(data) - start} bytes after the end of a closed segment")
            yield Tail(base + at, closed=True)
            return
        if start + length > len(data):
            yield Tail(base + at, torn_bytes=len(data) - at)
            return
        payload = data[start : start + length]
        if zlib.crc32(payload) != checksum:
            raise MalformedEvidence(f"{place}: {length} bytes do not have their checksum", next_step=_NEXT_STEP)
        yield _parse_payload(payload, base + at, place)
        at = start + length


_NEXT_STEP = "keep the folder as evidence; compare with a copy or the last published tree head before going on"


def _torn(data: bytes, at: int) -> bool:
    """At most part of a header is left, or only zeros, which is what a power cut leaves of an unsynced write."""
    return len(data) - at < HEADER_BYTES or not (data[at] or data[at:].strip(b"\0"))


def _parse_payload(payload: bytes, start: int, place: str) -> Record:
    if len(payload) < _PAYLOAD.size:
        raise MalformedEvidence(f"{place}: payload of {len(payload)} bytes, expected {_PAYLOAD.size} or more")
    first, count, note_bytes = _PAYLOAD.unpack_from(payload)
    at = _PAYLOAD.size + note_bytes
    if at > len(payload) or (count == 0) != (first == 0 and at == len(payload)):
        raise MalformedEvidence(f"{place}: {count} entries from {first} do not fit a payload of {len(payload)} bytes")
    entries = decode_bundle(payload[at:], count, where=place)
    return Record(first, entries, payload[_PAYLOAD.size : at], start, start + HEADER_BYTES + len(payload))


def segment_path(log: Path, first: int) -> Path:
    """Where the segment beginning with entry `first` lies."""
    return log / "journal" / f"{first:020d}"


def list_segments(log: Path) -> list[int]:
    """First index of every segment, ascending. Raises MalformedEvidence for a foreign name in the folder."""
    try:
        names = os.listdir(log / "journal")  # noqa: PTH208 -- names only, and a folder may hold thousands
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unavailable(f"{log / 'journal'}: cannot be listed: {error.strerror}") from error
    for name in names:
        if len(name) != 20 or not (name.isascii() and name.isdigit()):
            raise MalformedEvidence(f"{log / 'journal' / name[:80]}: not a segment of the journal")
    return sorted(map(int, names))


def read_segment(log: Path, first: int, *, start: int = 0, sync: bool = False) -> bytes:
    """The bytes of a segment from offset `start`. Raises FileNotFoundError when it has been dropped.

    sync: have the kernel write them out first, so that nothing is believed that a power cut could take back.
    """
    path = segment_path(log, first)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unavailable(f"{path}: journal cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size < start:
            raise MalformedEvidence(f"{path}: expected a file of {start} bytes or more, found {status.st_size}")
        data = _read(descriptor, start, SEGMENT_LIMIT_BYTES - start)
        if sync:
            _sync(descriptor)
    except OSError as error:
        raise Unavailable(f"{path}: journal cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if start + len(data) >= SEGMENT_LIMIT_BYTES:
        raise MalformedEvidence(f"{path}: journal segment longer than {SEGMENT_LIMIT_BYTES} bytes")
    return data


def _read(descriptor: int, start: int, limit: int) -> bytes:
    parts = []
    while limit > 0 and (part := os.pread(descriptor, min(limit, 1 << 24), start)):
        parts.append(part)
        start, limit = start + len(part), limit - len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def _sync(descriptor: int) -> None:
    """fdatasync, where the file system has something to write; a read-only one says it cannot and need not."""
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EINVAL):
            raise


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record begins."""

    segment: int
    """First index of the segment."""
    offset: int
    index: int
    """Index of the record's first entry."""


def find(log: Path, index: int) -> Position | None:
    """The start of the segment that holds entry `index`, or would; None without a journal.

    Raises MalformedEvidence where the journal begins after `index`.
    """
    segments = list_segments(log)
    if not segments:
        return None
    if segments[0] > index:
        raise MalformedEvidence(f"{log / 'journal'}: expected entry {index}, but it begins with {segments[0]}")
    first = max(segment for segment in segments if segment <= index)
    return Position(first, 0, first)


def walk(log: Path, start: Position, *, sync: bool = False) -> Iterator[tuple[int, Record | Tail]]:
    """(segment, record) from `start` on, each segment's Tail after its records.

    Records follow each other without a gap; only the last segment may be torn. Raises MalformedEvidence where that
    does not hold, FileNotFoundError when a segment is dropped underneath. sync: see read_segment.
    """
    segments = [segment for segment in list_segments(log) if segment >= start.segment]
    if not segments or segments[0] != start.segment:
        raise FileNotFoundError(segment_path(log, start.segment))
    offset, expected = start.offset, start.index
    for segment in segments:
        where, last = str(segment_path(log, segment)), segment == segments[-1]
        if segment != start.segment and segment != expected:
            raise MalformedEvidence(f"{where}: expected a segment that begins with entry {expected}")
        data = read_segment(log, segment, start=offset, sync=sync and last)
        for item in parse_records(data, base=offset, where=where):
            if isinstance(item, Tail):
                if item.torn_bytes and not last:
                    raise MalformedEvidence(f"{where}: ends in a cut record, yet newer segments follow")
            elif item.first != expected:
                raise MalformedEvidence(f"{where}: byte {item.start}: expected entry {expected}, found {item.first}")
            else:
                expected = item.size
            yield segment, item
        offset = 0
