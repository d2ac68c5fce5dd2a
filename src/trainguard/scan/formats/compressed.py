"""Compressed streams: gzip, bz2, xz, lzma, zlib, LZ4 and Zstandard, unfolded within the budget and judged inside.

joblib writes all but the last; anything may be wrapped in them. More than one stream behind the other, or bytes behind
the last one, is refused: readers differ in what they do with them.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import Protocol

from trainguard.scan.budget import Meter
from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.formats.lz4 import BadLz4, unfold_frame
from trainguard.scan.source import BytesSource, Source

STEP_BYTES = 1 << 18
OUT_BYTES = 1 << 20


class BadStream(Exception):
    """The compressed stream is broken."""


class Inflater(Protocol):
    """What zlib, bz2 and lzma decompressors have in common, give or take one argument."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


def inflate(inflater: Inflater, source: Source, meter: Meter) -> tuple[bytes, int]:
    """(everything the stream unfolds to, bytes of the source behind its end).

    Raises BadStream for a broken or cut stream, OverBudget when it unfolds to more than the policy's limit.
    """
    parts: list[bytes] = []
    offset = 0
    pending = b""
    zlib_like = hasattr(inflater, "unconsumed_tail")
    try:
        while not inflater.eof:
            if not pending and (zlib_like or getattr(inflater, "needs_input", True)):
                pending = source.read(offset, STEP_BYTES)
                offset += len(pending)
            dry = not pending and offset >= source.size
            out = inflater.decompress(pending, OUT_BYTES)
            if dry and not out and not inflater.eof:
                raise BadStream("ends in the middle of its stream")
            pending = inflater.unconsumed_tail if zlib_like else b""  # type: ignore[attr-defined]
            meter.spend_inflated(len(out))
            parts.append(out)
    except (zlib.error, OSError, lzma.LZMAError, EOFError, ValueError, MemoryError) as error:
        raise BadStream(f"broken stream: {error}") from error
    return b"".join(parts), source.size - offset + len(inflater.unused_data)


LZMA_MEMORY = 64 << 20
"""Memory an xz or lzma stream may ask for; `xz -6` needs 9 MiB, -9 65."""


def _lzma_inflater(form: int) -> Inflater:
    return lzma.LZMADecompressor(form, memlimit=LZMA_MEMORY + (8 << 20))


def is_zlib(head: bytes, source: Source) -> bool:
    """A zlib header: method 8, window at most 32 KiB, no dictionary, and its check bits (RFC 1950)."""
    return len(head) > 6 and head[0] == 0x78 and (head[0] << 8 | head[1]) % 31 == 0 and not head[1] & 0x20


def is_lzma(head: bytes, source: Source) -> bool:
    """The .lzma header: 0x5d, a dictionary size of a power of two, and a size that is unknown or plausible."""
    if len(head) < 14 or head[0] != 0x5D:
        return False
    dictionary, size = int.from_bytes(head[1:5], "little"), int.from_bytes(head[5:13], "little")
    return bool(dictionary) and not dictionary & (dictionary - 1) and (size == 2**64 - 1 or size < 1 << 40)


def _judge(job: Job, unfold: Inflater) -> tuple[str, str] | None:
    try:
        data, left = inflate(unfold, job.source, job.meter)
    except BadStream as error:
        job.unsafe("compressed", str(error))
        return None
    if left:
        job.unsafe("compressed", f"{left} bytes behind the compressed stream", job.source.size - left)
    return _inner(job, data)


def _inner(job: Job, data: bytes) -> tuple[str, str] | None:
    return job.judge_inside("(unfolded)", BytesSource(data))


def judge_gzip(job: Job) -> tuple[str, str] | None:
    """RFC 1952."""
    return _judge(job, zlib.decompressobj(31))


def judge_zlib(job: Job) -> tuple[str, str] | None:
    """RFC 1950."""
    return _judge(job, zlib.decompressobj(15))


def judge_bz2(job: Job) -> tuple[str, str] | None:
    """bzip2."""
    return _judge(job, bz2.BZ2Decompressor())


def judge_xz(job: Job) -> tuple[str, str] | None:
    """The xz container."""
    return _judge(job, _lzma_inflater(lzma.FORMAT_XZ))


def judge_lzma(job: Job) -> tuple[str, str] | None:
    """The old .lzma container, which has no magic."""
    return _judge(job, _lzma_inflater(lzma.FORMAT_ALONE))


def judge_lz4(job: Job) -> tuple[str, str] | None:
    """One LZ4 frame."""
    try:
        data, left = unfold_frame(job.source, job.meter)
    except BadLz4 as error:
        job.unsafe("compressed", f"broken LZ4 frame: {error}")
        return None
    if left:
        job.unsafe("compressed", f"{left} bytes behind the LZ4 frame", job.source.size - left)
    return _inner(job, data)


def judge_zstd(job: Job) -> tuple[str, str] | None:
    """Zstandard, where the running Python can read it (3.14 and later); otherwise unknown."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        job.unknown("compressed", "Zstandard: this Python cannot read it (3.14 can); unfold it and scan the result")
        return None
    return _judge(job, zstd.ZstdDecompressor())


COMPRESSED = (
    Format(name="gzip", loader="none", sniff=lambda head, _: head[:3] == b"\x1f\x8b\x08", judge=judge_gzip),
    Format(
        name="bz2", loader="none", sniff=lambda head, _: head[:3] == b"BZh" and head[4:7] == b"1AY", judge=judge_bz2
    ),
    Format(name="xz", loader="none", sniff=lambda head, _: head[:6] == b"\xfd7zXZ\0", judge=judge_xz),
    Format(name="lz4", loader="none", sniff=lambda head, _: head[:4] == b"\x04\x22\x4d\x18", judge=judge_lz4),
    Format(name="zstd", loader="none", sniff=lambda head, _: head[:4] == b"\x28\xb5\x2f\xfd", judge=judge_zstd),
    Format(name="zlib", loader="none", sniff=is_zlib, judge=judge_zlib),
    Format(name="lzma", loader="none", sniff=is_lzma, judge=judge_lzma),
)
"""Every compressed format; the ones without a real magic last."""
