"""ZIP, read by our own strict reader (APPNOTE 6.3.10), and who reads which zip.

Readers disagree on malformed archives: torch's (miniz) finds a member by the first matching name regardless of case,
Python's by the last exact one; one believes local headers, another the central directory. So only archives on which no
two readers can disagree are opened:

    [local header, name, extra][data][descriptor?] … without gaps · central directory · zip64 end? · end · EOF

every local header repeats its central entry, names are unique regardless of case, nothing overlaps, no byte is left
over. Encrypted or split archives and methods other than stored and deflate are refused.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from trainguard.scan.budget import OverBudget
from trainguard.scan.formats import compressed
from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.source import BytesSource, PartSource, Source
from trainguard.scan.verdict import Verdict

LOCAL = struct.Struct("<IHHHHHIIIHH")
CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
END = struct.Struct("<IHHHHIIH")
END64 = struct.Struct("<IQHHIIQQQQ")
LOCATOR = struct.Struct("<IIQI")
FULL4 = 0xFFFFFFFF
STORED, DEFLATED = 0, 8
DESCRIPTOR = 1 << 3
ZIP64, PADDING = 0x0001, 0x4246
"""Extra fields: wide sizes; torch's alignment ("FB")."""
IDLE_EXTRAS = frozenset((PADDING, 0x000A, 0x5455, 0x5855, 0x7855, 0x7875, 0xA220, 0xCAFE, 0xD935))
"""Fields no reader takes names, sizes or contents from: padding, times and owners of several systems, a jar's mark."""
NAME_BYTES = 4096
EXTRA_BYTES = 68
"""torch aligns to 64 bytes at most, with one field."""
PAGE_BYTES = 4096
PLAIN_NAME = re.compile(r"(?:[^/\\\0]+/)*[^/\\\0]+/?\Z")
"""Relative, without empty parts, backslashes and NULs."""
SYMLINK = 0o120000
CENTRAL_BYTES = 64 << 20
"""A central directory is read in one piece up to this; 100,000 torch members need 9 MiB."""


class BadZip(Exception):
    """The archive is not one that every reader reads alike; says why and where."""

    def __init__(self, what: str, offset: int | None = None) -> None:
        super().__init__(what)
        self.offset = offset


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    method: int
    crc: int
    packed: int
    """Bytes in the archive."""
    size: int
    """Bytes when unpacked."""
    data: int
    """Offset of the packed bytes."""


class _Entry(NamedTuple):
    raw: bytes
    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    mode: int


class _Pages:
    """A source read in pages: headers of small members lie close together, those of large ones far apart."""

    def __init__(self, source: Source) -> None:
        self.size = source.size
        self._source = source
        self._page_bytes: int = getattr(source, "page_bytes", PAGE_BYTES)
        self._start = 0
        self._page = b""

    def read(self, offset: int, length: int) -> bytes:
        """As Source.read."""
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._page):
            self._start, self._page, begin = offset, self._source.read(offset, max(length, self._page_bytes)), 0
        return self._page[begin : begin + length]


def read_members(source: Source, *, start: int = 0, end: int | None = None, limit: int) -> list[Member]:
    """Members of the archive that fills [start, end) exactly, in file order. Raises BadZip, OverBudget past `limit`."""
    stop = source.size if end is None else end
    base, count, directory, size = find_directory(source, stop)
    if base != start:
        raise BadZip(
            f"archive begins at byte {base}, expected {start}: bytes in front of a zip hide another format", base
        )
    if count > limit:
        raise OverBudget(f"{count} members in one archive, limit {limit}")
    if size > CENTRAL_BYTES:
        raise OverBudget(f"zip directory of {size} bytes, limit {CENTRAL_BYTES}")
    entries = _entries(source.read(directory, size), count, directory)
    _check_names(entries)
    entries.sort(key=lambda entry: entry.offset)
    return _members(_Pages(source), entries, start, directory)


def find_directory(source: Source, end: int) -> tuple[int, int, int, int]:
    """(archive start, members, directory offset, directory bytes) from the end record that ends at `end`."""
    if end < END.size:
        raise BadZip("too short for a zip")
    tail = source.read(end - END.size, END.size)
    if tail[:4] != b"PK\5\6":
        raise BadZip("end record is not the last thing in the archive", end - END.size)
    _, disk, first_disk, here, count, size, offset, comment = END.unpack(tail)
    directory_end = end - END.size
    if comment or disk not in (0, 0xFFFF) or first_disk not in (0, 0xFFFF) or here != count:
        raise BadZip("split archive, or a comment after the end record", end - END.size)
    locator = source.read(directory_end - LOCATOR.size, LOCATOR.size) if directory_end >= LOCATOR.size else b""
    if locator[:4] == b"PK\6\7":
        directory_end -= LOCATOR.size + END64.size
        record = source.read(directory_end, END64.size) if directory_end >= 0 else b""
        if len(record) != END64.size or record[:4] != b"PK\6\6":
            raise BadZip("zip64 end record is not where its locator must have it", directory_end)
        _, length, _, _, disk, first_disk, here8, count8, size8, offset8 = END64.unpack(record)
        told = LOCATOR.unpack(locator)
        if length != END64.size - 12 or disk or first_disk or here8 != count8 or told[1] != 0 or told[3] > 1:
            raise BadZip("zip64 end record of an unknown shape", directory_end)
        for narrow, wide, full in ((count, count8, 0xFFFF), (size, size8, FULL4), (offset, offset8, FULL4)):
            if narrow not in (wide, full):
                raise BadZip("the two end records disagree", directory_end)
        count, size, offset = count8, size8, offset8
        base = directory_end - size - offset
        if told[2] != offset + size:
            raise BadZip("zip64 locator points elsewhere", directory_end)
    elif FULL4 in (size, offset):
        raise BadZip("zip64 sizes without a zip64 record", end - END.size)
    else:
        base = directory_end - size - offset
    if base < 0:
        raise BadZip("directory lies outside the archive", end - END.size)
    return base, count, base + offset, size


def header_places(source: Source, directory: int, size: int) -> list[tuple[int, int]]:
    """(offset, bytes) of every local header, as far as the directory tells; for sources that fetch ahead."""
    try:
        entries = _entries(source.read(directory, size), -1, directory)
    except BadZip:
        return []
    return [(entry.offset, LOCAL.size + len(entry.raw) + EXTRA_BYTES) for entry in entries]


def _entries(directory: bytes, count: int, where: int) -> list[_Entry]:
    entries: list[_Entry] = []
    position = 0
    while position < len(directory):
        if len(directory) - position < CENTRAL.size:
            raise BadZip("directory ends in the middle of an entry", where + position)
        fields = CENTRAL.unpack_from(directory, position)
        signature, made_by, _, flags, method, _, _, crc, packed, size, name_length, extra_length = fields[:12]
        comment, disk, _, external, offset = fields[12:]
        if signature != 0x02014B50 or disk not in (0, 0xFFFF) or comment:
            raise BadZip("directory entry of an unknown shape", where + position)
        begin = position + CENTRAL.size
        name = directory[begin : begin + name_length]
        extra = directory[begin + name_length : begin + name_length + extra_length]
        position = begin + name_length + extra_length
        if position > len(directory) or not name or name_length > NAME_BYTES:
            raise BadZip("directory entry runs past the directory", where + begin)
        if extra:
            _check_extra(extra, name, size, packed, where + begin)
        if FULL4 in (size, packed, offset):
            size, packed, offset = _zip64(extra, size, packed, offset)
        mode = external >> 16 if made_by >> 8 == 3 else 0
        entries.append(_Entry(name, _decoded(name, flags, offset), flags, method, crc, packed, size, offset, mode))
    if count >= 0 and len(entries) != count:
        raise BadZip(f"directory has {len(entries)} entries, its end record says {count}", where)
    return entries


def _check_extra(extra: bytes, name: bytes, size: int, packed: int, where: int) -> None:
    """Raise BadZip unless every extra field is whole and idle: others bring a second name, size or a key."""
    if extra[:2] == b"FB" and len(extra) == 4 + int.from_bytes(extra[2:4], "little"):
        return
    end, seen = 0, set()
    for kind, content in _extras(extra):
        end += 4 + int.from_bytes(extra[end + 2 : end + 4], "little")
        if kind in seen or (kind != ZIP64 and kind not in IDLE_EXTRAS):
            raise BadZip(f"member {name[:80]!r}: extra field 0x{kind:04x}, which readers use differently", where)
        seen.add(kind)
        told = struct.unpack_from("<QQ", content) if kind == ZIP64 and len(content) >= 16 else None
        if told and FULL4 not in (size, packed) and told != (size, packed) and FULL4 not in told:
            raise BadZip(f"member {name[:80]!r}: its zip64 field says {told}, its header {(size, packed)}", where)
    if not 0 <= len(extra) - end <= 3 or extra[end:].strip(b"\0"):
        raise BadZip(f"member {name[:80]!r}: extra fields that run past their end", where)


def _extras(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of the extra fields of one header, up to what no longer fits."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        yield kind, extra[position + 4 : position + 4 + length]
        position += 4 + length


def _zip64(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset, from the zip64 extra field where the entry says 'see there'."""
    wanted = [value == FULL4 for value in (size, packed, offset)]
    if not any(wanted):
        return size, packed, offset
    content = next((content for kind, content in _extras(extra) if kind == ZIP64), b"")
    if len(content) < 8 * sum(wanted):
        raise BadZip("zip64 sizes without a zip64 field")
    wide = iter(struct.unpack_from(f"<{sum(wanted)}Q", content))
    values = [next(wide) if missing else value for missing, value in zip(wanted, (size, packed, offset), strict=True)]
    return values[0], values[1], values[2]


def _decoded(name: bytes, flags: int, offset: int) -> str:
    if name.isascii():
        return name.decode("ascii")
    try:
        return name.decode("utf-8" if flags & 0x800 else "cp437")
    except UnicodeDecodeError as error:
        raise BadZip("a member name that is not UTF-8", offset) from error


def _check_names(entries: list[_Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        name = entry.name
        folded = name.casefold()
        if folded in seen:
            raise BadZip(f"member {name!a} twice (readers take different ones)", entry.offset)
        seen.add(folded)
        if not PLAIN_NAME.match(name) or (".." in name and ".." in name.split("/")):
            raise BadZip(f"member {name!a}: not a plain relative name", entry.offset)


def _members(source: Source, entries: list[_Entry], start: int, directory: int) -> list[Member]:
    """Walk the local headers in order: each must repeat its entry and begin where the one before ended."""
    members: list[Member] = []
    position = start
    for index, entry in enumerate(entries):
        following = start + entries[index + 1].offset if index + 1 < len(entries) else directory
        if start + entry.offset != position:
            raise BadZip(
                f"member {entry.name[:80]!a} begins at byte {start + entry.offset}, expected {position}", position
            )
        data = _check_local(source, entry, position)
        position = data + entry.packed
        if position > directory:
            raise BadZip(f"member {entry.name[:80]!a} runs into the directory", position)
        if entry.flags & DESCRIPTOR:
            position += _descriptor(source, entry, position, following)
        name = entry.name
        if not name.endswith("/"):
            members.append(Member(name, entry.method, entry.crc, entry.packed, entry.size, data))
        elif entry.size:
            raise BadZip(f"folder {name!a} with content", position)
    if position != directory:
        raise BadZip(f"{directory - position} bytes between the last member and the directory", position)
    return members


def _check_local(source: Source, entry: _Entry, position: int) -> int:
    """Offset of the member's data, after the local header was compared with the directory entry."""
    head = source.read(position, LOCAL.size + len(entry.raw))
    if len(head) < LOCAL.size or head[:4] != b"PK\3\4":
        raise BadZip("no local header where the directory says", position)
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL.unpack_from(head)
    if head[LOCAL.size :] != entry.raw or name_length != len(entry.raw):
        raise BadZip(f"local header names {head[LOCAL.size :][:80]!r}, directory {entry.name[:80]!a}", position)
    if flags != entry.flags or method != entry.method:
        raise BadZip(f"member {entry.name[:80]!a}: local header and directory disagree on flags or method", position)
    if flags & ~(DESCRIPTOR | 0x800 | 0x6):
        raise BadZip(f"member {entry.name[:80]!a}: encrypted or patched", position)
    if method not in (STORED, DEFLATED) or (method == STORED and entry.packed != entry.size):
        raise BadZip(f"member {entry.name[:80]!a}: compression method {method}, expected stored or deflate", position)
    if entry.mode & 0o170000 == SYMLINK:
        raise BadZip(f"member {entry.name[:80]!a}: a symbolic link", position)
    data: int = position + LOCAL.size + name_length + extra_length
    if extra_length:
        extra = source.read(position + LOCAL.size + name_length, extra_length)
        _check_extra(extra, entry.raw, size, packed, position)
        if FULL4 in (packed, size):
            size, packed, _ = _zip64(extra, size, packed, 0)
    told = (crc, packed, size)
    there = (entry.crc, entry.packed, entry.size)
    if told != there and not (flags & DESCRIPTOR and told == (0, 0, 0)):
        raise BadZip(f"member {entry.name[:80]!a}: local header and directory disagree on size or checksum", position)
    return data


def _descriptor(source: Source, entry: _Entry, position: int, following: int) -> int:
    """Length of the data descriptor, whose values must be the directory's."""
    length = following - position
    raw = source.read(position, length) if length in (12, 16, 20, 24) else b""
    values = raw.removeprefix(b"PK\7\x08") if length in (16, 24) else raw
    shape = {12: "<III", 20: "<IQQ"}.get(len(values))
    if shape and struct.unpack(shape, values) == (entry.crc, entry.packed, entry.size):
        return length
    raise BadZip(f"member {entry.name[:80]!a}: descriptor disagrees with the directory", position)


def open_member(job: Job, member: Member) -> Source:
    """The unpacked content. Stored members stay where they are; others are inflated within the budget."""
    if member.method == STORED:
        return PartSource(job.source, member.data, member.size)
    part = PartSource(job.source, member.data, member.packed)
    data, left = compressed.inflate(zlib.decompressobj(-15), part, job.meter)
    if left or len(data) != member.size:
        raise BadZip(f"member {member.name!a} unfolds to {len(data)} bytes, expected {member.size}", member.data)
    if zlib.crc32(data) != member.crc:
        raise BadZip(f"member {member.name!a}: wrong checksum", member.data)
    return BytesSource(data)


def check_crc(source: Source, member: Member) -> None:
    """Raise BadZip unless the (stored) content has the member's CRC-32: readers refuse or warn, depending on which."""
    crc, step = 0, 1 << 20
    for offset in range(0, source.size, step):
        crc = zlib.crc32(source.read(offset, step), crc)
    if crc != member.crc:
        raise BadZip(f"member {member.name!a}: wrong checksum", member.data)


def sniff(head: bytes, source: Source) -> bool:
    """A local header at the start, or the end record of an empty archive."""
    return head[:4] in (b"PK\3\4", b"PK\5\6", b"PK\7\x08")


def judge(job: Job) -> tuple[str, str]:
    """Find out who reads this archive and judge it as that reader would."""
    from trainguard.scan.formats import dcp, keras, skops, torch_zip

    try:
        members = read_members(job.source, limit=job.policy.members)
    except BadZip as error:
        if dcp.is_tiled(job.source):
            return dcp.judge_tiles(job)
        job.unsafe("zip", str(error), error.offset)
        return "zip", "none"
    names = {member.name for member in members}
    if any(name.casefold().rsplit("/", 1)[-1] in ("data.pkl", "constants.pkl") for name in names):
        return torch_zip.judge(job, members)
    if "schema.json" in names:
        return skops.judge(job, members)
    if {"config.json", "metadata.json"} <= names:
        return keras.judge_zip(job, members)
    _judge_members(job, members)
    arrays = bool(names) and all(name.endswith(".npy") for name in names)
    return ("npz", "numpy") if arrays else ("zip", "none")


def judge_member(job: Job, member: Member) -> tuple[str, str]:
    """Judge one member like a file; notes what is wrong with its packing."""
    try:
        return job.judge_inside(member.name, open_member(job, member))
    except (BadZip, compressed.BadStream) as error:
        job.unsafe("zip", str(error), member.data)
    except OverBudget as error:
        job.note(Verdict.ERROR, "budget", f"{member.name}: {error}; not read further", offset=member.data)
    return "none", "none"


def _judge_members(job: Job, members: list[Member]) -> None:
    for member in members:
        judge_member(job, member)
        job.meter.check_time()


ZIP = Format(name="zip", loader="none", sniff=sniff, judge=judge)
