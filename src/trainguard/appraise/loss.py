"""Check *loss*: is the loss that backward started from the one that the calling lines ask for? (docs/checks/loss.md)

Reads what link *truth* recorded of calls of torch's loss functions, in the steps it put on tape:

1. The value of a call is the one that its definition gives, from the same tensors and the settings that the calling
   line, or the module, states. Where torch's own function answered, a difference is proof.
2. Where code outside torch answered a call that names torch's function, and the value differs, that code is named:
   proof if the code is not what was approved or measured, else suspicious.
3. Settings of a call, its factor in what backward started from, and the part that no call accounts for stay as they
   were in the checks before. A change is suspicious at most: schedules do this too.

A loss made of other operators is not judged: blind, never an alarm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import Origins
from trainguard.appraise.sweeps import whose
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

TOLERANCE = {False: 1e-3, True: 5e-2}
"""Relative, by whether less than single precision was used."""
STEADY = 2
"""Checks with the same answer before a change of it means something."""
FINDINGS_LIMIT = 8
CALLS_LIMIT = 256


class _Call(msgspec.Struct):
    name: str
    place: str
    value: float
    factor: float | None = None
    reference: float | None = None
    rows: int = 0
    used: int = 0
    settings: dict[str, float | bool | str] = {}
    by: str | None = None
    why: str | None = None


class _Losses(msgspec.Struct):
    calls: list[_Call]
    rest: float | None = None


@dataclass(slots=True)
class _Track:
    settings: dict[str, tuple[dict[str, float | bool | str], int]] = field(default_factory=dict)
    """Place of a call → its settings, and in how many checks they were so."""
    factors: dict[str, tuple[float, int, int]] = field(default_factory=dict)
    """Place of a call → its factor, how many such calls a step makes, in how many checks it was so; -1: it varies."""
    whole: int = 0
    """Checks in a row in which calls accounted for everything; -1: they never have to."""


class Loss:
    """See the module."""

    name = "loss"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._origins = Origins(context)
        self._tracks: dict[tuple[int | None, object], _Track] = {}
        self._held = 0
        self._broken = 0
        self._given: Counter[str] = Counter()
        self._blind: Counter[str] = Counter()
        self._explained: set[str] = set()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        self._origins.see(evidence)
        value = evidence.body.get("truth") if evidence.kind == "step" else None
        if not isinstance(value, dict) or "blind" in value:
            return
        if "losses" not in value:
            self._blind["no call of one of torch's loss functions takes part in what backward started from"] += 1
            return
        try:
            losses = _parse(value["losses"])
        except MalformedEvidence as error:
            self._broken += 1
            yield from self._finding(evidence, "suspicious", ("G2",), f"malformed record: {error}")
            return
        track = self._tracks.setdefault((evidence.process, str(evidence.body.get("opt"))), _Track())
        tolerance = TOLERANCE[value.get("low") is True]
        before = self._broken
        for call in losses.calls:
            yield from self._call(evidence, call, tolerance)
        yield from self._changes(evidence, losses, track, tolerance)
        self._held += self._broken == before

    def end(self) -> Iterator[Finding | LinkState]:
        blind = [reason for reason, _ in self._blind.most_common(4)] if not self._held else []
        if not self._held and not self._broken and not blind:
            blind = ["no step was put on tape"]
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(blind),
            explained=tuple(sorted(self._explained)),
            required=False,
        )

    def _call(self, evidence: Evidence, call: _Call, tolerance: float) -> Iterator[Finding]:
        """The value by its definition."""
        if call.reference is None:
            self._blind[f"the value of {call.name} was not recomputed: {call.why}"] += 1
            return
        if _close(call.value, call.reference, tolerance):
            return
        numbers = f"gave {call.value:.6g}, and by its definition it is {call.reference:.6g}"
        stated = ", ".join(f"{key}={value}" for key, value in sorted(call.settings.items()))
        if call.by is None:
            self._broken += 1
            text = f"{call.name} called at {call.place} {numbers} ({stated})"
            yield from self._finding(evidence, "violated", ("C6", "B3"), text, call.place, call)
            return
        place = call.by.rsplit(":", 1)[0]
        standing = self._origins.standing(place)
        if standing in ("library", "guard", "cache") or self._origins.approves(self.name, place):
            self._explained.add(self._origins.relative(place))
            return
        self._broken += 1
        text = (
            f"the call of torch's {call.name} at {call.place} was answered by {call.by.rsplit(':', 1)[1]} at {place}, "
            f"in {whose(standing)}: it {numbers} ({stated})"
        )
        outcome: Outcome = "violated" if standing in ("planted", "generated") else "suspicious"
        yield from self._finding(evidence, outcome, ("C6", "B3"), text, place, call)

    def _changes(self, evidence: Evidence, losses: _Losses, track: _Track, tolerance: float) -> Iterator[Finding]:
        """What a run does from one check to the next."""
        own = [call for call in losses.calls if call.by is None]
        counts = Counter(call.place for call in own)
        scaled = isinstance(evidence.body.get("gradients"), dict) and "scale" in evidence.body["gradients"]
        for call in {call.place: call for call in own}.values():
            yield from self._settings(evidence, call, track)
            if not scaled:
                yield from self._factor(evidence, call, counts[call.place], track)
        yield from self._rest(evidence, losses, track, tolerance)

    def _settings(self, evidence: Evidence, call: _Call, track: _Track) -> Iterator[Finding]:
        known, times = track.settings.get(call.place, (call.settings, 0))
        track.settings[call.place] = (call.settings, times + 1 if known == call.settings else 1)
        if known == call.settings or times < STEADY:
            return
        names = [key for key in call.settings if known.get(key) != call.settings[key]]
        what = ", ".join(f"{key} went from {known.get(key)} to {call.settings[key]}" for key in names)
        yield from self._change(evidence, f"{call.name} at {call.place}: {what}", call.place)

    def _factor(self, evidence: Evidence, call: _Call, count: int, track: _Track) -> Iterator[Finding]:
        if call.factor is None or len(track.factors) > CALLS_LIMIT:
            return
        factor, calls, times = track.factors.get(call.place, (call.factor, count, 0))
        same = _close(factor, call.factor, 1e-4)
        if times < 0:
            return
        if not same and times < STEADY:
            track.factors[call.place] = (call.factor, count, -1)  # it varies
            return
        track.factors[call.place] = (call.factor, count, times + 1 if same else 1)
        if same or calls != count:
            return
        text = f"{call.name} at {call.place} counts {call.factor:.6g} times in the sum, and {factor:.6g} times before"
        yield from self._change(evidence, text, call.place, ("C6", "C7"))

    def _rest(self, evidence: Evidence, losses: _Losses, track: _Track, tolerance: float) -> Iterator[Finding]:
        if track.whole < 0:
            return
        size = math.fsum(abs(call.value * (call.factor or 0.0)) for call in losses.calls)
        if losses.rest is not None and abs(losses.rest) <= tolerance * max(size, 1e-3):
            track.whole += 1
            return
        if track.whole < STEADY:
            track.whole = -1
            return
        track.whole = -1
        rest = "a part" if losses.rest is None else f"{losses.rest:.6g}"
        text = (
            f"backward started from {rest} that no call of a loss function accounts for; in {STEADY} checks and more "
            "before, such calls were all of it: another objective, or a term that the job's own code begins to add"
        )
        yield from self._change(evidence, text, None)

    def _change(
        self, evidence: Evidence, text: str, place: str | None, techniques: tuple[str, ...] = ("C6",)
    ) -> Iterator[Finding]:
        if place is not None and self._origins.approves(self.name, place):
            self._explained.add(self._origins.relative(place))
            return
        self._broken += 1
        yield from self._finding(evidence, "suspicious", techniques, text, place)

    def _finding(
        self,
        evidence: Evidence,
        outcome: Outcome,
        techniques: tuple[str, ...],
        text: str,
        path: str | None = None,
        call: _Call | None = None,
    ) -> Iterator[Finding]:
        self._given[outcome] += 1
        if self._given[outcome] > FINDINGS_LIMIT:
            return
        yield finding_from(
            self.name,
            outcome,
            f"step {evidence.step}: {text}",
            evidence,
            run=self._context.run,
            techniques=techniques,
            path=path,
            expected=None if call is None else f"{call.reference:.9g}",
            found=None if call is None else f"{call.value:.9g}",
        )


def _parse(raw: object) -> _Losses:
    try:
        losses = msgspec.convert(raw, _Losses, strict=False)
    except (msgspec.ValidationError, RecursionError) as error:
        raise MalformedEvidence(f"losses: {error}") from error
    if len(losses.calls) > CALLS_LIMIT:
        raise MalformedEvidence(f"losses: {len(losses.calls)} calls, limit {CALLS_LIMIT}")
    return losses


def _close(a: float, b: float, tolerance: float) -> bool:
    if not math.isfinite(a) or not math.isfinite(b):
        return True  # a loss that is not finite is a numeric matter
    return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-3)
