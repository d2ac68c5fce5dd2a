"""Which bytes of a checkpoint file are which tensor, so that `verify` can name the ones that changed.

    layout = read_layout(descriptor, size)      # None: not a format with tensors we can place
    digester = Digester(layout)
    digester.update(offset, chunk)…             # in the same pass that hashes the file
    digester.digests()                          # {"lm_head.weight": "22 characters", …}

safetensors: from its header. npz: by member. A distributed checkpoint's `.distcp`: by the place of each piece; which
tensor that is a part of is told by `.metadata` (distributed.py). torch zip (`torch.save` since 1.6): from the central
directory and the shape of its pickle (skeleton.py); where that cannot be followed, by storage record. Nothing is
unpickled. The digests say only *where* a file changed. That it changed is told by the file's own digest: a table that
misleads can hide a name, never a change.
"""

from __future__ import annotations

import base64
import json
import os
import struct
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from trainguard.seal.skeleton import TensorRef, flatten, read_skeleton

HEADER_LIMIT_BYTES = 64 << 20
"""safetensors itself allows 100 MB; a header of 100,000 tensors has about 10 MB."""
PICKLE_LIMIT_BYTES = 64 << 20
DIRECTORY_LIMIT_BYTES = 32 << 20
RANGE_LIMIT = 50_000
OVERLAP_LIMIT = 4
"""Views may cover the file this many times over; beyond it digesting them would be a way to stall us."""
BOOKKEEPING = frozenset({".format_version", ".storage_alignment", ".data/serialization_id", "byteorder", "version"})
"""Records of a torch zip that hold no content; saving the same again may change them."""
PIECE = "piece at byte "
"""How pieces of a distributed checkpoint are called in the table: `.metadata` may not have been read."""
VALUES = " (values)"
"""Suffix of names that stand for the plain values of a container: learning rates, counters, schedules."""
VALUE_GROUPS_LIMIT = 64
TABLE_DIGEST_BYTES = 16

ITEM_BYTES = {
    **dict.fromkeys(
        ("double", "long", "complex64", "cfloat", "DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8
    ),
    **dict.fromkeys(("float", "int", "FloatStorage", "IntStorage", "float32", "int32", "uint32"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage", "uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("ComplexDoubleStorage", "complex128"), 16),
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
}
"""Bytes per element by storage type or dtype; everything else torch has is one byte wide."""

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Bytes [start, end) of a file."""

    start: int
    end: int
    name: str
    """What lies there."""
    head: bytes
    """Digested before the bytes: dtype and shape, so that a reinterpreted tensor differs."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of one file are."""

    ranges: tuple[Range, ...]
    """Ascending by start; they may overlap, because tied tensors share storage."""
    values: dict[str, str] = field(default_factory=dict)
    """Names ending in VALUES → digest text, for what is not a tensor."""


def read_layout(descriptor: int, size: int) -> Layout | None:
    """The layout of the open file of `size` bytes, or None where it has none we can read. Never raises for content."""
    try:
        head = os.pread(descriptor, 8, 0)
        layout = _zip(descriptor, size) if head[:4] == b"PK\x03\x04" else _safetensors(descriptor, size, head)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, struct.error, OverflowError):
        return None
    if len(layout.ranges) > RANGE_LIMIT or not (layout.ranges or layout.values):
        return None
    return layout


# -- safetensors ------------------------------------------------------------------------------------------------------


def _safetensors(descriptor: int, size: int, head: bytes) -> Layout:
    """u64 little-endian header length N · N bytes of JSON · tensors back to back."""
    length = int.from_bytes(head, "little")
    if len(head) != 8 or not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
        raise ValueError("no safetensors header")
    text = os.pread(descriptor, length, 8)
    header = json.loads(text)
    metadata = header.pop("__metadata__", None)
    about_all = {"__metadata__" + VALUES: _short(json.dumps(metadata).encode())} if metadata else {}
    ranges = []
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        if not (type(start) is int and type(end) is int and 0 <= start <= end <= size - 8 - length):
            raise ValueError("offsets")
        about = f"{tensor['dtype']} {tensor['shape']}\n".encode()
        ranges.append(Range(8 + length + start, 8 + length + end, name[:1000], about))
    return Layout(tuple(sorted(ranges)), about_all)


# -- torch zip --------------------------------------------------------------------------------------------------------


def _zip(descriptor: int, size: int) -> Layout:
    """A row of archives is a `.distcp`, one of arrays an npz, every other is read as torch's."""
    row = tiles(descriptor, size)
    if len(row) > 1:
        return Layout(tuple(Range(start, end, f"{PIECE}{start}", b"") for start, end in row))
    return _torch_zip(descriptor, size)


def tiles(descriptor: int, size: int) -> list[tuple[int, int]]:
    """[start, end) of the archives that fill the file one behind the other, in order; none where they do not."""
    found: list[tuple[int, int]] = []
    end = size
    while end > 0 and len(found) < RANGE_LIMIT:
        try:
            at, _, length, offset = _end_of_directory(descriptor, end)
        except (ValueError, struct.error, IndexError):
            return []
        start = at - length - offset
        if not 0 <= start < end or os.pread(descriptor, 4, start) != b"PK\x03\x04":
            return []
        found.append((start, end))
        end = start
    return found[::-1] if end == 0 else []


def _torch_zip(descriptor: int, size: int) -> Layout:
    records = torch_records(descriptor, size)
    named = _by_pickle(descriptor, records) or _by_record(records)
    covered = sum(r.end - r.start for r in named.ranges)
    return named if covered <= OVERLAP_LIMIT * size else _by_record(records)


def _by_record(records: dict[str, tuple[int, int]]) -> Layout:
    """Every record under its own name, without the archive's top folder."""
    named = ((name.partition("/")[2] or name.removesuffix(".npy"), span) for name, span in records.items())
    return Layout(tuple(sorted(Range(*span, name, b"") for name, span in named if name not in BOOKKEEPING)))


def _by_pickle(descriptor: int, records: dict[str, tuple[int, int]]) -> Layout | None:
    """Tensors by the names the pickle gives them; storages no tensor uses by record; values by container."""
    found = [(name, span) for name, span in records.items() if name.endswith("/data.pkl")]
    if len(found) != 1 or found[0][1][1] - found[0][1][0] > PICKLE_LIMIT_BYTES:
        return None
    (pickle_name, (start, end)) = found[0]
    try:
        tensors, values = flatten(read_skeleton(os.pread(descriptor, end - start, start)))
    except ValueError:
        return None
    folder = pickle_name.removesuffix("data.pkl")
    ranges, used = [], {pickle_name}
    for name, tensor in tensors.items():
        record = f"{folder}data/{tensor.storage}"
        if record in records:
            used.add(record)
            ranges.append(_range(name, tensor, *records[record]))
    others = {name: span for name, span in records.items() if name not in used}
    return Layout(tuple(sorted((*ranges, *_by_record(others).ranges))), _grouped(values))


def _range(name: str, tensor: TensorRef, start: int, end: int) -> Range:
    width = ITEM_BYTES.get(tensor.kind, 1)
    first = min(start + tensor.start * width, end)
    about = f"{tensor.kind} {list(tensor.shape)}\n".encode()
    return Range(first, min(first + tensor.span * width, end), name, about)


def _grouped(values: dict[str, str]) -> dict[str, str]:
    """Digests of the plain values, by container, or by top-level name where there are too many containers."""
    if len(values) > VALUE_GROUPS_LIMIT:
        merged: dict[str, str] = {}
        for name, text in values.items():
            top = name.split(".")[0].split("[")[0]
            merged[top] = f"{merged.get(top, '')}{name}\n{text}\n"
        values = dict(list(merged.items())[:RANGE_LIMIT])
    return {f"{name}{VALUES}": _short(text.encode("utf-8", "replace")) for name, text in values.items()}


def torch_records(descriptor: int, size: int, base: int = 0) -> dict[str, tuple[int, int]]:
    """Name → [start, end) of each record's stored bytes, from the central directory (APPNOTE 6.3.10, 4.3).

    Of the archive that lies in [base, size) of the file: a `.distcp` is a row of them.
    """
    _, count, directory_size, directory_at = _end_of_directory(descriptor, size)
    if directory_size > DIRECTORY_LIMIT_BYTES or count > RANGE_LIMIT:
        raise ValueError("directory too large")
    directory = os.pread(descriptor, directory_size, base + directory_at)
    records: dict[str, tuple[int, int]] = {}
    at = 0
    for _ in range(count):
        fields = _ENTRY.unpack_from(directory, at)
        name_size, extra_size, comment_size = fields[10:13]
        name = directory[at + _ENTRY.size : at + _ENTRY.size + name_size].decode()
        extra = directory[at + _ENTRY.size + name_size :][:extra_size]
        at += _ENTRY.size + name_size + extra_size + comment_size
        stored, local = _wide(fields, extra)
        local += base
        local_header = _LOCAL.unpack(os.pread(descriptor, _LOCAL.size, local))
        start = local + _LOCAL.size + local_header[9] + local_header[10]
        if fields[0] != b"PK\x01\x02" or local_header[0] != b"PK\x03\x04" or start + stored > size or name in records:
            raise ValueError(f"record {name}")
        records[name] = (start, start + stored)
    return records


def _end_of_directory(descriptor: int, size: int) -> tuple[int, int, int, int]:
    """Where the end records begin; entries, bytes and offset of the directory: of the archive that ends at `size`."""
    tail_at = max(0, size - _END64.size - _END64_LOCATOR.size - _END.size)
    tail = os.pread(descriptor, size - tail_at, tail_at)
    if tail[-_END.size :][:4] != b"PK\x05\x06":
        tail_at = max(0, size - 65_557)  # a comment behind it
        tail = os.pread(descriptor, size - tail_at, tail_at)
    at = tail.rindex(b"PK\x05\x06")
    _, _, _, _, count, length, offset, _ = _END.unpack_from(tail, at)
    if count == 0xFFFF or length == 0xFFFFFFFF or offset == 0xFFFFFFFF or tail[at - 20 : at - 16] == b"PK\x06\x07":
        signature, _, end64_at, _ = _END64_LOCATOR.unpack(tail[at - 20 : at])
        # Of a row of archives each counts from its own start: there the record stands right before its locator.
        end64 = _END64.unpack(os.pread(descriptor, _END64.size, tail_at + at - 20 - _END64.size))
        if end64[0] != b"PK\x06\x06":
            end64 = _END64.unpack(os.pread(descriptor, _END64.size, end64_at))
        if signature != b"PK\x06\x07" or end64[0] != b"PK\x06\x06":
            raise ValueError("zip64")
        return tail_at + at - 20 - _END64.size, end64[7], end64[8], end64[9]
    return tail_at + at, count, length, offset


def _wide(fields: tuple[Any, ...], extra: bytes) -> tuple[int, int]:
    """Stored size and local header offset, from the zip64 extra field (0x0001) where the plain ones are full."""
    stored, plain, local = fields[8], fields[9], fields[16]
    at = 0
    while at + 4 <= len(extra) and 0xFFFFFFFF in (stored, plain, local):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            plain = next(numbers, plain) if plain == 0xFFFFFFFF else plain
            stored = next(numbers, stored) if stored == 0xFFFFFFFF else stored
            local = next(numbers, local) if local == 0xFFFFFFFF else local
            break
        at += 4 + length
    return stored, local


# -- digesting --------------------------------------------------------------------------------------------------------


def _short(data: bytes) -> str:
    return _text(blake3(data).digest())


def _text(digest: bytes) -> str:
    """22 characters of URL-safe base64: 128 bits name a change; the file's own digest proves it."""
    return base64.urlsafe_b64encode(digest[:TABLE_DIGEST_BYTES]).decode().rstrip("=")


class Digester:
    """Digests every range of a layout while the file streams past once, from front to back."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._next = 0
        self._open: list[tuple[Range, Any]] = []
        self._done: dict[str, str] = dict(layout.values)

    def update(self, offset: int, chunk: memoryview) -> None:
        """Take bytes [offset, offset + len(chunk)); chunks come in order and without gaps."""
        end = offset + len(chunk)
        ranges = self._layout.ranges
        while self._next < len(ranges) and ranges[self._next].start < end:
            self._open.append((ranges[self._next], blake3(ranges[self._next].head)))
            self._next += 1
        still = []
        for span, hasher in self._open:
            hasher.update(chunk[max(span.start - offset, 0) : max(span.end - offset, 0)])
            if span.end > end:
                still.append((span, hasher))
            else:
                self._close(span, hasher)
        self._open = still

    def _close(self, span: Range, hasher: Any) -> None:
        self._done[span.name] = _text(hasher.digest())

    def digests(self) -> dict[str, str]:
        """Name → digest, once the whole file went past."""
        for span, hasher in self._open:
            self._close(span, hasher)
        for span in self._layout.ranges[self._next :]:
            self._close(span, blake3(span.head))
        return self._done


_STATE = """
optimizer optimizers optimizer_states optimizer_state_dict optim opt scheduler schedulers lr_scheduler lr_schedulers
lr_scheduler_state_dict scaler grad_scaler rng rng_state rng_states random_states exp_avg exp_avg_sq max_exp_avg_sq
momentum_buffer square_avg acc_delta step global_step epoch iter loops trainer_state sampler dataloader callbacks
param_groups
"""
STATE_WORDS = frozenset(_STATE.split())
"""Name parts that stand for training state rather than weights."""


def is_training_state(name: str, file: str) -> bool:
    """Whether a tensor or value is optimizer, scheduler, RNG or loop state (E5) rather than weights (E3)."""
    stem = file.rpartition("/")[2].partition(".")[0].lower()
    if name.endswith(VALUES):  # weights are tensors; counters, rates and schedules are not
        return True
    parts = name.lower().replace("[", ".").replace("]", "").split(".")
    words = {stem, stem.split("-")[0], stem.rstrip("0123456789_"), *parts}
    return bool(words & STATE_WORDS) or "rng" in stem or any("rng_state" in part for part in parts)
