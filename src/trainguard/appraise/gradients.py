"""Check *gradients*: is the gradient that the optimizer used the one that backward left? (docs/checks/gradients.md)

Four relations, each over the sampled elements of all sampled tensors of one step:

1. *direction*: used = α · local with one α > 0 for all tensors. Where ranks reduce their gradients, `local` is the
   mean of what all ranks sampled at the same places in the same step.
2. *pattern*: α is 1 (nothing), 1/scale (a gradient scaler), or that of a clip; or every element is
   min(max(local, -c), c) (value clip). A clip by norm leaves the total norm at the same constant c whenever it bites,
   so c is learnt from the run: a norm above c, or a factor that leaves another norm, is a departure.
3. *hooks*: what hooks of the job on a tensor make of its gradient. From the first steps on it is the script's own
   habit, suspicious until approved, then explained; later, or against the direction, it is a departure.
4. *presence*: a tensor that had a gradient in every checked step does not lose it for good.
5. *cleared*: where a run clears its gradients before each step, no step uses the one of the step before once more.

What differs from the first checked steps on (one α per tensor, noise for privacy, gradients of another making) is the
script's own doing as far as this check can tell: it is reported blind with its reason, or suspicious, never held.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import Origins
from trainguard.appraise.ranks import Ranks
from trainguard.appraise.reduction import one_tensor, way_of
from trainguard.appraise.steps import Sample, Tensor, number, parse_sample
from trainguard.appraise.updates import PRECISION
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

FINDINGS_PER_KIND = 5
LEARN_STEPS = 5
"""Checked steps in which an oddity counts as the script's own habit."""
CONSTANT_TOLERANCE = 1e-3
"""Relative: how well norms agree after a clip by the same constant (docs/checks/gradients.md)."""
STEADY_STEPS = 20
LOST_STEPS = 5
PENDING_LIMIT = 256

Key = tuple[int | None, int]
Place = tuple[str, int, tuple[int, int, int]]
"""Name and size of a tensor, and where it was sampled: shards of different tensors never meet."""


@dataclass(frozen=True, slots=True)
class Relation:
    """How the used gradient relates to the one after backward."""

    kind: str
    """same, factor, value_clip, per_tensor, other, nothing."""
    factor: float = 1.0
    factors: tuple[float, ...] = ()
    constant: float = 0.0
    """The bound of a value clip."""
    tensor: str | None = None
    """The tensor that departs most."""
    note: str = ""


@dataclass(slots=True)
class Habits:
    """What one optimizer of one process has been doing so far."""

    checked: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    norms: list[float] = field(default_factory=list)
    """Norms after clipping, as long as the constant is being learnt."""
    clip: float | None = None
    varies: bool = False
    """The clip has no constant: it varied from the start."""
    unscaled: set[float] = field(default_factory=set)
    """Factors seen without a clip, such as 1/scale."""
    value_clip: float | None = None
    calls: Counter[int] = field(default_factory=Counter)
    more_calls: list[tuple[Evidence, int]] = field(default_factory=list)
    """Latest steps in a row before which backward ran oftener than usual, and how often."""
    present: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    lost: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)
    """Tensors whose gradient was once gone before the update."""
    kept: dict[int, bool] = field(default_factory=dict)
    """Step → whether a gradient of the step before was used again in it; the first STEADY_STEPS that tell."""
    hooked: Counter[str] = field(default_factory=Counter)
    """Place of a tensor hook → early checked steps in which it changed a gradient."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A step of one rank whose gradients were reduced over ranks."""

    evidence: Evidence
    sample: Sample


class Gradients:
    """Compares the gradient used with the gradient after backward, in every checked step."""

    name = "gradients"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._origins = Origins(context)
        self._habits: dict[Key, Habits] = {}
        self._held = 0
        self._broken = 0
        self._blind: Counter[str] = Counter()
        self._explained: set[str] = set()
        self._said: set[str] = set()
        self._given: Counter[tuple[int | None, str]] = Counter()
        self._ranks = Ranks()
        self._pending: dict[tuple[int, int, int], dict[int, _Waiting]] = {}
        self._order: deque[tuple[int, int, int]] = deque()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Judge one checked step; where ranks reduce, once all of them have reported it."""
        self._ranks.see(evidence)
        self._origins.see(evidence)
        value, other = evidence.body.get(self.name), evidence.body.get("optimizer")
        if evidence.kind != "step" or value is None:
            return
        try:
            value = _object(value)
            sample = parse_sample(other) if other is not None else None
            opt, index = _int(evidence, "opt"), _int(evidence, "index")
            habits = self._habits.setdefault((evidence.process, opt), Habits())
            found = list(self._step(evidence, value, sample, habits, (self._ranks.attempt(evidence), opt, index)))
        except MalformedEvidence as error:
            self._broken += 1
            found = [self._finding(evidence, "suspicious", ("G2",), f"malformed record: {error}")]
        yield from self._limited(found)

    def end(self) -> Iterator[Finding | LinkState]:
        """The balance."""
        for habits in self._habits.values():
            yield from self._limited(list(self._left_out(habits)))
        for waiting in self._pending.values():
            for _ in waiting.values():
                self._blind["reduced over ranks, and not all ranks recorded the same step"] += 1
        blind = [reason for reason, count in self._blind.items() if count > self._held or reason.startswith("!")]
        if not self._held and not self._broken and not blind:
            blind = list(self._blind) or ["no gradient was sampled right after backward"]
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(sorted(r.lstrip("!") for r in blind)),
            explained=tuple(sorted(self._explained)),
        )

    # -- one step ---------------------------------------------------------------------------------------------

    def _step(
        self,
        evidence: Evidence,
        value: dict[str, object],
        sample: Sample | None,
        habits: Habits,
        key: tuple[int, int, int],
    ) -> Iterator[Finding]:
        if sample is None or value.get("armed") is not True:
            return
        habits.checked += 1
        yield from self._presence(evidence, value, sample, habits)
        yield from self._taken(evidence, sample, habits)
        yield from self._calls(evidence, value, habits)
        yield from self._cleared(evidence, value, sample, habits)
        yield from self._hooked(evidence, value, sample, habits)
        tensors = [t for t in sample.tensors if t.local is not None and t.grad is not None]
        if not tensors:
            self._blind["the gradients do not come from backward on these tensors, or not before they are reduced"] += 1
            return
        relation = relate([(t, t.local or []) for t in tensors])
        turned = relation.kind != "same" and not (relation.kind == "factor" and relation.factor > 0)
        if turned and _world(value) > 1:
            yield from self._across(evidence, value, sample, key)
            return
        yield from self._judge(evidence, value, habits, relation)

    def _across(
        self, evidence: Evidence, value: dict[str, object], sample: Sample, key: tuple[int, int, int]
    ) -> Iterator[Finding]:
        """Keep the step until every rank has reported it, then compare with the mean over ranks."""
        world = _world(value)
        waiting = self._pending.setdefault(key, {})
        if not waiting:
            self._order.append(key)
        waiting[evidence.rank if evidence.rank is not None else len(waiting)] = _Waiting(evidence, sample)
        if len(waiting) == world:
            del self._pending[key]
            yield from self._reduced(list(waiting.values()))
        while len(self._pending) > PENDING_LIMIT:
            dropped = self._pending.pop(self._order.popleft(), None)
            if dropped:
                self._blind["reduced over ranks, and not all ranks recorded the same step"] += len(dropped)

    def _reduced(self, ranks: list[_Waiting]) -> Iterator[Finding]:
        means = mean_over_ranks([w.sample for w in ranks])
        if not means:
            self._blind["reduced over ranks, and the ranks sampled different places"] += len(ranks)
            return
        for each in ranks:
            pairs = [(t, means[t.name, t.numel, t.at]) for t in each.sample.tensors if (t.name, t.numel, t.at) in means]
            relation = relate(pairs)
            opt = _int(each.evidence, "opt")
            habits = self._habits.setdefault((each.evidence.process, opt), Habits())
            value = each.evidence.body.get(self.name)
            if relation.kind in ("other", "per_tensor"):
                explained = self._by_reduction(ranks, relation, habits)
                if explained is None:
                    continue
                relation = explained
            yield from self._judge(each.evidence, value if isinstance(value, dict) else {}, habits, relation)

    def _by_reduction(self, ranks: list[_Waiting], relation: Relation, habits: Habits) -> Relation | None:
        """The relation after a mean in low precision; None where the ranks' shares say it all (check *replicas*)."""
        names = [{(t.name, t.numel, t.at): t for t in each.sample.tensors if t.local and t.grad} for each in ranks]
        common = [key for key in names[0] if all(key in each for each in names)]
        locals_ = [[each[key].local or [] for key in common] for each in names]
        used = [[each[key].grad or [] for key in common] for each in names]
        way, found = way_of(locals_, used)
        early = habits.checked <= LEARN_STEPS
        habits.kinds["rounded"] += early and way == "rounded"
        if way == "mean" or (way == "rounded" and (early or habits.kinds["rounded"] >= 2)):
            exact = _close(found.factor, 1.0, max(4 * found.roundoff, 1e-6))
            return Relation("same") if exact else Relation("factor", found.factor)
        shared = way == "shares" or (way == "unlike" and one_tensor(locals_, used[0]) is not None)
        if way not in ("mean", "shares") and self._ranks.torch_hook("powerSGD_hook", "post_localSGD_hook"):
            self._blind["a communication hook of torch reduces approximately, or not at every step"] += 1
            return None
        if shared and all(each == used[0] for each in used):
            self._blind["how the ranks' gradients were reduced is for check replicas"] += 1
            return None
        return relation

    def _judge(
        self, evidence: Evidence, value: dict[str, object], habits: Habits, relation: Relation
    ) -> Iterator[Finding]:
        early = habits.checked <= LEARN_STEPS
        habit = relation.kind in habits.kinds
        if early:
            habits.kinds[relation.kind] += 1
        if relation.kind == "nothing":
            self._blind["the sampled gradients are all zero or not finite"] += 1
            return
        if relation.kind in ("same", "factor") and relation.factor > 0:
            problem = self._clip(value, habits, relation, early)
            if problem is None:
                self._held += 1
            else:
                self._broken += 1
                yield self._finding(evidence, "violated", ("C2", "C1"), problem, relation.tensor)
            return
        if relation.kind == "factor":
            self._broken += 1
            text = f"the gradient used is {relation.factor:.6g} times the one after backward: its direction was turned"
            yield self._finding(evidence, "violated", ("C1",), text, relation.tensor)
            return
        if relation.kind == "value_clip" and habits.value_clip in (None, relation.constant):
            habits.value_clip = relation.constant
            self._held += 1
            return
        negative = relation.kind == "per_tensor" and relation.factor < 0
        if not negative and habit and (early or habits.kinds[relation.kind] >= 2):
            self._blind[f"!{_HABITS[relation.kind]}, from the first steps on"] += 1
            return
        if early and not negative:
            return  # once may be chance; the second time it is a habit
        self._broken += 1
        techniques, text = _departure(relation)
        yield self._finding(evidence, "violated", techniques, text + relation.note, relation.tensor)

    # -- clip by norm -----------------------------------------------------------------------------------------

    def _clip(self, value: dict[str, object], habits: Habits, relation: Relation, early: bool) -> str | None:
        """What is wrong with the factor, given the norm that it left; None when nothing is."""
        norm = number(value.get("norm"))
        factor = relation.factor
        scale = number(value.get("scale"))
        unscaled = 1 / scale if scale else 1.0
        plain = _close(factor, 1.0, 1e-6) or _close(factor, unscaled, 1e-6) or _in(factor, habits.unscaled)
        if norm is None or not math.isfinite(norm) or value.get("sharded") is True:
            return None
        if habits.clip is not None:
            return self._against(habits, norm, factor, plain)
        if plain or habits.varies:
            return None
        habits.norms.append(norm)
        return self._learn(value, habits, factor, early)

    def _against(self, habits: Habits, norm: float, factor: float, plain: bool) -> str | None:
        clip = habits.clip or 0.0
        if norm > clip * (1 + CONSTANT_TOLERANCE):
            if plain:
                return f"gradient norm {norm:.6g} was used, but this run clips at {clip:.6g}: the clip did not act"
            return f"gradients were scaled to a norm of {norm:.6g}, but this run clips at {clip:.6g}"
        if plain or norm >= clip * (1 - CONSTANT_TOLERANCE):
            return None
        return (
            f"gradients were multiplied by {factor:.6g}, which leaves a norm of {norm:.6g}; "
            f"this run clips at {clip:.6g}, which would not have bitten or not so deep"
        )

    def _learn(self, value: dict[str, object], habits: Habits, factor: float, early: bool) -> str | None:
        norms = habits.norms
        if len(norms) >= 2 and _close(norms[-1], norms[-2], CONSTANT_TOLERANCE):
            habits.clip = norms[-1]
            return None
        summed = _close(factor, _world(value), 1e-6)  # ranks that add up their gradients and do not divide
        if early and (summed or (_power_of_two(factor) and factor < 0.1)):
            habits.unscaled.add(factor)
            norms.pop()
            return None
        if len(norms) < 3:
            return None
        habits.varies = early or habits.checked <= 3 * LEARN_STEPS
        if habits.varies:
            self._blind["!gradients are scaled by factors that follow no constant clip, from the first steps on"] += 1
            return None
        habits.norms = norms[-2:]
        return f"gradients were multiplied by {factor:.6g} after backward, and no clip constant explains it"

    # -- hooks on tensors -------------------------------------------------------------------------------------

    def _hooked(
        self, evidence: Evidence, value: dict[str, object], sample: Sample, habits: Habits
    ) -> Iterator[Finding]:
        """Gradients that a hook on their tensor changed before they were written."""
        for number_, places, before, after in _hooked_rows(value.get("hooked")):
            tensor = sample.tensors[number_].name if number_ < len(sample.tensors) else None
            place = places[0] if places else "a hook without code"
            if self._context.policy.approves(self.name, place):
                self._explained.add(place)
                continue
            habits.hooked[place] += habits.checked <= LEARN_STEPS
            dot = math.fsum(x * y for x, y in zip(before, after, strict=True))
            turned = dot < 0
            known = self._origins.standing(place) == "approved"
            habit = (known or habits.hooked[place] >= min(2, habits.checked)) and not turned
            if habit and place in self._said:
                continue
            self._said.add(place)
            self._broken += 1
            effect = "turned its direction" if turned else "changed it"
            text = f"a hook on the tensor ({', '.join(places[:3])}) {effect} before the gradient was written"
            if habit:
                since = "in the approved code" if known else "as from the first steps on"
                text += f', {since}; approve it with [[approve]] check = "{self.name}" place = "{place}"'
            yield finding_from(
                self.name,
                "suspicious" if habit else "violated",
                f"step {evidence.step}: {tensor or 'a tensor'}: {text}",
                evidence,
                run=self._context.run,
                techniques=("B5", "C1"),
                tensor=tensor,
                path=place,
                expected=f"{before[0]:.9g}" if before else None,
                found=f"{after[0]:.9g}" if after else None,
            )

    # -- presence ---------------------------------------------------------------------------------------------

    def _taken(self, evidence: Evidence, sample: Sample, habits: Habits) -> Iterator[Finding]:
        """Backward wrote a gradient, and it was gone before the update: not a part of the model that lay idle."""
        for tensor in sample.tensors:
            if tensor.local is None or tensor.grad is not None or tensor.grad_reason != "none":
                continue
            if habits.checked <= LEARN_STEPS or tensor.name in habits.taken:
                habits.taken.add(tensor.name)
                continue
            habits.taken.add(tensor.name)
            self._broken += 1
            text = "backward wrote a gradient for this tensor, and it was taken away before the update"
            yield self._finding(evidence, "suspicious", ("C5", "B5"), text, tensor.name)

    def _presence(
        self, evidence: Evidence, value: dict[str, object], sample: Sample, habits: Habits
    ) -> Iterator[Finding]:
        zero = value.get("zero")
        names = set(zero) if isinstance(zero, list) and all(isinstance(z, str) for z in zero) else set()
        if "norm" not in value:
            names |= {t.name for t in sample.tensors if t.grad is not None and not any(t.grad) and _dense(t)}
        else:
            for name in habits.missing.keys() - names:
                habits.missing[name] = 0
        for tensor in sample.tensors:
            if tensor.grad is not None and any(tensor.grad):
                habits.present[tensor.name] += 1
                habits.missing[tensor.name] = 0
        for name in names:
            habits.missing[name] += 1
            if habits.missing[name] < LOST_STEPS or name in habits.lost or habits.checked < STEADY_STEPS:
                continue
            if habits.present[name] < 3:
                continue
            habits.lost.add(name)
            self._broken += 1
            rows = habits.missing[name]
            text = f"its gradient is exactly zero in {rows} checked steps in a row, and was not before"
            yield self._finding(evidence, "suspicious", ("C5", "B5"), text, name)

    def _calls(self, evidence: Evidence, value: dict[str, object], habits: Habits) -> Iterator[Finding]:
        """Backward ran more often before this step than ever before: were steps left out?"""
        calls = value.get("calls")
        if not isinstance(calls, list) or not calls or not all(isinstance(c, int) and c >= 0 for c in calls):
            return
        most = max(calls)
        usual = habits.calls.most_common(1)[0][0] if habits.calls else most
        steady = len(habits.calls) == 1 and habits.calls[usual] >= STEADY_STEPS
        if steady and most > usual and most % usual == 0 and min(calls) == most and "scale" not in value:
            if habits.more_calls and habits.more_calls[-1][1] != most:
                yield from self._left_out(habits)
            habits.more_calls.append((evidence, most))
            if len(habits.more_calls) >= LEARN_STEPS:  # from here on: a schedule of accumulation
                habits.calls, habits.more_calls = Counter({most: LEARN_STEPS}), []
            return
        yield from self._left_out(habits)
        habits.calls[most] += 1

    def _left_out(self, habits: Habits) -> Iterator[Finding]:
        """What the steps in a row that are over now come to."""
        usual = habits.calls.most_common(1)[0][0] if habits.calls else 1
        waiting, habits.more_calls = habits.more_calls, []
        for evidence, most in waiting:
            self._broken += 1
            text = (
                f"backward ran {most} times before this step, and {usual} times before every other one: "
                f"{most // usual - 1} update(s) were left out"
            )
            yield self._finding(evidence, "suspicious", ("C9", "C7"), text)

    def _cleared(
        self, evidence: Evidence, value: dict[str, object], sample: Sample, habits: Habits
    ) -> Iterator[Finding]:
        """A gradient of the step before is in this one, in a run that clears them: a step counts twice."""
        kept = value.get("kept")
        if not isinstance(kept, list):
            return
        names = [sample.tensors[i].name for i in kept if isinstance(i, int) and 0 <= i < len(sample.tensors)]
        index = _int(evidence, "index")
        if len(habits.kept) < STEADY_STEPS:
            habits.kept[index] = bool(names)
            if len(habits.kept) == STEADY_STEPS and _irregular(habits.kept):
                self._broken += 1
                count = sum(habits.kept.values())
                text = (
                    f"in {count} of the first {STEADY_STEPS} checked steps, in no regular turn, "
                    "the gradient of the step before was not cleared and was used again"
                )
                yield self._finding(evidence, "suspicious", ("C7", "C9"), text)
        elif names and not any(habits.kept.values()):
            self._broken += 1
            text = "the gradient of the step before was not cleared and was used again; until then it always was"
            yield self._finding(evidence, "suspicious", ("C7", "C9"), text, names[0])

    # -- findings ---------------------------------------------------------------------------------------------

    def _finding(
        self, evidence: Evidence, outcome: Outcome, techniques: tuple[str, ...], text: str, tensor: str | None = None
    ) -> Finding:
        where = f"step {evidence.step}: " if tensor is None else f"step {evidence.step}: {tensor}: "
        return finding_from(
            self.name, outcome, where + text, evidence, run=self._context.run, techniques=techniques, tensor=tensor
        )

    def _limited(self, found: list[Finding]) -> Iterator[Finding]:
        for finding in found:
            kind = (finding.subject.rank, finding.techniques[0])
            self._given[kind] += 1
            if self._given[kind] <= FINDINGS_PER_KIND:
                yield finding


_HABITS = {
    "per_tensor": "every tensor's gradient is scaled by a factor of its own",
    "other": "gradients are changed element by element after backward",
    "value_clip": "gradients are clipped by varying values",
}


def _irregular(kept: dict[int, bool]) -> bool:
    """Whether steps of both kinds follow no period that the steps seen could show."""
    if len(set(kept.values())) < 2:
        return False
    return all(
        len({(index % period, each) for index, each in kept.items()}) > len({index % period for index in kept})
        for period in range(2, STEADY_STEPS // 2 + 1)
    )


def _hooked_rows(value: object) -> Iterator[tuple[int, list[str], list[float], list[float]]]:
    """The rows of `hooked`; raises MalformedEvidence for one that is not as its specification says."""
    row: Any
    for row in value if isinstance(value, list) else [] if value is None else [value]:
        fits = isinstance(row, list) and len(row) == 4 and isinstance(row[0], int) and row[0] >= 0
        fits = fits and all(isinstance(part, list) for part in row[1:]) and len(row[2]) == len(row[3])
        fits = fits and all(isinstance(place, str) for place in row[1])
        fits = fits and all(isinstance(x, int | float) for x in (*row[2], *row[3]))
        if not fits:
            raise MalformedEvidence(f"hooked: expected [tensor, places, before, after], found {str(row)[:80]}")
        yield row[0], row[1], row[2], row[3]


def relate(pairs: list[tuple[Tensor, list[float]]]) -> Relation:
    """How the used gradients relate to `local` ones (tensor, local values)."""
    kept = [
        (t, local, t.grad)
        for t, local in pairs
        if t.grad is not None and _usable(t.grad, local) and t.dtype in PRECISION
    ]
    if not kept:
        return Relation("nothing")
    if all(grad == local for _, local, grad in kept):
        return Relation("same")
    factors = [_factor(local, grad) for _, local, grad in kept]
    fits = [_fits(t, local, grad, f) for (t, local, grad), f in zip(kept, factors, strict=True)]
    bound = _value_bound([(local, grad) for _, local, grad in kept])
    if not all(fits):
        worst = kept[fits.index(False)][0].name
        if bound is not None:
            return Relation("value_clip", constant=bound)
        return Relation("other", factors=tuple(factors), tensor=worst, note=_cosine_note(kept[fits.index(False)]))
    weights = [math.fsum(v * v for v in local) for _, local, _ in kept]
    common = math.fsum(f * w for f, w in zip(factors, weights, strict=True)) / math.fsum(weights)
    same = [_fits(t, local, grad, common) for t, local, grad in kept]
    if all(same):
        return Relation("factor", common, tuple(factors), tensor=kept[0][0].name if common <= 0 else None)
    if bound is not None:
        return Relation("value_clip", constant=bound)
    ordered = sorted(factors)
    middle = ordered[len(ordered) // 2]
    odd = max(range(len(kept)), key=lambda i: abs(factors[i] - middle))
    if factors[odd] < 0 or sum(f < 0 for f in factors):
        odd = next(i for i, f in enumerate(factors) if f < 0)
    return Relation("per_tensor", factors[odd], tuple(factors), tensor=kept[odd][0].name)


def mean_over_ranks(samples: list[Sample]) -> dict[Place, list[float]]:
    """Name and size of a tensor, and place in it → mean of the ranks' local gradients, where all sampled the same."""
    places = [{(t.name, t.numel, t.at): t.local for t in s.tensors if t.local is not None} for s in samples]
    means: dict[Place, list[float]] = {}
    for key, first in places[0].items():
        others = [place.get(key) for place in places]
        if any(other is None or len(other) != len(first) for other in others):
            continue
        means[key] = [math.fsum(values) / len(values) for values in zip(*(o or [] for o in others), strict=True)]
    return means


def _departure(relation: Relation) -> tuple[tuple[str, ...], str]:
    if relation.kind == "per_tensor":
        if relation.factor < 0:
            return (
                "C1",
                "C2",
            ), f"this tensor's gradient was multiplied by {relation.factor:.6g}: its direction was turned"
        return ("C2", "C1"), f"this tensor's gradient was multiplied by {relation.factor:.6g}, others were not"
    if relation.kind == "value_clip":
        return ("C2",), f"gradients were clipped at ±{relation.constant:.6g}, as in no step before"
    return ("C1", "C2"), "the gradient used is not the one after backward: something was added to it"


def _usable(grad: list[float], local: list[float]) -> bool:
    if len(grad) != len(local) or not all(map(math.isfinite, grad)) or not all(map(math.isfinite, local)):
        return False
    return any(local) or any(grad)


def _factor(local: list[float], grad: list[float]) -> float:
    bottom = math.fsum(v * v for v in local)
    return math.fsum(a * b for a, b in zip(local, grad, strict=True)) / bottom if bottom > 0 else math.nan


def _fits(tensor: Tensor, local: list[float], grad: list[float], factor: float) -> bool:
    """Whether grad = factor · local up to the rounding of their type, and of a float32 mean over ranks."""
    if not math.isfinite(factor):
        return False
    roundoff = 2.0 ** -min(PRECISION[tensor.dtype], 24)
    top = max(map(abs, local)) * abs(factor)
    for before, after in zip(local, grad, strict=True):
        if abs(after - factor * before) > 16 * roundoff * (abs(after) + abs(factor * before)) + 4 * roundoff * top:
            return False
    return True


def _value_bound(pairs: list[tuple[list[float], list[float]]]) -> float | None:
    """The c for which every used element is its local one limited to ±c; None when there is none."""
    bound = max((max(map(abs, grad)) for _, grad in pairs), default=0.0)
    for local, grad in pairs:
        for before, after in zip(local, grad, strict=True):
            if after != before and (abs(after) != bound or abs(before) < bound or after * before < 0):
                return None
    return bound


def _cosine_note(kept: tuple[Tensor, list[float], list[float]]) -> str:
    _, local, grad = kept
    lengths = math.hypot(*local) * math.hypot(*grad)
    if not lengths:
        return ""
    return f" (cosine {math.fsum(a * b for a, b in zip(local, grad, strict=True)) / lengths:.4f})"


def _dense(tensor: Tensor) -> bool:
    return tensor.numel <= 64 or tensor.local is None or any(tensor.local)


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def _in(factor: float, known: set[float]) -> bool:
    return any(_close(factor, each * 2.0**shift, 1e-6) for each in known for shift in range(-8, 9))


def _power_of_two(value: float) -> bool:
    return value > 0 and _close(math.log2(value), round(math.log2(value)), 1e-7)


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise MalformedEvidence(f"gradients: expected an object, found {type(value).__name__}")
    return value


def _world(value: dict[str, object]) -> int:
    world = value.get("world")
    return world if isinstance(world, int) and 1 <= world <= 1 << 20 else 1


def _int(evidence: Evidence, name: str) -> int:
    value = evidence.body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MalformedEvidence(f"step frame: {name}: expected a number from 0, found {str(value)[:40]!r}")
    return value
