"""From an index of a loader to a row of the data set that handed it over (spec/evidence.md, "Loaders", `data`)."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

DEPTH_LIMIT = 6


@dataclass(slots=True)
class Layout:
    """One data set; a leaf hands over rows itself."""

    number: int | None
    """Of a leaf: its number in the process."""
    ends: list[int] = field(default_factory=list)
    """Of a concatenation."""
    runs: list[tuple[int, int]] | None = None
    """Of a subset: [first, count] of what it takes, in order."""
    starts: list[int] = field(default_factory=list)
    """Of a subset: where its runs begin in its own counting."""
    of: list[Layout] = field(default_factory=list)

    def find(self, index: int) -> tuple[int, int] | None:
        """(number of the leaf, row in it) that index `index` stands for; None where that is not known."""
        if self.runs is not None:
            at = bisect.bisect_right(self.starts, index) - 1
            if at < 0 or index - self.starts[at] >= self.runs[at][1]:
                return None
            return self.of[0].find(self.runs[at][0] + index - self.starts[at])
        if self.ends:
            at = bisect.bisect_right(self.ends, index)
            if at >= len(self.of) or index < 0:
                return None
            return self.of[at].find(index - (self.ends[at - 1] if at else 0))
        return (self.number, index) if self.number is not None else None

    @property
    def leaves(self) -> set[int | None]:
        """Numbers of all leaves."""
        return set().union(*(inner.leaves for inner in self.of)) if self.of else {self.number}


def parse_layout(value: object, depth: int = 0) -> Layout | None:
    """The layout in a record; None where there is none or it is not as specified."""
    if not isinstance(value, dict) or depth > DEPTH_LIMIT:
        return None
    inner = value.get("of")
    if inner is None:
        number = value.get("number")
        return Layout(number if _whole(number) else None)
    if not isinstance(inner, list):
        return None
    parts = [parse_layout(each, depth + 1) for each in inner]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts) or not known:
        return None
    ends, runs = value.get("ends"), value.get("runs")
    if isinstance(ends, list) and len(ends) == len(known) and all(_whole(end) for end in ends) and ends == sorted(ends):
        return Layout(None, ends=ends, of=known)
    if len(known) == 1 and isinstance(runs, list) and all(_is_run(run) for run in runs):
        pairs = [(int(run[0]), int(run[1])) for run in runs]
        starts = [0, *accumulate(count for _, count in pairs)][: len(pairs)]
        return Layout(None, runs=pairs, starts=starts, of=known)
    return None


def _is_run(run: Any) -> bool:
    return isinstance(run, list) and len(run) == 2 and all(_whole(each) for each in run)


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
