"""Check *truth*: is the gradient the derivative of the loss that was computed? (docs/checks/truth.md)

The watch replays a step in double precision and moves all weights a little along one secret direction. For each such
step it says by how much the loss should change by the gradient, and by how much it did, along the direction and against
it. This check holds both against each other:

1. Slopes along and against the direction that differ mean a kink: nothing can be said.
2. The mean slope must be ⟨g, d⟩ within TOLERANCE · √tensors. Where the loss has fallen to a small share of what it
   was, single precision's rounding is that much larger beside its gradient (p - 1 of a softmax, prediction - target):
   the tolerance grows with it, and where that part has grown past HIDDEN, a disagreement says nothing.
3. A disagreement counts once a second step, another batch, confirms it.
4. Where the job's own autograd functions or hooks stand in the graph, their backward need not be a derivative
   (straight-through estimators, reversed gradients). There a disagreement from the first check on is the script's own
   doing as far as this check can tell, and blind; one that begins later is suspicious.
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

TOLERANCE = {False: 1e-2, True: 3e-1}
"""Disagreement over √tensors, by whether less than single precision was used (docs/checks/truth.md)."""
ROUNDING = 64 * 2.0**-24
"""Part of the tolerance that grows with largest loss seen / loss now; about 20 · 2**-24 was measured."""
HIDDEN = 3e-1
SMOOTH = 0.25
LOSS_TOLERANCE = {False: 1e-3, True: 5e-2}
FINDINGS_LIMIT = 8
NAME_LIMIT = 512


class _Value(msgspec.Struct):
    tensors: int
    expected: float
    plus: float
    minus: float
    loss: tuple[float, float]
    low: bool
    odd: list[tuple[str, float, float]] = []
    sources: list[tuple[str, str]] = []
    hooks: list[str] = []
    seeds: list[tuple[float | None, str]] = []
    left_out: dict[str, int] = {}


@dataclass(slots=True)
class _Track:
    """One optimizer of one process."""

    held: int = 0
    largest: float = 0.0
    """Largest loss of a step that was put on tape, without its sign."""
    waiting: tuple[Evidence, _Value] | None = None
    """A disagreement that no second step has confirmed yet."""
    seeds: Counter[float] = field(default_factory=Counter)
    habit: bool = False


class Truth:
    """See the module."""

    name = "truth"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._origins = Origins(context)
        self._tracks: dict[tuple[int | None, int], _Track] = {}
        self._held = 0
        self._broken = 0
        self._given = 0
        self._blind: Counter[str] = Counter()
        self._explained: set[str] = set()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        self._origins.see(evidence)
        value = evidence.body.get(self.name) if evidence.kind == "step" else None
        if value is None:
            return
        try:
            yield from self._step(evidence, value)
        except MalformedEvidence as error:
            self._broken += 1
            yield from self._finding(evidence, "suspicious", ("G2",), f"malformed record: {error}")

    def end(self) -> Iterator[Finding | LinkState]:
        for track in self._tracks.values():
            if track.waiting is not None:
                self._broken += 1
                evidence, value = track.waiting
                text = f"{_disagreement(value)}; no second step confirmed it before the run ended"
                yield from self._finding(evidence, "suspicious", ("C1", "C7"), text, value)
        blind = [reason for reason, _ in self._blind.most_common(8)] if not self._held else []
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

    # -- one step ---------------------------------------------------------------------------------------------

    def _step(self, evidence: Evidence, raw: object) -> Iterator[Finding]:
        if isinstance(raw, dict) and isinstance(raw.get("blind"), str):
            self._blind[raw["blind"][:NAME_LIMIT]] += 1
            return
        value = parse_value(raw)
        opt = evidence.body.get("opt")
        track = self._tracks.setdefault((evidence.process, opt if isinstance(opt, int) else -1), _Track())
        yield from self._seeds(evidence, value, track)
        reason = unusable(value)
        if reason is not None:
            self._blind[reason] += 1
            return
        track.largest = max(track.largest, abs(value.loss[1]))
        rounding = rounding_of(value, track.largest)
        hidden = rounding > HIDDEN
        own = self._own(value)
        if agrees(value, 0.0 if hidden else rounding):
            self._held += 1
            track.held += 1
            return
        if hidden:
            self._blind["the loss has become so small that rounding hides what its gradient is"] += 1
            return
        approved = [place for place in own if self._origins.approves(self.name, place)]
        if approved:
            self._explained.update(self._origins.relative(place) for place in approved)
            return
        planted = [place for place in own if self._origins.standing(place) in ("planted", "generated")]
        if own and not planted and (track.habit or not track.held):
            track.habit = True
            self._blind[f"the job's own backward code gives another gradient than the derivative ({own[0]})"] += 1
            return
        yield from self._departs(evidence, value, track, own, planted)

    def _departs(
        self, evidence: Evidence, value: _Value, track: _Track, own: list[str], planted: list[str]
    ) -> Iterator[Finding]:
        first = track.waiting
        if first is None:
            track.waiting = (evidence, value)
            return
        track.waiting = None
        self._broken += 1
        text = f"{_disagreement(value)}; so it was in step {first[0].step}"
        outcome: Outcome = "violated"
        if own:
            place = (planted or own)[0]
            text += f". Backward code at {place}, in {whose(self._origins.standing(place))}, takes part"
            outcome = "violated" if planted else "suspicious"
        path = (planted or own)[0] if own else None
        yield from self._finding(evidence, outcome, ("C1", "B3"), text, value, path=path)

    def _seeds(self, evidence: Evidence, value: _Value, track: _Track) -> Iterator[Finding]:
        """Backward was given a gradient that it was not given before."""
        given = [(number, place) for number, place in value.seeds if number is not None]
        now = given[0][0] if given else 1.0
        usual = track.seeds.most_common(1)[0][0] if track.seeds else None
        track.seeds[now] += 1
        if not given or usual == now or self._origins.approves(self.name, given[0][1]):
            return
        place = given[0][1]
        standing = self._origins.standing(place)
        strange = standing in ("planted", "generated")
        if usual is None and not strange:
            return
        self._broken += 1
        before = "" if usual is None else f", and {usual:.6g} before"
        text = f"backward was started with the gradient {now:.6g}{before}, at {place}, in {whose(standing)}"
        outcome: Outcome = "violated" if strange else "suspicious"
        yield from self._finding(evidence, outcome, ("C1", "C7"), text, path=place)

    def _own(self, value: _Value) -> list[str]:
        """Places of backward code that is neither torch's nor an installed package's."""
        places = [place for _, place in value.sources] + value.hooks
        return [p for p in places if p != "?" and self._origins.standing(p) not in ("library", "guard", "cache")]

    def _finding(
        self,
        evidence: Evidence,
        outcome: Outcome,
        techniques: tuple[str, ...],
        text: str,
        value: _Value | None = None,
        path: str | None = None,
    ) -> Iterator[Finding]:
        self._given += 1
        if self._given > FINDINGS_LIMIT:
            return
        odd = value.odd[0] if value is not None and value.odd else None
        expected, found = (odd[1], odd[2]) if odd else (value.expected, _slope(value)) if value else (None, None)
        yield finding_from(
            self.name,
            outcome,
            f"step {evidence.step}: {text}",
            evidence,
            run=self._context.run,
            techniques=techniques,
            tensor=odd[0][:NAME_LIMIT] if odd else None,
            path=path,
            expected=None if expected is None else f"{expected:.6g}",
            found=None if found is None else f"{found:.6g}",
        )


def parse_value(raw: object) -> _Value:
    """The value of link *truth*; raises MalformedEvidence."""
    try:
        value = msgspec.convert(raw, _Value, strict=False)
    except (msgspec.ValidationError, RecursionError) as error:
        raise MalformedEvidence(f"truth: {error}") from error
    numbers = (value.expected, value.plus, value.minus, *value.loss)
    if not 0 < value.tensors <= 1 << 20 or not all(map(math.isfinite, numbers)):
        raise MalformedEvidence(f"truth: {value.tensors} tensors, slopes {value.plus!r} and {value.minus!r}")
    return value


def unusable(value: _Value) -> str | None:
    """Why nothing follows from the numbers, or None."""
    seen, replayed = value.loss
    if abs(seen - replayed) > LOSS_TOLERANCE[value.low] * max(abs(seen), abs(replayed), 1e-3):
        return "the forward pass, run again, gives another loss"
    if abs(value.plus - value.minus) > SMOOTH * TOLERANCE[value.low] * math.sqrt(value.tensors):
        return "the loss has a kink at the weights of the step"
    return None


def rounding_of(value: _Value, largest: float) -> float:
    """What rounding adds to the tolerance, over √tensors; largest: the largest loss seen."""
    loss = abs(value.loss[1])
    fallen = largest / loss if loss else math.inf
    return ROUNDING * fallen if fallen > 1 else 0.0


def agrees(value: _Value, rounding: float) -> bool:
    """Whether the loss changes as the gradient says."""
    return abs(_slope(value) - value.expected) <= (TOLERANCE[value.low] + rounding) * math.sqrt(value.tensors)


def _slope(value: _Value) -> float:
    return (value.plus + value.minus) / 2


def _disagreement(value: _Value) -> str:
    if value.odd:
        names = ", ".join(name[:80] for name, _, _ in value.odd[:3])
        more = f" and {len(value.odd) - 3} more" if len(value.odd) > 3 else ""
        _, expected, found = value.odd[0]
        which = f"the gradient of {names}{more}"
    else:
        expected, found, which = value.expected, _slope(value), "the gradient"
    return (
        f"{which} is not the derivative of the loss: moving the weights changes it by {found:.6g} "
        f"per unit, and by the gradient it should be {expected:.6g}"
    )
