"""tar (POSIX.1-2001 ustar and pax, GNU long names): plain files and folders only, every block accounted for."""

from __future__ import annotations

from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.source import PartSource, Source

BLOCK = 512
ZERO = bytes(BLOCK)
FOLDER, LONG_NAME = b"5", b"L"
EXTRA_BYTES = 1 << 16


class BadTar(Exception):
    """Not a tar that every reader unpacks alike."""


def is_header(block: bytes) -> bool:
    """Whether 512 bytes are a tar header by their checksum, as tarfile (and so torch's legacy reader) decides it."""
    if len(block) < BLOCK or block == ZERO:
        return False
    text = block[148:156].strip(b" \0")
    if not text or not all(byte in b"01234567" for byte in text):
        return False
    unsigned = sum(block[:148]) + 8 * 32 + sum(block[156:BLOCK])
    signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:BLOCK])
    return int(text, 8) in (unsigned, signed)


def sniff(head: bytes, source: Source) -> bool:
    """A first block whose checksum holds."""
    return is_header(head[:BLOCK])


def judge(job: Job) -> None:
    """Judge every file; refuse links, devices, traversal and anything behind the end."""
    position, name, count, seen = 0, "", 0, set[str]()
    try:
        while (block := job.source.read(position, BLOCK)) != ZERO:
            count += 1
            job.meter.check_members(count)
            job.meter.check_time()
            kind, data, size = _header(block, position, job.source.size)
            if kind in (LONG_NAME, b"x", b"g"):
                name = _extra_name(job.source, kind, data, size) or name
            else:
                found, name = name or _name(block), ""
                _check_name(found, seen)
                if kind != FOLDER:
                    job.judge_inside(found, PartSource(job.source, data, size))
            position = data + -(-size // BLOCK) * BLOCK
        _check_end(job.source, position)
    except BadTar as error:
        job.unsafe("tar", str(error), position)


def _header(block: bytes, position: int, end: int) -> tuple[bytes, int, int]:
    """(type, offset of the data, its size) of the member whose header is `block`."""
    if not is_header(block):
        raise BadTar("expected a header or the end, found something else")
    size, kind = _size(block), block[156:157]
    if position + BLOCK + size > end:
        raise BadTar("member runs past the end")
    if kind not in (b"0", b"\0", FOLDER, LONG_NAME, b"x", b"g"):
        raise BadTar(f"member of type {kind!r}: expected files and folders only")
    return kind, position + BLOCK, size


def _size(block: bytes) -> int:
    field = block[124:136]
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if not all(byte in b"01234567" for byte in text):
        raise BadTar("size is not octal")
    return int(text or b"0", 8)


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")


def _check_name(name: str, seen: set[str]) -> None:
    parts = name.rstrip("/").removeprefix("./").split("/")
    if not name or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise BadTar(f"member {name[:80]!a}: not a plain relative name")
    if name.casefold() in seen:
        raise BadTar(f"member {name[:80]!a} twice")
    seen.add(name.casefold())


def _extra_name(source: Source, kind: bytes, data: int, size: int) -> str | None:
    if size > EXTRA_BYTES:
        raise BadTar("extended header of more than 64 KiB")
    raw = source.read(data, size)
    if kind == LONG_NAME:
        return raw.rstrip(b"\0").decode("utf-8", "backslashreplace")
    name = None
    while raw:
        digits, _, _ = raw.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits[:6]) <= len(raw) or len(digits) > 6:
            raise BadTar("extended header of an unknown shape")
        key, _, value = raw[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key in (b"size", b"linkpath") or key.startswith(b"GNU.sparse"):
            raise BadTar(f"extended header sets {key!r}")
        if key == b"path":
            name = value.decode("utf-8", "backslashreplace")
        raw = raw[int(digits) :]
    return name


def _check_end(source: Source, position: int) -> None:
    if source.size - position < 2 * BLOCK or source.size - position > 1 << 20:
        raise BadTar("expected two zero blocks and at most 1 MiB of padding at the end")
    rest = source.read(position, source.size - position)
    if rest.strip(b"\0"):
        raise BadTar("bytes behind the end of the archive")


TAR = Format(name="tar", loader="none", sniff=sniff, judge=judge)
