"""HDF5 (h5py, Keras 2 models): weights are data; a `model_config` inside names code.

The file is not parsed as a tree. Attributes and small texts lie uncompressed in the file, so the configs are found by
their JSON text; where a config is announced and cannot be read, the file is unknown. External links and external raw
data make a reader open other files and are refused by their names' marks.
"""

from __future__ import annotations

import json
import re

from trainguard.scan.formats import keras
from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.source import Source

MAGIC = b"\x89HDF\r\n\x1a\n"
STEP_BYTES = 4 << 20
OVERLAP_BYTES = 1 << 16
CONFIG_BYTES = 8 << 20
CONFIG = re.compile(rb'\{\s*"(?:[A-Za-z_]|\\u00)[^"\x00-\x1f]{0,100}"\s*:')
CLASS = re.compile(rb'class_name"\s*:|\\u00[2-7][0-9a-fA-F]')
"""A class named in JSON, or an ASCII character escaped in it, which no writer of configs does and which hides words."""
MARKS = (b"model_config", b"training_config", b"layer_config")


def sniff(head: bytes, source: Source) -> bool:
    """The signature at 0, or at 512, 1024, 2048 … behind a user block."""
    if head.startswith(MAGIC):
        return True
    return any(head[offset : offset + 8] == MAGIC for offset in (512, 1024, 2048))


def judge(job: Job) -> tuple[str, str]:
    """Look for configs and judge them."""
    if job.source.read(0, 8) != MAGIC:
        job.unsafe("hdf5", "a user block in front of the HDF5 signature: another format may live there", 0)
        return "hdf5", "h5py"
    announced, position = False, 0
    read: list[tuple[int, int]] = []  # [start, end) of every text that was read as JSON
    outside: int | None = None
    while position < job.source.size:
        job.meter.check_time()
        chunk = job.source.read(position, STEP_BYTES + OVERLAP_BYTES)
        announced = announced or any(mark in chunk for mark in MARKS)
        for match in CONFIG.finditer(chunk, 0, STEP_BYTES):
            start = position + match.start()
            if not read or start >= read[-1][1]:
                length = _judge_config(job, start)
                read += [(start, start + length)] if length else []
        for match in CLASS.finditer(chunk, 0, STEP_BYTES):
            if outside is None and not _inside(position + match.start(), read):
                outside = position + match.start()
        position += STEP_BYTES
    if announced and not read:
        job.unknown("hdf5", "a model config that cannot be read as JSON")
    elif outside is not None:
        job.unknown("hdf5", "a class named outside the configs that could be read", outside)
    return "hdf5", "h5py"


def _inside(offset: int, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= offset < end for start, end in ranges)


def _judge_config(job: Job, offset: int) -> int:
    """Judge the JSON text at `offset` as a config; its length in bytes, 0 where it is none."""
    text = job.source.read(offset, CONFIG_BYTES).split(b"\0", 1)[0].decode("utf-8", "replace")
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    job.meter.spend_operations(end >> 6, 0)
    keras.judge_config(job, value)
    return len(text[:end].encode())


HDF5 = Format(name="hdf5", loader="h5py", sniff=sniff, judge=judge)
