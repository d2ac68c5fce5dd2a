"""HDF5 (h5py, Keras 2 models): weights are data; a `model_config` inside names code.

The file is not parsed as a tree. Attributes and small texts lie uncompressed in the file, so the configs are found by
their JSON text; where a config is announced and cannot be read, the file is unknown. External links, external raw data
and virtual datasets make a reader open other files; they are found by the messages that declare them (HDF5 file format
3.0, IV.A.2.g, h and i), wherever those lie, and held to what such a message must hold, so tensor bytes are none.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator

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
LINK = re.compile(rb"\x01[\x08-\x0f\x18-\x1f]\x40", re.DOTALL)
"""A link message with a link type, of type 64."""
_HEADER = rb"(?:\x00..[\x00-\x3f]\x00\x00\x00|..[\x00-\x3f](?:..)?)"
"""What lies between a message's type and its body, in object headers of version 1 and 2."""
EXTERNAL_DATA = re.compile(rb"\x07" + _HEADER + rb"\x01\x00\x00\x00....(.{8})", re.DOTALL)
"""External data files, version 1: slots, and the address of the heap with their names."""
VIRTUAL_DATA = re.compile(rb"\x08" + _HEADER + rb"\x04\x03(.{8})", re.DOTALL)
"""Data layout version 4, class 3: the address of the heap with its sources."""
NAME_BYTES = 1024
LINK_BYTES = 8192
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
        _note_other_files(job, position, chunk)
        for match in _beginning_in(CONFIG, chunk):
            start = position + match.start()
            if not read or start >= read[-1][1]:
                length = _judge_config(job, start)
                read += [(start, start + length)] if length else []
        for match in _beginning_in(CLASS, chunk):
            if outside is None and not _inside(position + match.start(), read):
                outside = position + match.start()
        position += STEP_BYTES
    if announced and not read:
        job.unknown("hdf5", "a model config that cannot be read as JSON")
    elif outside is not None:
        job.unknown("hdf5", "a class named outside the configs that could be read", outside)
    return "hdf5", "h5py"


def _beginning_in(pattern: re.Pattern[bytes], chunk: bytes) -> Iterator[re.Match[bytes]]:
    """Matches that begin in this step; they may end in the overlap, and the next step begins behind them."""
    return itertools.takewhile(lambda match: match.start() < STEP_BYTES, pattern.finditer(chunk))


def _note_other_files(job: Job, position: int, chunk: bytes) -> None:
    """Note what makes a reader open another file."""
    for match in _beginning_in(LINK, chunk):
        target = _external_link(chunk[match.start() : match.start() + LINK_BYTES])
        if target:
            job.unsafe(
                "hdf5", f"an external link to {target[:120]!a}: a reader opens that file", position + match.start()
            )
    for match in _beginning_in(EXTERNAL_DATA, chunk):
        if _block_at(job.source, match[1]) == b"HEAP":
            job.unsafe("hdf5", "a dataset whose values lie in another file", position + match.start())
    for match in _beginning_in(VIRTUAL_DATA, chunk):
        if _block_at(job.source, match[1]) == b"GCOL":
            job.unknown("hdf5", "a virtual dataset: its values lie in other files", position + match.start())


def _external_link(raw: bytes) -> str | None:
    """The file that a link message of type 64 leads to, or None where the bytes are no such message."""
    flags, at = raw[1], 3 + (8 if raw[1] & 4 else 0) + (1 if raw[1] & 16 else 0)
    width = 1 << (flags & 3)
    length = int.from_bytes(raw[at : at + width], "little")
    at += width
    name, told = raw[at : at + length], int.from_bytes(raw[at + length : at + length + 2], "little")
    info = raw[at + length + 2 : at + length + 2 + told]
    parts = info[1:].split(b"\0")
    whole = 0 < length <= NAME_BYTES and b"\0" not in name and len(info) == told > 3 and info[0] == 0
    return parts[0].decode("utf-8", "replace") if whole and len(parts) == 3 and parts[0] and not parts[2] else None


def _block_at(source: Source, address: bytes) -> bytes:
    """The signature of the block an address leads to."""
    return source.read(int.from_bytes(address, "little"), 4)


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
