"""GGUF (version 2 and 3): key-value metadata, tensor infos, data. Templates inside are programs and are looked at."""

from __future__ import annotations

import struct

from trainguard.scan.budget import OverBudget
from trainguard.scan.formats import pickles, templates
from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.source import Source

SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
KEY_BYTES = 1 << 16
ENTRIES = 1_000_000
TEMPLATE_KEYS = ("template", "chat_template")


BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)} | {
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""Tensor type → (elements of a block, its bytes), as the `gguf` package has them."""
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
MOST_ALIGNMENT = 1 << 16


class BadGguf(Exception):
    """The header does not hold together."""


class _Reader:
    """Reads forward through a source, a window at a time."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._window = b""
        self._base = 0
        self._position = 0

    @property
    def position(self) -> int:
        return self._base + self._position

    def take(self, length: int) -> bytes:
        if self._position + length > len(self._window):
            self._base += self._position
            self._window = self._source.read(self._base, max(length, 1 << 18))
            self._position = 0
        data = self._window[self._position : self._position + length]
        if len(data) != length:
            raise BadGguf("ends inside its header")
        self._position += length
        return data

    def number(self, shape: str) -> int:
        value: int = struct.unpack(shape, self.take(struct.calcsize(shape)))[0]
        return value

    def skip(self, length: int) -> None:
        if length > self._source.size - self.position:
            raise BadGguf("value runs past the end")
        if self._position + length <= len(self._window):
            self._position += length
        else:
            self._base, self._position, self._window = self.position + length, 0, b""


def sniff(head: bytes, source: Source) -> bool:
    """The magic."""
    return head.startswith(b"GGUF")


def judge(job: Job) -> None:
    """Walk the header; look at every template."""
    reader = _Reader(job.source)
    try:
        reader.take(4)
        version, tensors, pairs = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
        if version not in (2, 3) or tensors > ENTRIES or pairs > ENTRIES:
            job.unsafe("gguf", f"version {version} with {tensors} tensors and {pairs} pairs", 4)
            return
        keys: dict[str, int] = {}
        for _ in range(pairs):
            job.meter.check_time()
            _pair(job, reader, keys)
        spans = [_tensor(reader) for _ in range(tensors)]
        _check_data(job, reader.position, spans, keys.get(ALIGNMENT_KEY, ALIGNMENT))
    except BadGguf as error:
        job.unsafe("gguf", str(error), reader.position)


def _text(reader: _Reader, limit: int) -> bytes:
    length = reader.number("<Q")
    if length > limit:
        raise BadGguf(f"text of {length} bytes, limit {limit}")
    return reader.take(length)


def _pair(job: Job, reader: _Reader, keys: dict[str, int]) -> None:
    key = _text(reader, KEY_BYTES).decode("utf-8", "replace")
    kind = reader.number("<I")
    if key in keys:
        raise BadGguf(f"key {key[:80]!a} twice (readers take different ones)")
    keys[key] = 0
    is_template = any(word in key.lower() for word in TEMPLATE_KEYS)
    if key == ALIGNMENT_KEY and kind == 4:
        keys[key] = reader.number("<I")
    elif kind == STRING:
        start = reader.position
        value = _text(reader, templates.TEMPLATE_BYTES)
        text = value.decode("utf-8", "replace")
        why = templates.problem(text) if is_template or templates.names_dunder(text) else None
        if why:
            job.unsafe("template", f"{key}: {why}", start)
        pickles.note_carried(job, key, value.decode("latin-1"))
    elif kind == ARRAY and is_template:
        # None of ours is a list; a reader that takes one would render its texts.
        job.unknown("template", f"{key}: a list of templates", reader.position)
        _skip_value(job, reader, kind, depth=0)
    else:
        _skip_value(job, reader, kind, depth=0)


def _skip_value(job: Job, reader: _Reader, kind: int, depth: int) -> None:
    if kind in SCALAR_BYTES:
        reader.skip(SCALAR_BYTES[kind])
    elif kind == STRING:
        reader.skip(reader.number("<Q"))
    elif kind == ARRAY and depth < job.policy.depth:
        inner, count = reader.number("<I"), reader.number("<Q")
        if inner in SCALAR_BYTES:
            reader.skip(SCALAR_BYTES[inner] * count)
            return
        if count > job.policy.operations:
            raise OverBudget(f"GGUF array of {count} values")
        for index in range(count):
            if not index & 0xFFF:
                job.meter.check_time()
            _skip_value(job, reader, inner, depth + 1)
    else:
        raise BadGguf(f"value of type {kind}")


def _tensor(reader: _Reader) -> tuple[int, int | None]:
    """(offset in the data, bytes) of one tensor; None for a type that is not known here."""
    _text(reader, KEY_BYTES)
    dimensions = reader.number("<I")
    if dimensions > 8:
        raise BadGguf(f"tensor of {dimensions} dimensions")
    count = 1
    for _ in range(dimensions):
        count *= reader.number("<Q")
    block = BLOCKS.get(reader.number("<I"))
    offset = reader.number("<Q")
    if count >= 1 << 62:
        raise BadGguf(f"tensor of {count} elements")
    if block and count % block[0]:
        raise BadGguf(f"tensor of {count} elements in blocks of {block[0]}")
    return offset, count // block[0] * block[1] if block else None


def _check_data(job: Job, header_end: int, spans: list[tuple[int, int | None]], alignment: int) -> None:
    """Tensors lie one behind the other, aligned, and fill the rest of the file."""
    if not 8 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise BadGguf(f"alignment {alignment}")
    start, position = _aligned(header_end, alignment), 0
    for offset, size in sorted(spans, key=lambda span: span[0]):
        if size is None:
            job.unknown("gguf", "a tensor of a type that is not known, so its bytes were not counted")
            return
        if offset != position:
            raise BadGguf(f"tensor at byte {offset} of the data, expected {position}")
        position = _aligned(offset + size, alignment)
        if start + offset + size > job.source.size:
            raise BadGguf(f"tensor ends at byte {start + offset + size}, behind the end of the file")
    if job.source.size > max(header_end, start + position):
        raise BadGguf(f"{job.source.size - start - position} bytes behind the last tensor")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


GGUF = Format(name="gguf", loader="gguf", sniff=sniff, judge=judge)
