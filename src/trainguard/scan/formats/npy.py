"""NumPy's .npy (numpy/lib/format.py): magic, version, a literal dict, then raw array bytes, or a pickle for objects.

Several arrays may follow each other (`numpy.save` to one open file); nothing else may.
"""

from __future__ import annotations

import ast
from typing import Any

from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.machine import PICKLE
from trainguard.scan.rules.arrays import DType, count_of, parse_dtype
from trainguard.scan.source import Source

MAGIC = b"\x93NUMPY"
HEADER_BYTES = 1 << 16
"""numpy itself refuses headers over 10,000 bytes unless told otherwise; version 1.0 cannot hold more than 65,535."""
FIELD_DEPTH = 8


class BadNpy(Exception):
    """Not an array file numpy would write."""


def sniff(head: bytes, source: Source) -> bool:
    """The magic."""
    return head.startswith(MAGIC)


def judge(job: Job) -> None:
    """Account for every byte; judge the pickle of object arrays."""
    position = 0
    while position < job.source.size:
        try:
            position = _array(job, position)
        except BadNpy as error:
            job.unsafe("npy", str(error), position)
            return
        job.meter.check_time()


def _array(job: Job, start: int) -> int:
    """Judge the array at `start`; the offset behind it."""
    head = job.source.read(start, 12)
    if not head.startswith(MAGIC) or len(head) < 10:
        raise BadNpy(f"expected an array, found {head[:8]!r}")
    wide = head[6] in (2, 3)
    length = int.from_bytes(head[8 : 12 if wide else 10], "little")
    if head[6] not in (1, 2, 3) or head[7] != 0 or length > HEADER_BYTES:
        raise BadNpy(f"version {head[6]}.{head[7]} with a header of {length} bytes")
    begin = start + (12 if wide else 10)
    raw = job.source.read(begin, length)
    if len(raw) != length:
        raise BadNpy("ends inside its header")
    kind, count = parse_header(raw)
    position = begin + length
    if kind.has_objects:
        from trainguard.scan.formats.pickles import judge_stream

        trace = judge_stream(job, position, PICKLE)
        return trace.end if trace is not None else job.source.size
    if position + count * kind.item_bytes > job.source.size:
        raise BadNpy(f"{count} items of {kind.item_bytes} bytes run past the end")
    return position + count * kind.item_bytes


def parse_header(raw: bytes) -> tuple[DType, int]:
    """(dtype, elements) of a header. Raises BadNpy unless it is the literal dict numpy writes."""
    try:
        header: Any = ast.literal_eval(raw.decode("utf-8").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, UnicodeDecodeError) as error:
        raise BadNpy("header is not a literal dict") from error
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise BadNpy("header: expected descr, fortran_order and shape")
    count = count_of(header["shape"])
    kind = _parse_descr(header["descr"], FIELD_DEPTH)
    if count is None or kind is None or type(header["fortran_order"]) is not bool:
        raise BadNpy(f"header: descr {str(header['descr'])[:60]!a} or shape {str(header['shape'])[:60]!a}")
    return kind, count


def _parse_descr(descr: Any, depth: int) -> DType | None:
    if isinstance(descr, str):
        return parse_dtype(descr)
    if not isinstance(descr, list) or not depth:
        return None
    total, objects = 0, False
    for field in descr:
        if not isinstance(field, tuple) or len(field) not in (2, 3):
            return None
        kind = _parse_descr(field[1], depth - 1)
        times = count_of(field[2]) if len(field) == 3 else 1
        if kind is None or times is None:
            return None
        total += kind.item_bytes * times
        objects = objects or kind.has_objects
    return DType(total, has_objects=objects)


NPY = Format(name="npy", loader="numpy", sniff=sniff, judge=judge)
