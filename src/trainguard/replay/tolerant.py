"""One segment, replayed on another build: within its tolerance, beyond it, or not told (spec/replay.md, "Tolerance").

 1. Streams, modes and settings are in no arithmetic: they are compared at every step, as on the same build.
 2. The replay's state at the end of the segment is compared with the sealed one, tensor by tensor, by size.
 3. What the class of this machine's calibration does not cover is held against the job's own spread: the same segment
    replayed under the variations that this machine can make.
 4. A sign turned in one step on our own side must be beyond what is allowed, else the tolerance says nothing here.

What is beyond is *suspicious* and never proved: other kernels or a decision that hangs on a last bit (a router's
choice, a stopping rule) are honest alternatives. A replay on the run's own build proves.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trainguard.errors import TrainguardError, Unavailable
from trainguard.home import Home
from trainguard.replay import compare, numerics, points, tolerance
from trainguard.replay.committed import Account, Committed
from trainguard.replay.compare import Difference
from trainguard.replay.plan import Segment
from trainguard.replay.rerun import Rerun
from trainguard.replay.tasks import Task
from trainguard.replay.tolerance import Calibration, Reading

SPREADS = 3
"""Replays that own spread is taken from, at most."""

SETTING_SLACK = 1e-9
"""A schedule's value may differ by the last bits of another C library's cosine."""


class OtherBuild(Unavailable):
    """Run and replay differ, and they ran on different builds: bits are not to be expected."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__(f"not comparable bit for bit: {', '.join(tolerance.IN_WORDS[kind] for kind in kinds)}")
        self.kinds = kinds


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    outcome: str
    """within, beyond, or not told."""
    reading: Reading | None = None
    difference: Difference | None = None
    """Where streams, modes or settings part."""
    reason: str | None = None


@dataclass(slots=True)
class Tolerant:
    """Judges segments of one run; what it needs of the audit comes as functions."""

    home: Home
    run: str
    committed: Committed
    folder: Path
    """Where states may be left between replays."""
    task: Callable[[Segment], Task]
    """The first replay of a segment, from its sealed states."""
    rerun: Callable[[Task], Rerun]
    unfinished: Callable[[Rerun, int], str | None]
    calibration: str | None = None
    """SHA-256 of the calibration that was used, once one was."""
    planted: bool | None = None
    """Whether our own planted fault was beyond what is allowed; None before it was tried."""
    store: Callable[[bytes], str] = field(default=lambda _data: "")

    def segment(self, segment: Segment, kinds: Sequence[str]) -> Told:
        """Judge one. Raises Unavailable only where a replay could not be had at all."""
        try:
            return self._judged(segment, tuple(kinds))
        except TrainguardError as error:
            if isinstance(error, Unavailable) and type(error).__name__ in ("NotPerformed", "Refused"):
                raise
            step = f"; {error.next_step}" if error.next_step else ""
            return Told(outcome="not told", reason=f"{error}{step}")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _judged(self, segment: Segment, kinds: tuple[str, ...]) -> Told:
        sealed = self._sealed(segment)
        task = self.task(segment)
        if not task.points and segment.last < 2:
            raise Unavailable("one step from the start: there is no movement to measure by")
        keep = (segment.last,) if task.points else (1, segment.last)
        base = msgspec.structs.replace(
            task, keep=keep, against={name: str(folder) for name, (folder, _) in sealed.items()}, leave=str(self.folder)
        )
        found = self._sound(base, segment)
        calibration = self._calibration(found)
        parting = self._parting(found, segment)
        if parting is not None:
            return self._confirmed(base, found, parting, segment, calibration)
        steps = segment.last - (task.begin or 1)
        reading = self._reading(found, sealed, kinds, steps, calibration, [])
        spread: list[Rerun] = []
        if reading.excess > 1:
            spread = [self._sound(each, segment) for each in self._varied(base, sealed, calibration)]
            if not spread:
                raise Unavailable("beyond the class, and this machine can make no variation to ask the job itself")
            reading = self._reading(found, sealed, kinds, steps, calibration, spread)
        if reading.undetectable > tolerance.WIDEST:
            raise Unavailable(f"the tolerance is too wide to mean anything: {reading.words}")
        self._plant(base, sealed, segment, kinds, steps, calibration, spread)
        return Told(outcome="within" if reading.excess <= 1 else "beyond", reading=reading)

    def _sealed(self, segment: Segment) -> dict[str, tuple[Path, Mapping[str, str]]]:
        """`rank/step` → folder and types of the run's own state at the end of the segment."""
        found: dict[str, tuple[Path, Mapping[str, str]]] = {}
        for rank in self.committed.everyone:
            point = next((point for point in rank.points if point.step == segment.last), None)
            if point is None:
                raise Unavailable(f"no sealed state after step {segment.last}: it can only be compared bit for bit")
            folder = self.home.run(self.run) / "points" / point.name
            index = points.open_point(folder, point)
            found[f"{rank.rank}/{segment.last}"] = (folder, {name: kind for name, kind, *_ in index.tensors})
        return found

    def _sound(self, task: Task, segment: Segment) -> Rerun:
        found = self.rerun(task)
        landed = None if found.landed or not task.points else "it never landed"
        reason = found.unsound or self.unfinished(found, segment.last) or landed
        if reason is not None:
            raise Unavailable(f"on another build the segment cannot be replayed: {reason}")
        return found

    def _calibration(self, found: Rerun) -> Calibration:
        build: Mapping[str, Any] = found.account.build or {}
        known = numerics.find(self.home, build)
        if known is None:
            raise Unavailable(
                f"could not tell: the machine that replayed is another build ({build.get('cpu')}, torch "
                f"{build.get('torch')}) and is not calibrated",
                next_step="trainguard doctor --numerics on that machine, then the same audit again",
            )
        self.calibration = self.store(msgspec.json.encode(known))
        return known

    def _parting(self, found: Rerun, segment: Segment) -> Difference | None:
        """Where streams, modes or settings part from the run's, at any step up to the segment's end."""
        for rank in self.committed.everyone:
            other = found.accounts.get(rank.rank, Account())
            for difference in _exact(rank.account, other, segment.last):
                return msgspec.structs.replace(difference, rank=rank.rank)
        return None

    def _confirmed(
        self, base: Task, found: Rerun, parting: Difference, segment: Segment, calibration: Calibration
    ) -> Told:
        """A setting that another clean replay, under other arithmetic, has too and the run has not."""
        settings = next(iter(calibration.spread_by({**base.environment, **base.numeric})), {"OMP_NUM_THREADS": "2"})
        again = self._sound(_with(base, settings), segment)
        one, two = found.accounts.get(parting.rank, Account()), again.accounts.get(parting.rank, Account())
        if next(_exact(one, two, parting.step), None) is not None:
            raise Unavailable(f"step {parting.step}: {parting.what} depends on the arithmetic of the machine")
        return Told(outcome="beyond", difference=parting)

    def _varied(self, base: Task, sealed: Mapping[str, Any], calibration: Calibration) -> Iterator[Task]:
        """The same segment under variations, each compared with the first replay."""
        left = {name: str(self.folder / name.replace("/", "-")) for name in sealed}
        for settings in calibration.spread_by({**base.environment, **base.numeric})[:SPREADS]:
            yield msgspec.structs.replace(_with(base, settings), against=left, leave="")

    def _reading(
        self, found: Rerun, sealed: Mapping[str, tuple[Path, Mapping[str, str]]], kinds: tuple[str, ...], steps: int,
        calibration: Calibration, spread: Sequence[Rerun],
    ) -> Reading:  # fmt: skip
        """The worst rank's."""
        readings = []
        for name, (_, dtypes) in sealed.items():
            rank, _, step = name.partition("/")
            at = (int(rank), int(step))
            if at not in found.distances:
                raise Unavailable(f"rank {rank}: the replay left no state after step {step}")
            others = [each.distances[at] for each in spread if at in each.distances]
            readings.append(tolerance.judged(found.distances[at], kinds, steps, calibration, dtypes, others))
        return max(readings, key=lambda reading: reading.excess)

    def _plant(
        self, base: Task, sealed: Mapping[str, tuple[Path, Mapping[str, str]]], segment: Segment,
        kinds: tuple[str, ...], steps: int, calibration: Calibration, spread: Sequence[Rerun],
    ) -> None:  # fmt: skip
        """Once an audit: a sign turned in the last step, against the same replay without."""
        if self.planted is None:
            left = {name: str(self.folder / name.replace("/", "-")) for name in sealed}
            task = msgspec.structs.replace(base, plant=segment.last, against=left, leave="")
            reading = self._reading(self._sound(task, segment), sealed, kinds, steps, calibration, spread)
            self.planted = reading.excess > 1
        if not self.planted:
            raise Unavailable("a gradient's sign turned in one step on our own side would be within the tolerance")


def _with(task: Task, settings: Mapping[str, str]) -> Task:
    return msgspec.structs.replace(task, numeric={**task.numeric, **settings})


def _exact(run: Account, clean: Account, last: int) -> Iterator[Difference]:
    """Differences in streams, modes and settings, step by step."""
    streams = compare.idle(run, clean)
    for number in range(1, last + 1):
        one, two = run.steps.get(number), clean.steps.get(number)
        if one is None or two is None:
            continue
        for difference in compare.differences(one, two, run.tensors.get(one.opt, ()), streams):
            if difference.link in tolerance.EXACT and not _close(one.hyper, two.hyper, difference):
                yield difference


def _close(one: Mapping[str, Mapping[str, Any]], two: Mapping[str, Mapping[str, Any]], difference: Difference) -> bool:
    """Whether settings differ by no more than another library's last bits."""
    if difference.link != "groups" or one.keys() != two.keys():
        return False
    return all(one[group].keys() == two[group].keys() and all(
        _near(value, two[group][name]) for name, value in one[group].items()
    ) for group in one)  # fmt: skip


def _near(one: object, two: object) -> bool:
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_near, one, two))
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=SETTING_SLACK)
    return one == two
