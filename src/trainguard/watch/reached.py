"""Which optimizer step a job had reached at a moment: so that a file is known by the step after which it was written.

Files are noticed some time after they were written, steps are told some time after they were made. Both carry the
kernel's clock, so the moment decides and not the order in which we heard of them. Runs in the supervisor.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

REMEMBERED = 4096
"""Frames kept of each process: an hour of checked steps a second, or more of unchecked ones."""

try:
    GRAIN_NS = int(time.clock_getres(time.CLOCK_REALTIME_COARSE) * 1e9) if hasattr(time, "CLOCK_REALTIME_COARSE") else 0
except OSError:
    GRAIN_NS = 0
GRAIN_NS = GRAIN_NS or 10_000_000
"""File times are taken from the coarse clock and may lie so much before the write."""


class Reached:
    """Steps of all processes of a job by time."""

    def __init__(self) -> None:
        self._ends: dict[int, deque[tuple[int, int]]] = {}
        """Process → (time a step ended, number of that step), in order."""

    def stepped(self, process: int, kind: str, step: int, body: Mapping[str, Any]) -> None:
        """Take a frame of kind `step` or `steps`. A claim of the job, like all of it; what is no time is left out."""
        ended = body.get("ended")
        if not isinstance(ended, int) or isinstance(ended, bool):
            return
        ends = self._ends.setdefault(process, deque(maxlen=REMEMBERED))
        rows = body.get("rows") if kind == "steps" else None
        for row in _spread(rows, ended) if isinstance(rows, list) else [(ended, step)]:
            if not ends or row > ends[-1]:
                ends.append(row)

    def at(self, moment_ns: int) -> int | None:
        """The last step made by then, of the process that made one last; None where none had, or nobody told.

        An attempt that ended does not count for the one that came after it, though its numbers may be higher.
        """
        before = (_before(ends, moment_ns + GRAIN_NS) for ends in self._ends.values())
        last = max((found for found in before if found is not None), default=None)
        return last[1] if last is not None else None


def _before(ends: deque[tuple[int, int]], moment: int) -> tuple[int, int] | None:
    place = bisect.bisect_right(ends, (moment, 1 << 62))
    return ends[place - 1] if place else None


def _spread(rows: list[Any], ended: int) -> list[tuple[int, int]]:
    """(end, number) of each step of a frame of unchecked steps; those that share a row took their mean time."""
    spread: list[tuple[int, int]] = []
    for row in reversed(rows):
        if not isinstance(row, list) or len(row) < 5 or not all(type(each) is int and each >= 0 for each in row[:5]):
            break
        number, _, _, count, wall_ns = row[:5]
        told = min(max(1, count), REMEMBERED)
        spread.extend((ended - turn * (wall_ns // told), number + count - 1 - turn) for turn in range(told))
        ended -= wall_ns
    return spread[::-1][-REMEMBERED:]
