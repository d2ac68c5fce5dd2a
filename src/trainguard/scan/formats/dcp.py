"""Distributed checkpoints (torch.distributed.checkpoint): `.metadata` is a bare pickle, `.distcp` a row of torch zips.

The row has no index of its own, so it is read from the end: an end record gives its archive's start, where the archive
before it must end. It must tile the file.
"""

from __future__ import annotations

from trainguard.scan.formats import zips
from trainguard.scan.formats.interface import Job
from trainguard.scan.source import PartSource, Source

TILES = 250_000


def _starts(source: Source) -> list[int] | None:
    """Starts of the archives that tile the source, first to last, or None when they do not."""
    starts: list[int] = []
    end = source.size
    while end > 0 and len(starts) <= TILES:
        try:
            start, *_ = zips.find_directory(source, end)
        except zips.BadZip:
            return None
        if start >= end:
            return None
        starts.append(start)
        end = start
    return starts[::-1] if end == 0 else None


def is_tiled(source: Source) -> bool:
    """Whether the source is two or more zip archives, one behind the other."""
    starts = _starts(source)
    return starts is not None and len(starts) > 1


def judge_tiles(job: Job) -> tuple[str, str]:
    """Judge every archive of the row."""
    starts = _starts(job.source) or []
    for start, end in zip(starts, [*starts[1:], job.source.size], strict=True):
        job.meter.check_time()
        job.judge_inside(f"(item at {start})", PartSource(job.source, start, end - start))
    return "distcp", "torch"
