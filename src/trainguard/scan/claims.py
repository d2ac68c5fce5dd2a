"""Numbers inside tensors that native code believes: indices of sparse tensors, shapes and offsets of nested ones.

torch rebuilds such a tensor without looking at them (`torch.load` checks sparse invariants only where a program has
that switched on), and the first operation then writes where an index says. So the rules note what a tensor claims while
the pickle is worked through, and once the container has found the storages the numbers themselves are read:

  coo          every index lies in its dimension; as many indices as values
  compressed   (csr, csc, bsr, bsc) pointers begin at 0, never fall, end at the number of values; indices lie inside
  nested       every part lies inside the buffer

What cannot be read here (a storage that is not in this file, strides that leave most bytes out, big-endian files) is
unknown, never clean.
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainguard.scan.source import Source
from trainguard.scan.values import View

if TYPE_CHECKING:
    from trainguard.scan.formats.interface import Job

CHUNK_NUMBERS = 1 << 16
WIDEST_STRIDE = 64
"""Index tensors are contiguous or transposed; wider strides would make a reader skip most of what it reads."""
NESTED_NUMBERS = 1 << 18
"""Numbers of one nested tensor's shape that are looked at; 100,000 parts of two dimensions need 200,000."""
CODES = {4: "i", 8: "q"}
"""Bytes per index → array type code."""


class Claim(NamedTuple):
    """One tensor whose data holds numbers that native code believes."""

    layout: str
    """coo, csr, csc, bsr, bsc or nested."""
    parts: tuple[View | None, ...]
    """coo: indices, values · compressed: pointers, plain indices, values · nested: buffer, sizes, strides, offsets."""
    size: tuple[int, ...] = ()
    """The tensor's shape."""


class Unreadable(Exception):
    """A claim that cannot be checked here; the message ends a sentence."""


class Broken(Exception):
    """A claim that does not hold."""


Locate = Callable[[str], Source | None]
"""Storage key → its bytes, or None where they are not in this file."""


def check(job: Job, claims: Sequence[Claim], locate: Locate) -> None:
    """Note every claim that does not hold as unsafe and every one that cannot be looked at as unknown."""
    for claim in claims:
        job.meter.check_time()
        try:
            _Numbers(job, locate).judge(claim)
        except Broken as error:
            job.unsafe("geometry", f"{claim.layout} tensor of shape {claim.size}: {error}")
        except Unreadable as error:
            job.unknown(
                "geometry", f"{claim.layout} tensor of shape {claim.size}: its indices cannot be checked: {error}"
            )


class _Numbers:
    """Reads integer tensors of one file."""

    def __init__(self, job: Job, locate: Locate) -> None:
        self._job = job
        self._locate = locate

    def judge(self, claim: Claim) -> None:
        if claim.layout == "coo":
            self._coo(claim)
        elif claim.layout == "nested":
            self._nested(claim)
        else:
            self._compressed(claim)

    def _coo(self, claim: Claim) -> None:
        indices, values = _views(claim, 2)
        if len(indices.sizes) != 2 or not values.sizes or indices.sizes[1] != values.sizes[0]:
            raise Broken(f"indices of shape {indices.sizes} for values of shape {values.sizes}")
        dimensions = indices.sizes[0]
        if dimensions > len(claim.size) or values.sizes[1:] != claim.size[dimensions:]:
            raise Broken(f"{dimensions} sparse dimensions and values of shape {values.sizes}")
        for dimension in range(dimensions):
            for numbers in self._row(indices, (dimension,)):
                _inside(numbers, claim.size[dimension])

    def _compressed(self, claim: Claim) -> None:
        pointers, plain, values = _views(claim, 3)
        batch = len(pointers.sizes) - 1
        blocked = claim.layout.startswith("bs")
        if batch < 0 or len(plain.sizes) != batch + 1 or len(claim.size) < batch + 2:
            raise Broken(f"pointers of shape {pointers.sizes}, indices of shape {plain.sizes}")
        lead, count = claim.size[:batch], plain.sizes[-1]
        if pointers.sizes[:-1] != lead or plain.sizes[:-1] != lead or values.sizes[: batch + 1] != (*lead, count):
            raise Broken(f"pointers, indices and values of shapes {pointers.sizes}, {plain.sizes} and {values.sizes}")
        block = values.sizes[batch + 1 : batch + 3] if blocked else (1, 1)
        matrix = claim.size[batch : batch + 2]
        if len(block) != 2 or 0 in block or matrix[0] % block[0] or matrix[1] % block[1]:
            raise Broken(f"blocks of {block}")
        rows, columns = matrix[0] // block[0], matrix[1] // block[1]
        if claim.layout in ("csc", "bsc"):
            rows, columns = columns, rows
        if pointers.sizes[-1] != rows + 1:
            raise Broken(f"{pointers.sizes[-1]} pointers for {rows} rows")
        for place in itertools.product(*map(range, lead)):
            self._pointers(pointers, place, count)
            for numbers in self._row(plain, place):
                _inside(numbers, columns)

    def _pointers(self, view: View, place: tuple[int, ...], count: int) -> None:
        """They begin at 0, never fall, and end at `count`."""
        last = 0
        for number, numbers in enumerate(self._row(view, place)):
            if (not number and numbers[0]) or numbers[0] < last:
                raise Broken(f"a row pointer {numbers[0]} where {last} is the least")
            if any(after < before for before, after in itertools.pairwise(numbers)):
                raise Broken("a row pointer below the one before it")
            last = numbers[-1]
        if last != count:
            raise Broken(f"row pointers end at {last}, there are {count} values")

    def _nested(self, claim: Claim) -> None:
        buffer, sizes, strides, offsets = _views(claim, 4)
        parts, room = offsets.sizes[0] if len(offsets.sizes) == 1 else -1, _product(buffer.sizes)
        if len(buffer.sizes) != 1 or len(sizes.sizes) != 2 or sizes.sizes != strides.sizes or sizes.sizes[0] != parts:
            raise Broken(f"sizes of shape {sizes.sizes}, strides {strides.sizes}, offsets {offsets.sizes}")
        if _product(sizes.sizes) > NESTED_NUMBERS:
            raise Unreadable(f"{parts} parts")
        starts = [number for numbers in self._row(offsets, ()) for number in numbers]
        for part, start in enumerate(starts):
            extents, steps = ([n for run in self._row(view, (part,)) for n in run] for view in (sizes, strides))
            reach = sum((extent - 1) * step for extent, step in zip(extents, steps, strict=True))
            if start < 0 or min((*extents, *steps), default=0) < 0 or (0 not in extents and start + reach >= room):
                raise Broken(f"part {part} of shape {tuple(extents)} at {start} lies outside its {room} numbers")

    def _row(self, view: View, place: tuple[int, ...]) -> Iterator[Sequence[int]]:
        """The numbers of one row (the last dimension) in pieces."""
        source, width = self._source(view)
        start = view.offset + sum(step * index for step, index in zip(view.strides, place, strict=False))
        count, stride = view.sizes[-1], view.strides[-1]
        if stride > WIDEST_STRIDE:
            raise Unreadable(f"strides of {stride}")
        for first in range(0, count, CHUNK_NUMBERS):
            taken = min(CHUNK_NUMBERS, count - first)
            numbers = array(CODES[width])
            numbers.frombytes(source.read((start + first * stride) * width, ((taken - 1) * stride + 1) * width))
            if sys.byteorder == "big":
                numbers.byteswap()
            self._job.meter.check_time()
            yield numbers * taken if not stride else numbers[::stride] if stride > 1 else numbers

    def _source(self, view: View) -> tuple[Source, int]:
        source = self._locate(view.storage.key)
        if source is None:
            raise Unreadable("their bytes are not in this file, or not in its byte order")
        width = view.storage.item_bytes
        if width not in CODES:
            raise Broken(f"indices of {width} bytes each")
        return source, width


def _views(claim: Claim, count: int) -> list[View]:
    views = [part for part in claim.parts if part is not None]
    if len(views) != count:
        raise Unreadable("they are no plain tensors of this file")
    return views


def _inside(numbers: Sequence[int], limit: int) -> None:
    if min(numbers) < 0 or max(numbers) >= limit:
        wrong = next(number for number in numbers if not 0 <= number < limit)
        raise Broken(f"index {wrong} in a dimension of {limit}")


def _product(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
