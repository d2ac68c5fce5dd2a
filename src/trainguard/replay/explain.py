"""Why: re-enacts hypotheses at the first bad step on the clean side until one gives the run's own bytes.

    cause = Search(run, clean, idle).at(ready, until)

Called only for a difference that two clean replays have proved; what it finds never makes one. A cause is

    reproduced   with these acts the step's fingerprints are those of the run, all of them, bit for bit
    consistent   the recorded values lie where this would put them, and no fingerprint says which of its kind it was
    none         nothing known gives what was recorded; where it entered is still said

Numbers are estimated from the run's recorded values (watch/lanes.py): two trials give the direction in which a number
moves them, the next ones its size; round numbers near it are then tried, and only equality counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from trainguard.replay import causes, compare
from trainguard.replay.causes import Hypothesis, Scalar, Scene
from trainguard.replay.committed import Account, Step

TRIALS_LIMIT = 600
SECONDS_LIMIT = 600.0
ITERATIONS = 4
CLOSE = 2e-2
"""Part of what differs that may be left over for a number to be worth rounding."""
SURE_WITHIN = 3.0
"""Times what is left over: how far from the estimate the number may lie."""
CONSISTENT = 2e-3
ROUND_WITHIN = 3e-3
"""A round number lies so near to an estimate that fits well."""
ALTERNATIVES = 8
"""Trials after the first that reproduces, to name what else would."""

ENTERED = {
    "modes": "a module's mode or rate was changed, in a way that is none of the known",
    "rng": "a random stream was seeded or drawn from, in a way that is none of the known",
    "before": "weights were edited between two steps, in a way that is none of the known",
    "raw": "batch, labels, forward or loss were other, in a way that is none of the known",
    "used": "gradients were changed between backward and update, in a way that is none of the known",
    "groups": "settings of the optimizer were changed",
    "state": "optimizer state or arithmetic was other, in a way that is none of the known",
    "weights": "the update or the weights after it were other, in a way that is none of the known",
    "buffers": "buffers were edited",
}


class Tried(Protocol):
    """What a trial gives (rerun.Trial)."""

    @property
    def account(self) -> Account: ...
    @property
    def failure(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


class Bench(Protocol):
    """A process in which steps can be tried (rerun.Ready)."""

    step: int

    def attempt(self, acts: Sequence[Mapping[str, Any]], until: int) -> Tried:
        """The steps from here to `until` with these acts."""

    def ask(self, what: str, **details: Any) -> Any:
        """What can be found without a trial."""


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Why a step is not what it should be."""

    kind: str
    """Stable name of the kind, or `unknown`."""
    words: str
    confidence: str
    """reproduced, consistent or none."""
    step: int
    """The step in which it acted."""
    value: float | None = None
    techniques: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    """What else gives the same bytes, or fits as well."""
    lasting: bool | None = None
    """Whether it acts in the step after too; None where that was not found out."""
    tried: int = 0
    """Trials made."""
    seconds: float = 0.0
    reason: str = ""
    """Why no more can be said."""


class Search:
    """One search for the cause of one difference."""

    def __init__(
        self, run: Account, clean: Account, idle: frozenset[int], *, seconds: float = SECONDS_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.run, self.clean, self.idle = run, clean, idle
        self.tried = 0
        self._clock = clock
        self._began = clock()
        self._limit = seconds
        self._close: list[tuple[float, Hypothesis, float]] = []
        """(left over, hypothesis, number) of what fits without giving the bytes."""

    @property
    def over(self) -> bool:
        """Whether the time or the trials are used up."""
        return self.tried >= TRIALS_LIMIT or self._clock() - self._began > self._limit

    def at(self, bench: Bench, until: int) -> Cause:
        """The cause, if it acted in the step that `bench` stands before and shows at step `until`."""
        number = bench.step
        control = self._attempt(bench, (), until)
        why = control.failure or self._unlike(control, number, until)
        why = why or self._unlike(
            self._attempt(bench, (), until), number, until
        )  # and again: one trial leaves no trace
        if why:
            return self._none(number, "", f"a trial without any act does not give what the replay gave: {why}")
        scene = self._scene(bench, control, until)
        if not scene.parted:
            return self._none(number, "", "the step is not among what both accounts have in full")
        found: list[tuple[Hypothesis, float | None]] = []
        stop_at = TRIALS_LIMIT
        for hypothesis in causes.hypotheses(scene):
            if self.tried >= stop_at or self._clock() - self._began > self._limit:
                break
            hit = self._test(bench, hypothesis, control, scene, until)
            if hit is not None:
                found.append((hypothesis, hit[0]))
                stop_at = min(stop_at, self.tried + ALTERNATIVES)
        if found:
            return self._reproduced(bench, found, number, until)
        return self._fitting(number, scene)

    # -- one hypothesis -----------------------------------------------------------------------------------------------

    def _test(
        self, bench: Bench, hypothesis: Hypothesis, control: Tried, scene: Scene, until: int
    ) -> tuple[float | None] | None:
        """(its number or None) where it reproduces the run; None where it does not."""
        if hypothesis.scalar is None:
            trial = self._attempt(bench, hypothesis.acts, until)
            return (None,) if self._is_it(trial, bench.step, until) else None
        for number in self._numbers(bench, hypothesis, hypothesis.scalar, scene, until):
            trial = self._attempt(bench, hypothesis.scalar.make(number), until)
            if self._is_it(trial, bench.step, until):
                return (number,)
        return None

    def _numbers(
        self, bench: Bench, hypothesis: Hypothesis, scalar: Scalar, scene: Scene, until: int
    ) -> Iterator[float]:
        """Numbers worth trying: round ones near what the recorded values say."""
        if not hypothesis.rows:
            return
        target = _joined(scene.run, hypothesis.rows)
        weights = _weights(scene, hypothesis.rows)

        def seen(x: float) -> list[float] | None:
            if scalar.neutral is not None and x == scalar.neutral:
                return _joined(scene.clean, hypothesis.rows)
            step = self._attempt(bench, scalar.make(x), until).account.steps.get(until)
            return None if step is None else _joined(step, hypothesis.rows)

        estimate, left = fit(seen, target, weights, scalar)
        if estimate is None or left > CLOSE:
            return
        self._close.append((left, hypothesis, estimate))
        yield from rounded(estimate, scalar, left)

    def _attempt(self, bench: Bench, acts: Sequence[Mapping[str, Any]], until: int) -> Tried:
        self.tried += 1
        return bench.attempt(acts, until)

    def _is_it(self, trial: Tried, first: int, until: int) -> bool:
        """Whether every link of every step from the trial's first is the run's."""
        return not trial.failure and self._equal(self.run, trial.account, first, until)

    def _equal(self, one: Account, two: Account, first: int, until: int) -> bool:
        seen = False
        for number in range(first, until + 1):
            ours, theirs = one.steps.get(number), two.steps.get(number)
            if ours is None:
                continue
            if theirs is None or any(True for _ in compare.differences(ours, theirs, (), self.idle)):
                return False
            seen = True
        return seen

    def _unlike(self, control: Tried, first: int, until: int) -> str:
        return "" if self._equal(self.clean, control.account, first, until) else "other fingerprints"

    def _scene(self, bench: Bench, control: Tried, until: int) -> Scene:
        run, clean = self.run.steps[until], control.account.steps[until]
        parted: dict[str, tuple[int, ...]] = {}
        for difference in compare.differences(run, clean, (), self.idle):
            was, now = run.vector(difference.link), clean.vector(difference.link)
            places = tuple(i for i, pair in enumerate(zip(was or (), now or (), strict=False)) if pair[0] != pair[1])
            parted[difference.link] = places
        return Scene(
            run=run, clean=clean, parted=parted, names=self.run.tensors.get(run.opt, ()), facts=dict(control.facts),
            settings=bench.ask("settings") or (), ask=bench.ask,
        )  # fmt: skip

    # -- what is concluded --------------------------------------------------------------------------------------------

    def _reproduced(
        self, bench: Bench, found: Sequence[tuple[Hypothesis, float | None]], number: int, until: int
    ) -> Cause:
        hypothesis, value = found[0]
        words = in_words(hypothesis, value)
        others = tuple(dict.fromkeys(text for each, x in found[1:] if (text := in_words(each, x)) != words))
        return Cause(
            kind=hypothesis.kind, words=words, confidence="reproduced", step=number, value=value,
            techniques=hypothesis.techniques, alternatives=others[:4],
            lasting=self._lasting(bench, hypothesis, value, until), tried=self.tried, seconds=self._spent(),
        )  # fmt: skip

    def _lasting(self, bench: Bench, hypothesis: Hypothesis, value: float | None, until: int) -> bool | None:
        """Whether the step after is the run's with the act once (False), or again (True); None where neither is."""
        after = self.run.steps.get(until + 1)
        if after is None or after.lean:
            return None
        acts = hypothesis.acts if hypothesis.scalar is None or value is None else hypothesis.scalar.make(value)
        for lasting in (False, True):
            trial = self._attempt(bench, [{**act, **({"lasting": True} if lasting else {})} for act in acts], until + 1)
            if self._is_it(trial, bench.step, until + 1):
                return lasting
        return None

    def _fitting(self, number: int, scene: Scene) -> Cause:
        """Nothing gave the bytes: what fits the recorded values, or where it entered."""
        close = sorted((each for each in self._close if each[0] < CONSISTENT), key=lambda each: each[0])
        if not close:
            return self._none(number, scene.first, "")
        texts = list(dict.fromkeys(in_words(hypothesis, x) for _, hypothesis, x in close))
        _, hypothesis, value = close[0]
        return Cause(
            kind=hypothesis.kind, words=texts[0], confidence="consistent", step=number, value=value,
            techniques=hypothesis.techniques, alternatives=tuple(texts[1:4]), tried=self.tried, seconds=self._spent(),
            reason="the values agree; no round number gives the same bytes",
        )  # fmt: skip

    def _none(self, number: int, link: str, reason: str) -> Cause:
        return Cause(
            kind="unknown", words=ENTERED.get(link, "not found out"), confidence="none", step=number, tried=self.tried,
            seconds=self._spent(), reason=reason,
        )  # fmt: skip

    def _spent(self) -> float:
        return round(self._clock() - self._began, 1)


def in_words(hypothesis: Hypothesis, value: float | None) -> str:
    """The hypothesis with its number."""
    return hypothesis.words.replace("{x}", "" if value is None else f"{value:.6g}")


def _joined(step: Step, rows: Sequence[str]) -> list[float]:
    return [value for row in rows for value in step.lanes.get(row, ())]


def _weights(scene: Scene, rows: Sequence[str]) -> list[float]:
    """So that rows of other sizes count alike, and elements in which nothing differs do not hide the rest."""
    out: list[float] = []
    for row in rows:
        pairs = list(zip(scene.run.lanes[row], scene.clean.lanes[row], strict=False))
        size = sum((a - b) ** 2 for a, b in pairs) ** 0.5
        out += [1.0 / size if size else 0.0] * len(scene.run.lanes[row])
    return out


def fit(
    seen: Callable[[float], list[float] | None], target: Sequence[float], weights: Sequence[float], scalar: Scalar
) -> tuple[float | None, float]:
    """The number at which `seen` comes nearest to `target`, and the part of the difference that is left over.

    Newton's method with differences: exact after one turn where the values are linear in the number. Values that are
    not finite, or of another length, end it.
    """
    one, two = scalar.probes
    left, right = seen(one), seen(two)
    if left is None or right is None:
        return None, 1.0
    whole = _size(_minus(target, left), weights) if scalar.neutral == one else None
    best: tuple[float | None, float] = (None, 1.0)
    a, b, fa, fb = one, two, left, right
    for _ in range(ITERATIONS):
        slope = [(y - x) / (b - a) for x, y in zip(fa, fb, strict=False)] if b != a else []
        gap = _minus(target, fb)
        steep = sum((w * s) ** 2 for w, s in zip(weights, slope, strict=False))
        if not slope or not steep or steep != steep:
            return best
        x = b + sum(w * w * s * g for w, s, g in zip(weights, slope, gap, strict=False)) / steep
        x = min(max(x, scalar.low), scalar.high)
        whole = whole or _size(_minus(target, fa), weights) or 1.0
        value = seen(x) if x != b else fb
        if value is None:
            return best
        over = _size(_minus(target, value), weights) / whole
        if over < best[1]:
            best = (x, over)
        if over < 1e-5 or x == b or over > 4 * best[1]:
            return best
        a, b, fa, fb = b, x, fb, value
        if best[1] > 0.7:
            return best
    return best


def _minus(one: Sequence[float], two: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, two, strict=False)]


def _size(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.sqrt(sum((v * w) ** 2 for v, w in zip(values, weights, strict=False)))


def rounded(estimate: float, scalar: Scalar, left: float = 0.0) -> list[float]:
    """Round numbers near an estimate, fewest digits first: itself, its multiple of the clean value, the inverse.

    left: the part of what differs that the estimate leaves over. In a step computed in 16 bits the values do not follow
    the number smoothly, and the number itself is then known no better than that.
    """
    found: list[float] = []
    within = max(ROUND_WITHIN, SURE_WITHIN * left)

    def add(value: float) -> None:
        near = abs(value - estimate) <= within * max(abs(estimate), 1e-12)
        if near and scalar.low <= value <= scalar.high and value not in found:
            found.append(value)

    for digits in range(1, 7):
        add(float(f"{estimate:.{digits}g}"))
        if scalar.base:
            add(scalar.base * float(f"{estimate / scalar.base:.{digits}g}"))
        if estimate and digits < 5:
            add(1.0 / float(f"{1.0 / estimate:.{digits}g}"))
        if estimate < 1.0:
            add(1.0 - float(f"{1.0 - estimate:.{digits}g}"))
    if abs(estimate) <= ROUND_WITHIN * abs(scalar.base or 1e-6):
        found.insert(0, 0.0)
    return found[:14]
