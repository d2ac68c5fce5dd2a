"""Which segment is the first that differs, with as few replays as can be.

    found = search(64, differs, first=(0, 17))

`differs(n)` replays segment n from its own sealed state: True, False, or None where that cannot be done. A change that
stays (another rate from some step on, a poisoned loader) makes every segment from its own on differ: the last of 64 is
replayed, then halves, seven in all. A single act makes one segment differ, and no order is sure to meet it early: after
those that the record makes suspicious, segments are taken from the middle outwards until all have been.

The answer is where to look, never proof: from there the run is replayed from its first step, which compares every step
until then (audit.py), so that an earlier act that no probe met is found as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a search came to."""

    segment: int | None
    """First segment known to differ; None where none does."""
    probed: tuple[int, ...]
    """All that were replayed, in this order."""


def search(count: int, differs: Callable[[int], bool | None], *, first: Sequence[int] = ()) -> Found:
    """The first of `count` segments that differs, under the assumption that those after it do too."""
    known: dict[int, bool | None] = {}

    def probe(number: int) -> bool:
        if number not in known:
            known[number] = differs(number)
        return known[number] is True

    bad = next((number for number in order(count, first) if probe(number)), None)
    if bad is not None:
        low = max((n for n, state in known.items() if state is False and n < bad), default=-1)
        while bad - low > 1:
            middle = (low + bad) // 2
            if probe(middle):
                bad = middle
            else:
                low = middle
    return Found(segment=bad, probed=tuple(known))


def order(count: int, first: Sequence[int] = ()) -> Iterator[int]:
    """Every segment once: those named first, the last one, then ever finer halves."""
    seen: set[int] = set()
    for number in (*first, count - 1, *halves(0, count - 1)):
        if 0 <= number < count and number not in seen:
            seen.add(number)
            yield number


def halves(low: int, high: int) -> Iterator[int]:
    """Middles of ever smaller parts of low … high, coarse ones first, ends included."""
    parts = [(low, high)]
    while parts:
        finer = []
        for a, b in parts:
            if a > b:
                continue
            middle = (a + b) // 2
            yield middle
            finer += [(a, middle - 1), (middle + 1, b)]
        parts = finer
