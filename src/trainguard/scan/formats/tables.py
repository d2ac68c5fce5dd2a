"""Tables beside checkpoints: Parquet, Arrow (files and streams), MATLAB 5, CatBoost. They hold data and name no code.

One thing does: an Arrow schema may say that a column's type is a pickled Python class (`arrow.py_extension_type`),
which pyarrow before 14.0.1 unpickles as it opens the file (CVE-2023-47248). Parquet keeps the schema as base64. A file
that has the word in any of its forms is unsafe, wherever in it the word stands.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.source import Source

PARQUET_MAGIC = b"PAR1"
ARROW_MAGIC = b"ARROW1\0\0"
CONTINUES = b"\xff\xff\xff\xff"
SCHEMA_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
PICKLED = b"arrow.py_extension_type"
_MARGIN = 64


def _in_base64(word: bytes) -> Iterator[bytes]:
    """What of `word` is always there when text with it inside is base64: one form for each place it may start at."""
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + word)
        yield text[(0, 2, 3)[shift] : len(text) - (4 if (shift + len(word)) % 3 else 0)]


NEEDLES = (PICKLED, *_in_base64(PICKLED))


def _sniff_parquet(head: bytes, source: Source) -> bool:
    return head.startswith(PARQUET_MAGIC)


def _judge_parquet(job: Job) -> None:
    """Magic, row groups, footer, its length, magic."""
    end = job.source.read(max(0, job.source.size - 8), 8)
    length = int.from_bytes(end[:4], "little")
    if job.source.size < 12 or end[4:] != PARQUET_MAGIC or length > job.source.size - 12:
        job.unsafe("parquet", "does not end with a footer and its length")
        return
    _look_for_pickles(job)


def _sniff_arrow(head: bytes, source: Source) -> bool:
    if head.startswith(ARROW_MAGIC):
        return True
    length = int.from_bytes(head[4:8], "little")
    return head.startswith(CONTINUES) and 0 < length <= min(source.size - 8, SCHEMA_BYTES) and length % 8 == 0


def _judge_arrow(job: Job) -> None:
    if job.source.read(0, 8) == ARROW_MAGIC and job.source.read(job.source.size - 6, 6) != ARROW_MAGIC[:6]:
        job.unsafe("arrow", "does not end as an Arrow file does")
        return
    _look_for_pickles(job)


def _look_for_pickles(job: Job) -> None:
    for start in range(0, job.source.size, CHUNK_BYTES):
        job.meter.check_time()
        piece = job.source.read(start, CHUNK_BYTES + _MARGIN)
        for needle in NEEDLES:
            if (at := piece.find(needle)) >= 0:
                what = f"a column type that is a pickled Python class ({PICKLED.decode()})"
                job.unsafe("arrow", what, start + at)
                return


def _sniff_matlab(head: bytes, source: Source) -> bool:
    return head.startswith(b"MATLAB 5.0 MAT-file") and head[124:128] in (b"\x00\x01IM", b"\x01\x00MI")


def _sniff_catboost(head: bytes, source: Source) -> bool:
    """`CBM1`, length of the model's core, the core."""
    return head.startswith(b"CBM1") and 8 < 8 + int.from_bytes(head[4:8], "little") <= source.size


def _nothing(job: Job) -> None:
    """Numbers and names of columns; whether the file is something else as well is asked of every file."""


PARQUET = Format(name="parquet", loader="pyarrow", sniff=_sniff_parquet, judge=_judge_parquet)
ARROW = Format(name="arrow", loader="pyarrow", sniff=_sniff_arrow, judge=_judge_arrow)
MATLAB = Format(name="matlab", loader="scipy", sniff=_sniff_matlab, judge=_nothing)
CATBOOST = Format(name="catboost", loader="catboost", sniff=_sniff_catboost, judge=_nothing)
