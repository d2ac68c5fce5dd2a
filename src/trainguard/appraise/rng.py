"""Check *rng*: do the random streams run on, without being seeded again or standing still? (docs/checks/rng.md)

A stream is seeded before the first step and then left alone. What is watched at every step: the seed that torch
reports, the call of torch.manual_seed, the state of the CPU generator. Seeding at regular intervals from one line
(every epoch) is a habit and explained by it; anything else after the first step is a departure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from trainguard.appraise.interface import Context, finding_from
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

STATES_LIMIT = 1 << 20
FROZEN_STEPS = 3
MOVING_STEPS = 10
FINDINGS_PER_KIND = 5
REGULAR_EVENTS = 3


@dataclass(slots=True)
class _Seeding:
    """Somebody seeded the generators after the first step."""

    evidence: Evidence
    place: str | None
    text: str
    caller: str = ""
    """`file:line` in the job's own source from which the call came, where that is another."""


@dataclass(slots=True)
class _Stream:
    seen: dict[str, int] = field(default_factory=dict)
    """State before a step → that step."""
    last: str | None = None
    seed: int | None = None
    steps: int = 0
    moved: int = 0
    still: int = 0
    since: int = 0
    """Step at which the state was last a new one."""
    was_moving: bool = False
    frozen_told: bool = False
    repeating: bool = False
    """The state before the last step had been there already: the stream runs along an old path."""
    others: dict[str, dict[str, int]] = field(default_factory=dict)
    """numpy and python: state → step."""
    cuda: dict[int, tuple[str, int]] = field(default_factory=dict)
    seedings: list[_Seeding] = field(default_factory=list)


class Rng:
    """Follows the generators of every process that steps."""

    name = "rng"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._streams: dict[int | None, _Stream] = {}
        self._held = 0
        self._broken = 0
        self._explained: set[str] = set()
        self._given: Counter[tuple[int | None, str]] = Counter()
        self._others = 0

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Follow one step."""
        value = evidence.body.get(self.name)
        if evidence.kind != "step" or value is None:
            return
        needed = evidence.body.get("checked") is True
        if not isinstance(value, dict) or not isinstance(value.get("torch"), str if needed else (str, type(None))):
            self._broken += 1
            yield from self._give(evidence, "suspicious", ("G2",), "malformed record: no state of the generator")
            return
        stream = self._streams.setdefault(evidence.process, _Stream())
        stream.steps += 1
        before = self._broken
        reseeded = self._seeding(evidence, value, stream)
        if isinstance(value.get("torch"), str):
            yield from self._torch(evidence, value, stream, reseeded)
        yield from self._cuda(evidence, value, stream)
        yield from self._repeats(evidence, value, stream)
        self._held += self._broken == before

    def end(self) -> Iterator[Finding | LinkState]:
        """Seedings that no habit explains, and the balance."""
        for stream in self._streams.values():
            yield from self._judge(stream)
        blind = () if self._held or self._broken or self._explained else ("no step was seen",)
        yield LinkState(
            link=self.name, held=self._held, broken=self._broken, blind=blind, explained=tuple(sorted(self._explained))
        )
        note = "whether numpy and python streams follow from their seeds is not recomputed; repeats of a state are seen"
        yield LinkState(link="rng.numpy", held=self._others, blind=(note,), required=False)

    # -- one step ---------------------------------------------------------------------------------------------

    def _seeding(self, evidence: Evidence, value: dict[str, object], stream: _Stream) -> bool:
        seed, stack = value.get("seed"), value.get("seeded")
        place = _place(stack)
        changed = isinstance(seed, int) and seed != stream.seed
        old = stream.seed
        if isinstance(seed, int):
            stream.seed = seed
        if not (changed or place is not None):
            return False
        if evidence.body.get("index") == 1:  # an optimizer's first step: a training begins, and seeding belongs to that
            stream.seen.clear()
            stream.others.clear()
            stream.repeating = False
            return True
        text = f"the generators were seeded again with {stream.seed}" + (f" (before: {old})" if changed else "")
        stream.seedings.append(_Seeding(evidence, place, text, _caller(stack)))
        return True

    def _torch(
        self, evidence: Evidence, value: dict[str, object], stream: _Stream, reseeded: bool
    ) -> Iterator[Finding]:
        state = str(value["torch"])[:64]
        known = stream.seen.get(state)
        if state == stream.last:
            stream.still += 1
            if stream.was_moving and stream.still >= FROZEN_STEPS and not stream.frozen_told:
                stream.frozen_told = True
                self._broken += 1
                text = (
                    f"torch's generator stands still since step {(evidence.step or 0) - stream.still}, and moved before"
                )
                yield from self._give(evidence, "suspicious", ("D1",), text)
        else:
            stream.moved = stream.moved + 1 if not stream.still else 0
            stream.was_moving = stream.was_moving or stream.moved >= MOVING_STEPS
            stream.still = 0
            stream.since = evidence.step or 0
            repeating, stream.repeating = stream.repeating, known is not None
            if known is not None and not reseeded and not repeating:
                stream.seedings.append(
                    _Seeding(evidence, None, f"torch's generator was put back to its state before step {known}")
                )
        if len(stream.seen) < STATES_LIMIT:
            stream.seen.setdefault(state, evidence.step or 0)
        stream.last = state

    def _cuda(self, evidence: Evidence, value: dict[str, object], stream: _Stream) -> Iterator[Finding]:
        rows = value.get("cuda")
        for row in rows[:64] if isinstance(rows, list) else []:
            if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], int) and isinstance(row[2], int)):
                continue
            index, seed, offset = row[0], str(row[1]), row[2]
            last = stream.cuda.get(index)
            stream.cuda[index] = (seed, offset)
            if last is not None and last[0] == seed and offset < last[1]:
                self._broken += 1
                text = f"CUDA generator {index} went back from offset {last[1]} to {offset}"
                yield from self._give(evidence, "suspicious", ("D1",), text)

    def _repeats(self, evidence: Evidence, value: dict[str, object], stream: _Stream) -> Iterator[Finding]:
        for name in ("numpy", "python"):
            state = value.get(name)
            if not isinstance(state, str):
                continue
            self._others += 1
            seen = stream.others.setdefault(name, {})
            known = seen.get(state)
            newest = next(reversed(seen), None)
            if known is not None and state != newest and len(seen) > 2:
                place = f"{name}'s global generator was put back to its state before step {known}"
                stream.seedings.append(_Seeding(evidence, None, place))
                seen.pop(state)
            if len(seen) < STATES_LIMIT:
                seen.setdefault(state, evidence.step or 0)
        return
        yield

    # -- habits -----------------------------------------------------------------------------------------------

    def _judge(self, stream: _Stream) -> Iterator[Finding]:
        """Seedings of a process: from one place at even distances they are a habit, else departures."""
        by_place: dict[str | None, list[_Seeding]] = {}
        for each in stream.seedings:
            by_place.setdefault(each.place, []).append(each)
        for place, events in by_place.items():
            if place is not None and self._context.policy.approves(self.name, place):
                self._explained.add(place)
                continue
            if _regular([each.evidence.step or 0 for each in events]):
                self._explained.add(place or "a state restored at even distances")
                continue
            for each in events:
                self._broken += 1
                self._held -= 1
                by = f", at {place}{each.caller}" if place else ", by nobody that could be named"
                yield from self._give(each.evidence, "violated", ("D1",), each.text + by, place)

    def _give(
        self, evidence: Evidence, outcome: Outcome, techniques: tuple[str, ...], text: str, path: str | None = None
    ) -> Iterator[Finding]:
        kind = (evidence.rank, techniques[0])
        self._given[kind] += 1
        if self._given[kind] > FINDINGS_PER_KIND:
            return
        yield finding_from(
            self.name,
            outcome,
            f"before step {evidence.step}: {text}",
            evidence,
            run=self._context.run,
            techniques=techniques,
            path=path,
        )


def _regular(steps: list[int]) -> bool:
    """At least three events whose distances differ by at most one step."""
    if len(steps) < REGULAR_EVENTS:
        return False
    gaps = [b - a for a, b in pairwise(steps)]
    return max(gaps) - min(gaps) <= 1


def _caller(stack: object) -> str:
    """The innermost frame outside installed packages, for the message, where it is not the place itself."""
    lines = [line for line in stack if isinstance(line, str)] if isinstance(stack, list) else []
    own = next((line for line in lines if "-packages/" not in line), None)
    if own is None or own is lines[0]:
        return ""
    return f", called from {own.rsplit(':', 1)[0]}"[:1024]


def _place(stack: object) -> str | None:
    """`file:line` of the innermost frame of a seeding call."""
    if not isinstance(stack, list):
        return None
    for line in stack:
        parts = line.rsplit(":", 2) if isinstance(line, str) else []
        if len(parts) == 3:
            return f"{parts[0]}:{parts[1]}"[:1024]
    return "an unknown place"
