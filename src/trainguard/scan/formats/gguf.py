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
        for _ in range(pairs):
            job.meter.check_time()
            _pair(job, reader)
        for _ in range(tensors):
            _tensor(job, reader)
    except BadGguf as error:
        job.unsafe("gguf", str(error), reader.position)


def _text(reader: _Reader, limit: int) -> bytes:
    length = reader.number("<Q")
    if length > limit:
        raise BadGguf(f"text of {length} bytes, limit {limit}")
    return reader.take(length)


def _pair(job: Job, reader: _Reader) -> None:
    key = _text(reader, KEY_BYTES).decode("utf-8", "replace")
    kind = reader.number("<I")
    if kind == STRING:
        start = reader.position
        value = _text(reader, templates.TEMPLATE_BYTES)
        why = (
            templates.problem(value.decode("utf-8", "replace")) if any(word in key for word in TEMPLATE_KEYS) else None
        )
        if why:
            job.unsafe("template", f"{key}: {why}", start)
        pickles.note_carried(job, key, value.decode("latin-1"))
    elif kind == ARRAY and any(word in key for word in TEMPLATE_KEYS):
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


def _tensor(job: Job, reader: _Reader) -> None:
    _text(reader, KEY_BYTES)
    dimensions = reader.number("<I")
    if dimensions > 8:
        raise BadGguf(f"tensor of {dimensions} dimensions")
    reader.skip(8 * dimensions)
    reader.number("<I")
    if reader.number("<Q") > job.source.size:
        raise BadGguf("tensor begins behind the end of the file")


GGUF = Format(name="gguf", loader="gguf", sniff=sniff, judge=judge)
