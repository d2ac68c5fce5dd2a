"""Check *rng*: do the random streams run on from their seeds, not seeded again, moved or stopped? (docs/checks/rng.md)

A stream is seeded before the first step and then left alone. From every state that is read the judge walks the stream
to the next one: is it reached by drawing, and by how many numbers? A state that is not is a departure, and so is every
seeding after the first step, unless the stream goes on afterwards as if nothing had been (a fork that was undone).
Departures that are a habit of approved code, such as seeding at every epoch, are explained by its lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import Origins
from trainguard.appraise.streams import Twister
from trainguard.appraise.walks import Account, Reading, Walk
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

STATES_LIMIT = 1 << 20
FROZEN_STEPS = 3
MOVING_STEPS = 10
FINDINGS_PER_KIND = 5
REGULAR_EVENTS = 3


@dataclass(slots=True, kw_only=True)
class _Departure:
    """A stream did not simply run on."""

    evidence: Evidence
    name: str = "torch"
    place: str | None = None
    """Innermost `file:line` of a seeding call."""
    stack: tuple[str, ...] = ()
    """`file:line` of all its frames that were told, innermost first."""
    text: str
    to: str = ""
    """What the stream was set to: a seed, or a state."""
    at_epoch: bool = False
    """A loader began an epoch since the step before."""
    outcome: Outcome = "violated"
    limit: int = 0
    """Draws after which the walk to this state was given up, where nothing else speaks of the departure."""
    steps: int = 1
    """Steps since the state before it was read."""


@dataclass(slots=True)
class _Stream:
    """The generators of one process."""

    walks: dict[str, Walk]
    seen: dict[str, int] = field(default_factory=dict)
    """State before a step → that step."""
    last: str | None = None
    seed: int | None = None
    seeds: list[int] = field(default_factory=list)
    """Seeds that torch reported, newest last."""
    steps: int = 0
    moved: Counter[int] = field(default_factory=Counter)
    """Optimizer → its latest steps in a row before which the state was a new one."""
    still: int = 0
    since: int = 0
    """Step at which the state was last a new one."""
    movers: set[int] = field(default_factory=set)
    """Optimizers before whose steps it moves. Another one begins another phase of the training, which may draw none."""
    moved_at_epoch: bool = False
    """It last moved at a step before which a loader began a pass: another pass, over data that may need no numbers."""
    drops: bool = False
    """A module in training mode draws, as last said."""
    frozen_told: bool = False
    repeating: bool = False
    """The state before the last step had been there already: the stream runs along an old path."""
    others: dict[str, dict[str, int]] = field(default_factory=dict)
    """numpy and python: state → step."""
    cuda: dict[int, tuple[str, int]] = field(default_factory=dict)
    departures: list[_Departure] = field(default_factory=list)
    jumped: bool = False
    """A state read between steps was not reached."""
    limit: int = 0
    """Draws after which the walk to it was given up."""
    at_epoch: bool = False
    """A loader began a pass since the step before."""
    epoch_began: bool = False
    """A loader began a pass since numpy's and Python's generators were last read."""
    workers: dict[int, int] = field(default_factory=dict)
    read_at: dict[str, int] = field(default_factory=dict)
    """Generator → step before which it was last read."""

    def steps_since(self, name: str, step: int | None) -> int:
        """Steps since that generator was last read, at least one; notes that it is read now."""
        before, now = self.read_at.get(name), step or 0
        self.read_at[name] = now
        return max(1, now - before) if before is not None else 1


class Rng:
    """Follows the generators of every process that steps."""

    name = "rng"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._origins = Origins(context)
        self._account = Account()
        self._streams: dict[int | None, _Stream] = {}
        self._held = 0
        self._broken = 0
        self._explained: set[str] = set()
        self._given: Counter[tuple[int | None, str]] = Counter()
        self._others = 0
        self._unwalked: Counter[str] = Counter()
        self._seeders: set[str] = set()
        """Lines of the job's own source that seed or set generators inside a loop or a function."""
        self._base_seeds: set[int] = set()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Follow one step, one epoch's beginning, or one loader worker."""
        self._origins.see(evidence)
        if evidence.kind == "loader":
            yield from self._loader(evidence)
        elif evidence.kind == "worker":
            yield from self._worker(evidence)
        value = evidence.body.get(self.name)
        if evidence.kind != "step" or value is None:
            return
        needed = evidence.body.get("checked") is True
        if not isinstance(value, dict) or not isinstance(value.get("torch"), str if needed else (str, type(None))):
            self._broken += 1
            yield from self._give(evidence, "suspicious", ("G2",), "malformed record: no state of the generator")
            return
        stream = self._stream(evidence)
        stream.steps += 1
        before = self._broken
        self._learn(value)
        seeding = self._seeding(evidence, value, stream)
        if isinstance(value.get("torch"), str):
            yield from self._torch(evidence, value, stream, seeding)
        elif seeding is not None:
            stream.departures.append(seeding)
        yield from self._cuda(evidence, value, stream)
        yield from self._repeats(evidence, value, stream)
        stream.at_epoch = False
        self._held += self._broken == before

    def end(self) -> Iterator[Finding | LinkState]:
        """Departures that no habit explains, and the balance."""
        for stream in self._streams.values():
            yield from self._judge(stream)
        blind = () if self._held or self._broken or self._explained else ("no step was seen",)
        yield LinkState(
            link=self.name, held=self._held, broken=self._broken, blind=blind, explained=tuple(sorted(self._explained))
        )
        notes = tuple(f"{reason} ({count})" for reason, count in self._unwalked.items())
        if not self._others:
            notes = ("neither numpy's nor Python's generator was read", *notes)
        yield LinkState(link="rng.numpy", held=self._others, blind=notes, required=False)

    def _stream(self, evidence: Evidence) -> _Stream:
        known = self._streams.get(evidence.process)
        if known is None:
            walks = {
                "torch": Walk(self._account),
                "numpy": Walk(self._account),
                "python": Walk(self._account, Twister.from_python_seed),
            }
            known = self._streams[evidence.process] = _Stream(walks)
        return known

    def _learn(self, value: dict[str, object]) -> None:
        lines = value.get("seeders")
        for line in lines[:256] if isinstance(lines, list) else []:
            if isinstance(line, str) and len(self._seeders) < 1024:
                self._seeders.add(line[:1024])

    # -- between steps ----------------------------------------------------------------------------------------

    def _loader(self, evidence: Evidence) -> Iterator[Finding]:
        """A loader begins an epoch: its base seed and what its sampler draws from are points of torch's stream."""
        body = evidence.body
        if "end" in body:
            return
        stream = self._stream(evidence)
        stream.at_epoch = stream.epoch_began = True
        base = body.get("base_seed")
        if isinstance(base, int):
            self._base_seeds.add(base)
        made, began = body.get("made"), body.get("state")
        walk = stream.walks["torch"]
        if stream.steps and isinstance(made, str):
            reading = self._between(stream, made, body.get("whole"))
            drawn = walk.stream.copy() if walk.stream is not None and reading.kind != "left" else None
            if drawn is not None and isinstance(base, int) and body.get("own") is not True and drawn.seed() != base:
                self._broken += 1
                text = f"a loader's base seed, {base}, is not the next number of torch's stream"
                yield from self._give(evidence, "suspicious", ("D1",), text)
        if stream.steps and isinstance(began, str):
            self._between(stream, began, body.get("block"))

    def _between(self, stream: _Stream, state: str, whole: object) -> Reading:
        """A state of torch's generator that was read between two steps."""
        reading = self._read(stream, "torch", state, whole)
        if reading.kind == "left":
            stream.jumped, stream.limit = True, reading.limit
        return reading

    def _worker(self, evidence: Evidence) -> Iterator[Finding]:
        """A loader's worker says what it was seeded with."""
        base, number, seed = (evidence.body.get(name) for name in ("base_seed", "worker", "seed"))
        if not (isinstance(base, int) and isinstance(number, int) and isinstance(seed, int)):
            return
        stream = self._stream(evidence)
        known = stream.workers.setdefault(number, seed)
        if known == seed:
            if seed == base + number:
                self._held += 1
            else:
                self._unwalked["a loader's worker was seeded by the job's own worker_init_fn"] += 1
            return
        stream.workers[number] = seed
        self._broken += 1
        text = f"worker {number} of a loader was seeded again with {seed} while it works (before: {known})"
        yield from self._give(evidence, "suspicious", ("D1",), text)

    # -- one step ---------------------------------------------------------------------------------------------

    def _seeding(self, evidence: Evidence, value: dict[str, object], stream: _Stream) -> _Departure | None:
        """The departure that a seeding call since the step before would be; None for none, or at a beginning."""
        seed, stack = value.get("seed"), value.get("seeded")
        place = _place(stack)
        changed = isinstance(seed, int) and seed != stream.seed
        old = stream.seed
        if isinstance(seed, int):
            stream.seed = seed
            stream.seeds = [*stream.seeds[-2:], seed]
        if evidence.body.get("index") == 1:  # an optimizer's first step: a training begins, and seeding belongs to that
            if changed or place is not None:
                stream.seen.clear()
                stream.others.clear()
                stream.repeating = False
            return None
        if not (changed or place is not None):
            return None
        return _Departure(
            evidence=evidence,
            place=place,
            stack=_places(stack),
            text=f"the generators were seeded again with {stream.seed}"
            + (f" (before: {old})" if changed else "")
            + (f", at {place}{_caller(stack)}" if place else ", by nobody that could be named"),
            to=str(stream.seed),
            at_epoch=stream.at_epoch,
        )

    def _read(self, stream: _Stream, name: str, state: str, whole: object, *, beginning: bool = False) -> Reading:
        """Walk one generator to a state that was told."""
        if "." not in state:
            self._unwalked[f"{name}'s states are told in an older way and cannot be walked"] += 1
            return Reading("unknown")
        seeds = reversed(stream.seeds)
        try:
            reading = stream.walks[name].read(state, whole, seeds, beginning=beginning, guess=name != "torch")
        except ValueError as error:
            self._unwalked[f"{name}: malformed state: {error}"] += 1
            return Reading("unknown")
        if reading.kind == "exhausted":
            self._unwalked[f"{name}'s stream draws more than a judge walks; repeats and seedings are seen"] += 1
        return reading

    def _torch(
        self, evidence: Evidence, value: dict[str, object], stream: _Stream, seeding: _Departure | None
    ) -> Iterator[Finding]:
        state = str(value["torch"])[:64]
        stream.drops = value.get("dropout", stream.drops) is True
        beginning = evidence.body.get("index") == 1 or stream.steps == 1
        reading = self._read(stream, "torch", state, _whole(value, "torch"), beginning=beginning or seeding is not None)
        jumped, stream.jumped = stream.jumped or reading.kind in ("left", "seeded"), False
        limit, stream.limit = reading.limit or stream.limit, 0
        steps = stream.steps_since("torch", evidence.step)
        known = stream.seen.get(state)
        if seeding is not None and (jumped or reading.kind != "reached"):
            stream.departures.append(seeding)
        told = evidence.body.get("opt")
        opt = told if isinstance(told, int) else -1
        if state == stream.last:
            stream.still += 1
            stream.moved[opt] = 0
            another_pass = stream.moved_at_epoch and not stream.drops
            if opt in stream.movers and stream.still >= FROZEN_STEPS and not stream.frozen_told and not another_pass:
                stream.frozen_told = True
                self._broken += 1
                text = (
                    f"torch's generator stands still since step {(evidence.step or 0) - stream.still}, and moved before"
                )
                yield from self._give(evidence, "suspicious", ("D1",), text)
        else:
            stream.moved[opt] = 0 if stream.still else stream.moved[opt] + 1
            if stream.moved[opt] >= MOVING_STEPS:
                stream.movers.add(opt)
            stream.still = 0
            stream.since = evidence.step or 0
            stream.moved_at_epoch = stream.at_epoch
            repeating, stream.repeating = stream.repeating, known is not None
            if known is not None and seeding is None and not repeating:
                text = f"torch's generator was put back to its state before step {known}"
                self._depart(evidence, stream, text, to=state)
            elif known is None and seeding is None and jumped and not beginning:
                text = "torch's generator left its stream: this state is not reached by drawing from the one before"
                self._depart(
                    evidence, stream, text + _within(limit), to=state, outcome="suspicious", limit=limit, steps=steps
                )
        if len(stream.seen) < STATES_LIMIT:
            stream.seen.setdefault(state, evidence.step or 0)
        stream.last = state

    def _depart(
        self,
        evidence: Evidence,
        stream: _Stream,
        text: str,
        *,
        to: str,
        name: str = "torch",
        outcome: Outcome = "violated",
        limit: int = 0,
        steps: int = 1,
    ) -> None:
        stream.departures.append(
            _Departure(
                evidence=evidence,
                name=name,
                text=text,
                to=to,
                at_epoch=stream.at_epoch if name == "torch" else stream.epoch_began,
                outcome=outcome,
                limit=limit,
                steps=steps,
            )
        )

    def _cuda(self, evidence: Evidence, value: dict[str, object], stream: _Stream) -> Iterator[Finding]:
        rows = value.get("cuda")
        for row in rows[:64] if isinstance(rows, list) else []:
            if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], int) and isinstance(row[2], int)):
                continue
            index, seed, offset = row[0], str(row[1]), row[2]
            last = stream.cuda.get(index)
            stream.cuda[index] = (seed, offset)
            if last is not None and last[0] != seed and evidence.body.get("index") != 1 and "seeded" not in value:
                text = f"CUDA generator {index} was seeded again with {seed} (before: {last[0]})"
                self._depart(evidence, stream, text, to=seed, name="cuda", outcome="suspicious")
            if last is not None and last[0] == seed and offset < last[1]:
                self._broken += 1
                text = f"CUDA generator {index} went back from offset {last[1]} to {offset}"
                yield from self._give(evidence, "suspicious", ("D1",), text)

    def _repeats(self, evidence: Evidence, value: dict[str, object], stream: _Stream) -> Iterator[Finding]:
        """numpy's and Python's global generators."""
        for name in ("numpy", "python"):
            state = value.get(name)
            if not isinstance(state, str):
                continue
            self._others += 1
            steps = stream.steps_since(name, evidence.step)
            seen = stream.others.setdefault(name, {})
            known = seen.get(state[:64])
            newest = next(reversed(seen), None)
            reading = self._read(stream, name, state, _whole(value, name))
            if known is not None and state != newest and len(seen) > 2:
                text = f"{name}'s global generator was put back to its state before step {known}"
                self._depart(evidence, stream, text, to=state, name=name)
                seen.pop(state)
            elif reading.kind in ("left", "seeded") and known is None and seen:
                how = f"was seeded again with {reading.seed}" if reading.kind == "seeded" else "left its stream"
                text = f"{name}'s global generator {how}: its state is not reached by drawing from the one before"
                to = str(reading.seed) if reading.kind == "seeded" else state
                limit = reading.limit
                self._depart(
                    evidence,
                    stream,
                    text + _within(limit),
                    to=to,
                    name=name,
                    outcome="suspicious",
                    limit=limit,
                    steps=steps,
                )
            if len(seen) < STATES_LIMIT:
                seen.setdefault(state[:64], evidence.step or 0)
        if "numpy" in value or "python" in value:
            stream.epoch_began = False
        return
        yield

    # -- habits -----------------------------------------------------------------------------------------------

    def _judge(self, stream: _Stream) -> Iterator[Finding]:
        """Departures of a process, by generator and place: explained by approval or habit, or told."""
        by_place: dict[tuple[str, str | None], list[_Departure]] = {}
        for each in stream.departures:
            if each.limit and not stream.walks[each.name].outlasts(each.limit, steps=each.steps):
                self._unwalked[f"{each.name}'s stream may draw more between two steps than a judge walks"] += 1
                continue
            by_place.setdefault((each.name, each.place), []).append(each)
        for (name, place), events in by_place.items():
            line, doubt = self._excuse(name, place, events)
            if line is not None:
                self._explained.add(line)
                continue
            for each in events:
                self._broken += 1
                self._held = max(0, self._held - 1)
                outcome: Outcome = "suspicious" if doubt and each.outcome == "violated" else each.outcome
                yield from self._give(each.evidence, outcome, ("D1",), each.text + doubt, place)

    def _excuse(self, name: str, place: str | None, events: list[_Departure]) -> tuple[str | None, str]:
        """(what explains these departures, or None; why they are in doubt rather than proved, or nothing)."""
        if place is not None and self._origins.approves(self.name, place):
            return place, ""
        habit = _regular([each.evidence.step or 0 for each in events], slack=1 if name == "torch" else 8)
        habit = habit or all(each.at_epoch for each in events)
        if name != "torch":
            lines = sorted(line for line in self._seeders if self._origins.standing(line) in ("approved", "own"))
            return (lines[0], "") if habit and lines else (None, "")
        if place is None:
            one = len({each.to for each in events}) == 1 and len(events) > 1
            return (None, "") if one or not habit else ("a state restored at even distances", "")
        standings = {self._origins.standing(line) for line in events[0].stack if not line.startswith("<")}
        if "planted" in standings:
            return None, ""
        if "approved" in standings:
            return place, ""  # every frame is as the lock has it, and the job's own code called
        if not habit:
            return None, ""
        if len({each.to for each in events}) > 1 or len(events) == 1:
            return place, ""
        return None, (
            "; the same seed at even distances: the same random numbers come again each time. No lock says that "
            "this line may"
        )

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


def _regular(steps: list[int], *, slack: int) -> bool:
    """At least three events whose distances differ by at most `slack` steps."""
    if len(steps) < REGULAR_EVENTS:
        return False
    gaps = [b - a for a, b in pairwise(steps)]
    return max(gaps) - min(gaps) <= slack


def _within(limit: int) -> str:
    return f" within {limit:,} draws" if limit else ""


def _whole(value: dict[str, object], name: str) -> object:
    states = value.get("states")
    return states.get(name) if isinstance(states, dict) else None


def _caller(stack: object) -> str:
    """The innermost frame outside installed packages, for the message, where it is not the place itself."""
    lines = [line for line in stack if isinstance(line, str)] if isinstance(stack, list) else []
    own = next((line for line in lines if "-packages/" not in line), None)
    if own is None or own is lines[0]:
        return ""
    return f", called from {own.rsplit(':', 1)[0]}"[:1024]


def _places(stack: object) -> tuple[str, ...]:
    """`file:line` of every frame of a seeding call."""
    lines = [line for line in stack[:16] if isinstance(line, str)] if isinstance(stack, list) else []
    return tuple(line.rsplit(":", 1)[0][:1024] for line in lines)


def _place(stack: object) -> str | None:
    """`file:line` of the innermost frame of a seeding call."""
    if not isinstance(stack, list):
        return None
    return next((line for line in _places(stack) if ":" in line), "an unknown place")
