"""Check *optimizer*: is every update what the optimizer's own formula gives? (docs/checks/optimizer.md)

Update truth: from the sampled weight, gradient, state and hyper-parameters before a step, the state and the weight
afterwards are recomputed in float64 (updates.py) and compared. A departure is never explained away; the message says
what it amounts to, found by trying: the update skipped, turned round, scaled (effective learning rate), another
beta, epsilon or weight decay, bias correction left out, noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainguard.appraise import shadow
from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.steps import Sample, Shadow, Tensor, finite, parse_sample
from trainguard.appraise.updates import (
    PRECISION,
    REFERENCES,
    Case,
    Expected,
    Reference,
    Values,
    spacing,
)
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState

FINDINGS_PER_KIND = 5
"""Findings given per rank and technique; further ones are only counted."""

RATIO_SPACINGS = 8.0
"""Elements whose change is at least this many units in the last place take part in the effective learning rate."""

SLACK = 32.0
"""A hypothesis explains a departure when it comes this many times the tolerance close: fitted values are not exact."""

NEGLIGIBLE = {"float64": 2.0**-1020, "float32": 2.0**-123, "bfloat16": 2.0**-123, "float16": 2.0**-21}
"""What may be zero instead: kernels may flush what is below the smallest normal number of the type."""

Key = tuple[int | None, int]
"""Process and optimizer."""


@dataclass(frozen=True, slots=True)
class Departure:
    """One tensor whose update is not what it should be."""

    tensor: Tensor | None
    """None for a shadow, which names it in `name`."""
    techniques: tuple[str, ...]
    text: str
    expected: str
    found: str
    name: str = ""

    @property
    def called(self) -> str:
        """The tensor's name."""
        return self.tensor.name if self.tensor is not None else self.name


class Optimizer:
    """Recomputes the sampled updates of every optimizer."""

    name = "optimizer"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ulp = context.policy.update_tolerance_ulp
        self._held = 0
        self._broken = 0
        self._blind: Counter[str] = Counter()
        self._given: Counter[tuple[int | None, str]] = Counter()
        self._counters: dict[tuple[Key, int], tuple[int, float]] = {}
        """Optimizer's tensor → its step and the step counter in its state, when last sampled."""
        self._without: dict[Key, int] = {}
        """How many tensors had no gradient when last counted."""
        self._at_times: set[Key] = set()
        """Optimizers some of whose tensors have a gradient in some steps only: their counters may lag."""
        self._sources = shadow.Sources()
        self._waiting: Counter[str] = Counter()
        """Class without a reference → steps of it that were sampled, until one was repeated."""

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Recompute one checked step."""
        value = evidence.body.get(self.name)
        if evidence.kind == "code":
            self._sources.see(evidence.body)
        if evidence.kind != "step" or value is None:
            return
        try:
            sample = parse_sample(value)
            departures = list(self._departures(evidence, sample))
        except MalformedEvidence as error:
            self._broken += 1
            yield from self._give(evidence, ("G2",), f"malformed record: {error}", None, "suspicious")
            return
        if departures and sample.shared:
            self._blind[f"{sample.kind}: weights in shared memory: other processes write to them"] += 1
        elif departures:
            self._broken += 1
            yield from self._report(evidence, sample, departures)

    def end(self) -> Iterator[Finding | LinkState]:
        """The balance."""
        for kind in self._waiting:
            self._blind[f"{kind}: no reference for its update, and none of its steps was repeated"] += 1
        blind = tuple(sorted(self._blind))
        if not self._held and not self._broken and not blind:
            blind = ("no optimizer step was sampled",)
        yield LinkState(link=self.name, held=self._held, broken=self._broken, blind=blind)

    # -- one step ---------------------------------------------------------------------------------------------

    def _departures(self, evidence: Evidence, sample: Sample) -> Iterator[Departure]:
        for reason, count in list(sample.left_out.items())[:8]:
            self._blind[f"{sample.kind}: {count} tensors cannot be sampled: {reason}"] += 1
        reference = reference_of(sample)
        if sample.shadow is not None:
            yield from self._shadow(sample, sample.shadow)
        if reference is None:
            if sample.shadow is None and sample.kind not in self._sources.repeated:
                self._waiting[sample.kind] += 1
            return
        checked, passed, good = 0, 0, []
        for tensor in sample.tensors:
            if tensor.dtype not in PRECISION or tensor.grad_reason not in (None, "none"):
                if sample.shadow is None:
                    reason = tensor.grad_reason or tensor.dtype
                    self._blind[f"{sample.kind}: {reason} gradients are not recomputed"] += 1
                continue
            case = case_of(tensor, sample)
            departure = check_tensor(tensor, case, reference, sample, self._ulp)
            checked += 1
            passed += departure is None
            if departure is not None:
                yield departure
            elif case is not None:
                good.append((tensor, case))
        lag = self._lag(evidence, sample)
        if lag is not None:
            yield lag
        ratio = learning_rate_off(good, reference)
        if ratio is not None:
            yield ratio
        elif checked and passed == checked and lag is None:
            self._held += 1

    def _shadow(self, sample: Sample, found: Shadow) -> Iterator[Departure]:
        """Compare the step with what a twin of the optimizer made of it."""
        self._sources.repeated.add(sample.kind)
        self._waiting.pop(sample.kind, None)
        reason = found.off or self._sources.unknown(found)
        if reason is not None:
            self._blind[f"{sample.kind}: its step could not be repeated: {reason}"] += 1
            return
        told = shadow.compare(sample, found)
        if told is None:
            self._held += 1
        elif isinstance(told, str):
            self._blind[f"{sample.kind}: {told}"] += 1
        else:
            yield Departure(None, told.techniques, told.text, told.expected, told.found, told.name)

    def _lag(self, evidence: Evidence, sample: Sample) -> Departure | None:
        """Do the step counters in the state lag behind the steps seen? Only when all sampled tensors agree."""
        opt, index = evidence.body.get("opt"), evidence.body.get("index")
        if not isinstance(opt, int) or not isinstance(index, int) or "found_inf" in sample.extra:
            return None
        self._absences((evidence.process, opt), evidence, sample)
        lags: list[float] = []
        example: tuple[Tensor, float, float] | None = None
        for tensor in sample.tensors:
            before, after = tensor.state.get("step"), tensor.state_after.get("step")
            key = ((evidence.process, opt), tensor.position)
            last = self._counters.get(key)
            if after:
                self._counters[key] = (index, after[0])
            if last is None or not before or tensor.grad is None:
                continue
            due = last[1] + (index - 1 - last[0])
            lags.append(due - before[0])
            example = (tensor, due, before[0])
        if example is None or len(set(lags)) != 1 or lags[0] < 1 or (evidence.process, opt) in self._at_times:
            return None
        tensor, due, found = example
        return Departure(
            tensor,
            ("C9",),
            f"{lags[0]:g} of the optimizer's steps since the last look made no update of any sampled tensor",
            f"step counter {due:g}",
            f"step counter {found:g}",
        )

    def _absences(self, key: Key, evidence: Evidence, sample: Sample) -> None:
        """Note when a tensor that was updated before has no gradient, or their number changes."""
        if any(tensor.grad_reason == "none" and tensor.state.get("step") for tensor in sample.tensors):
            self._at_times.add(key)
        settings = evidence.body.get("hyperparameters")
        census = settings.get("census") if isinstance(settings, dict) else None
        counts = census.get("counts") if isinstance(census, dict) else None
        if isinstance(counts, list) and len(counts) == 3 and isinstance(counts[1], int):
            if self._without.setdefault(key, counts[1]) != counts[1]:
                self._at_times.add(key)
            self._without[key] = counts[1]

    # -- findings ---------------------------------------------------------------------------------------------

    def _report(self, evidence: Evidence, sample: Sample, departures: list[Departure]) -> Iterator[Finding]:
        worst = departures[0]
        tensors = len(sample.tensors)
        short = sample.kind.rsplit(".", 1)[-1]
        message = f"step {evidence.step}: {worst.called}: {worst.text} ({short}"
        shared = tensors > 1 and worst.tensor is not None
        message += f"; {len(departures)} of {tensors} sampled tensors)" if shared else ")"
        techniques = worst.techniques
        if len(departures) == 1 and tensors > 1 and techniques[0] == "C9" and "skipped" in worst.text:
            techniques = ("C5", "C9")
        yield from self._give(evidence, techniques, message, worst)

    def _give(
        self,
        evidence: Evidence,
        techniques: tuple[str, ...],
        message: str,
        departure: Departure | None,
        outcome: str = "violated",
    ) -> Iterator[Finding]:
        kind = (evidence.rank, techniques[0])
        self._given[kind] += 1
        if self._given[kind] > FINDINGS_PER_KIND:
            return
        yield finding_from(
            self.name,
            "violated" if outcome == "violated" else "suspicious",
            message,
            evidence,
            run=self._context.run,
            techniques=techniques,
            tensor=departure.called if departure else None,
            expected=departure.expected if departure else None,
            found=departure.found if departure else None,
        )


def reference_of(sample: Sample) -> Reference | None:
    """The reference for this optimizer, or None where it has none or its step() is not torch's."""
    if sample.kind in REFERENCES:
        return REFERENCES[sample.kind]
    if sample.base in REFERENCES and sample.step_of.startswith("torch.optim."):
        return REFERENCES[sample.base]
    return None


def case_of(tensor: Tensor, sample: Sample) -> Case | None:
    """The sampled elements as a Case; None where there was no gradient."""
    if tensor.grad is None:
        return None
    hyper = sample.hyper.get(tensor.group)
    if hyper is None:
        raise MalformedEvidence(f"optimizer: {tensor.name[:80]}: no hyper-parameters of group {tensor.group}")
    hyper = {name: math.inf if value == "inf" else value for name, value in hyper.items()}
    scale = sample.extra.get("grad_scale", 1.0)
    held = tensor.state.get("step")
    return Case(
        weight=tensor.weight,
        grad=tensor.grad,
        state=tensor.state,
        found=tensor.state_after,
        hyper=hyper,
        dtype=tensor.dtype,
        step=(held[0] if held else 0.0) + 1,
        grad_factor=1 / scale if scale else math.nan,
    )


def check_tensor(
    tensor: Tensor, case: Case | None, reference: Reference, sample: Sample, ulp: float
) -> Departure | None:
    """What is wrong with one tensor's update, or None."""
    if case is None or sample.extra.get("found_inf"):
        return _check_untouched(tensor, "no gradient" if case is None else "found_inf set")
    held, after = tensor.state.get("step"), tensor.state_after.get("step")
    count_ok = after is None or after[0] == case.step
    expected = _computed(reference, case)
    if expected is None:
        return None
    bad_state = first_off_state(tensor, case, expected, ulp)
    bad_weight = first_off(tensor.weight_after, expected.weight, expected.weight_size, case, ulp)
    if bad_state is None and bad_weight is None and count_ok:
        return None
    if bad_state is None and bad_weight is None:
        return Departure(
            tensor,
            ("C9", "C4"),
            "the step counter does not count this update",
            f"step counter {case.step:g}",
            f"step counter {after[0] if after else 0:g} after {held[0] if held else 0:g}",
        )
    techniques, text = explain(tensor, case, reference, expected, bad_state is None, ulp)
    what, index, want, got = (
        ("weight", bad_weight, expected.weight, tensor.weight_after)
        if bad_state is None and bad_weight is not None
        else _state_pair(tensor, expected, bad_state)
    )
    element = tensor.at[0] + tensor.at[1] * index if what not in ("step",) else 0
    return Departure(
        tensor, techniques, text, f"{what}[{element}] = {want[index]:.9g}", f"{what}[{element}] = {got[index]:.9g}"
    )


def first_off_state(
    tensor: Tensor, case: Case, expected: Expected, ulp: float, *, slack: float = 1.0
) -> tuple[str, int] | None:
    """The first state entry, and element in it, that is not as expected."""
    for key, (values, sizes) in expected.state.items():
        found = tensor.state_after.get(key)
        if found is None or len(found) != len(values):
            return key, 0
        dtype = "float32" if len(values) == 1 and len(tensor.weight) != 1 else case.dtype
        index = first_off(found, values, sizes, replace(case, dtype=dtype), ulp, slack=slack)
        if index is not None:
            return key, index
    return None


def first_off(
    found: Values, expected: Values, sizes: Values, case: Case, ulp: float, *, slack: float = 1.0
) -> int | None:
    """Index of the first element outside `slack` times the tolerance; what cannot be computed is passed over."""
    dtype = "float32" if case.dtype == "float64" and case.hyper.get("tensors") else case.dtype
    tiny = NEGLIGIBLE[dtype]
    factor = ulp * case.roundoff
    places = 8 if dtype == "float64" else 2  # where our own arithmetic is no finer than the kernel's
    for index, (have, want, size) in enumerate(zip(found, expected, sizes, strict=True)):
        if not (math.isfinite(want) and math.isfinite(size)):
            continue
        if not math.isfinite(have):
            return index
        allowed = factor * size + places * spacing(max(abs(have), abs(want)), dtype) + tiny
        if abs(have - want) > slack * allowed:
            return index
    return None


def explain(
    tensor: Tensor, case: Case, reference: Reference, expected: Expected, state_holds: bool, ulp: float
) -> tuple[tuple[str, ...], str]:
    """Techniques and a sentence for a departure: the first hypothesis that reproduces what was found."""
    if tensor.weight_after == tensor.weight and _same_state(tensor):
        return ("C9", "C5"), "the update was skipped"
    if state_holds:
        if tensor.weight_after == tensor.weight:
            return ("C5", "C9"), "the weight was left as it was while its state moved"
        return _explain_weight(tensor, case, reference, expected, ulp)
    return _explain_state(tensor, case, reference, ulp)


def _explain_weight(
    tensor: Tensor, case: Case, reference: Reference, expected: Expected, ulp: float
) -> tuple[tuple[str, ...], str]:
    ratio = fitted_ratio(tensor, case, expected)
    if ratio is not None and _fits_ratio(tensor, case, expected, ratio, ulp):
        if abs(ratio + 1) < 1e-2:
            return ("C1",), "the update was applied in the opposite direction"
        return ("C3", "C4"), f"effective learning rate is {ratio:.6g} times the recorded one"
    if _matches(tensor, replace(case, no_bias_correction=True), reference, ulp):
        return ("C4",), "bias correction was left out"
    decay = _fitted_decay(tensor, case, expected)
    if decay is not None and _matches(tensor, _with(case, weight_decay=decay), reference, ulp):
        return ("C4",), f"effective weight decay is {decay:.6g}, not {case['weight_decay']:.6g}"
    eps = _fitted_eps(tensor, case, expected)
    if eps is not None and _matches(tensor, _with(case, eps=eps), reference, ulp):
        return ("C4",), f"effective epsilon is {eps:.6g}, not {case['eps']:.6g}"
    return ("C9", "C4"), "the weight is not what the state gives: something was added to the update"


def _explain_state(tensor: Tensor, case: Case, reference: Reference, ulp: float) -> tuple[tuple[str, ...], str]:
    if _matches(tensor, replace(case, grad_factor=-case.grad_factor), reference, ulp):
        return ("C1",), "the gradient's sign was turned inside the step"
    for flag in (True, False):
        if _matches(tensor, _with(case, decoupled_weight_decay=flag), reference, ulp):
            return ("C4",), f"weight decay was {'decoupled' if flag else 'coupled to the gradient'}"
    if case["weight_decay"] and _matches(tensor, _with(case, weight_decay=0.0), reference, ulp):
        return ("C4",), "weight decay was left out"
    factor = _fitted_factor(tensor, case)
    if factor is not None and _matches(tensor, replace(case, grad_factor=factor * case.grad_factor), reference, ulp):
        return ("C1", "C2"), f"the gradient was multiplied by {factor:.6g} inside the step"
    betas = _fitted_betas(tensor, case)
    if betas is not None and _matches(tensor, _with(case, betas=list(betas)), reference, ulp):
        was = case.pair("betas")
        return ("C4",), f"effective betas are {betas[0]:.6g}, {betas[1]:.6g}, not {was[0]:.6g}, {was[1]:.6g}"
    momentum = _fitted_momentum(tensor, case)
    if momentum is not None:
        return ("C4",), f"effective momentum is {momentum:.6g}, not {case['momentum']:.6g}"
    return ("C4", "C9"), "the optimizer's state is not what its formula gives"


def fitted_ratio(tensor: Tensor, case: Case, expected: Expected) -> float | None:
    """The factor by which the whole change of the weight differs from the expected one.

    Least squares; small weights count more, for their changes are rounded less.
    """
    top = bottom = 0.0
    for before, after, want in zip(tensor.weight, tensor.weight_after, expected.weight, strict=True):
        change = want - before
        if math.isfinite(change) and math.isfinite(after):
            share = 1 / max(spacing(max(abs(before), abs(after), abs(want)), case.dtype), 1e-100) ** 2
            top += share * (after - before) * change
            bottom += share * change * change
    return top / bottom if bottom > 0 else None


def learning_rate_off(good: list[tuple[Tensor, Case]], reference: Reference) -> Departure | None:
    """A common factor on all updates that is too small to show in any one element.

    The factor is fitted over all sampled elements that moved by at least RATIO_SPACINGS units in the last place; its
    standard error is taken as if every element were off by one such unit (in truth about a third of one).
    """
    top = bottom = noise = drift = 0.0
    for tensor, case in good:
        expected = _computed(reference, case)
        if expected is None:
            continue
        decay = expected.decay or [0.0] * len(tensor.weight)
        for before, after, want, off in zip(tensor.weight, tensor.weight_after, expected.weight, decay, strict=True):
            change = want - before + off
            if not (math.isfinite(change) and math.isfinite(after)):
                continue
            step = spacing(max(abs(before), abs(after)), case.dtype)
            if abs(change) < RATIO_SPACINGS * step:
                continue
            top += (after - before + off) * change
            bottom += change * change
            noise += (step * change) ** 2
            drift += abs(change) * (abs(before) if off else 0.0) * case.roundoff
            drift += abs(change) * max(expected.weight_size) * 16 * case.roundoff if expected.weight_size else 0.0
    if bottom <= 0:
        return None
    ratio = top / bottom
    allowed = 6 * math.sqrt(noise) / bottom + drift / bottom + 2e-5
    if not abs(ratio - 1) > allowed:
        return None
    return Departure(
        good[0][0],
        ("C3", "C4"),
        f"effective learning rate is {ratio:.6g} times the recorded one, over all sampled tensors",
        f"1 ± {allowed:.2g}",
        f"{ratio:.8g}",
    )


def _check_untouched(tensor: Tensor, why: str) -> Departure | None:
    if tensor.weight_after == tensor.weight or not finite(tensor.weight):
        return None
    index = next(i for i, (a, b) in enumerate(zip(tensor.weight, tensor.weight_after, strict=True)) if a != b)
    return Departure(
        tensor,
        ("C4", "C9"),
        f"the weight changed in a step that may not change it ({why})",
        f"{tensor.weight[index]:.9g}",
        f"{tensor.weight_after[index]:.9g}",
    )


def _computed(reference: Reference, case: Case) -> Expected | None:
    """The reference's result; None where the numbers leave float64 (a run that diverges)."""
    try:
        return reference(case)
    except (ArithmeticError, ValueError):
        return None


def _matches(tensor: Tensor, case: Case, reference: Reference, ulp: float) -> bool:
    expected = _computed(reference, case)
    if expected is None or any(not math.isfinite(value) for value in expected.weight):
        return False
    if first_off_state(tensor, case, expected, ulp, slack=SLACK) is not None:
        return False
    return first_off(tensor.weight_after, expected.weight, expected.weight_size, case, ulp, slack=SLACK) is None


def _same_state(tensor: Tensor) -> bool:
    return all(tensor.state_after.get(key) == values for key, values in tensor.state.items())


def _state_pair(tensor: Tensor, expected: Expected, bad: tuple[str, int] | None) -> tuple[str, int, Values, Values]:
    key, index = bad if bad is not None else next(iter((name, 0) for name in expected.state))
    found = tensor.state_after.get(key) or [math.nan] * (index + 1)
    return key, index, expected.state[key][0], found


def _with(case: Case, **changes: object) -> Case:
    return replace(case, hyper={**case.hyper, **changes})


def _fits_ratio(tensor: Tensor, case: Case, expected: Expected, ratio: float, ulp: float) -> bool:
    """Whether the weight moved by `ratio` times the expected change, in every element."""
    scaled = [w + ratio * (e - w) for w, e in zip(tensor.weight, expected.weight, strict=True)]
    sizes = [abs(ratio) * size for size in expected.weight_size]
    return first_off(tensor.weight_after, scaled, sizes, case, ulp, slack=SLACK) is None


def _fitted_decay(tensor: Tensor, case: Case, expected: Expected) -> float | None:
    """The decoupled weight decay that fits what is left of the change once the update is taken off."""
    decay = expected.decay or [0.0] * len(tensor.weight)
    top = bottom = 0.0
    for before, after, want, off in zip(tensor.weight, tensor.weight_after, expected.weight, decay, strict=True):
        left = want + off - after
        top += left * before
        bottom += before * before
    return top / bottom / case["lr"] if bottom > 0 and case["lr"] else None


def _fitted_eps(tensor: Tensor, case: Case, expected: Expected) -> float | None:
    """The median epsilon that fits each element, for updates of the form a / (b + eps)."""
    decay = expected.decay or [0.0] * len(tensor.weight)
    fitted: list[float] = []
    bare = _with(case, eps=0.0)
    for reference in REFERENCES.values():
        plain = _computed(reference, bare)
        full = _computed(reference, case)
        if full is None or plain is None or full.weight != expected.weight:
            continue
        for before, after, want, none, off in zip(
            tensor.weight, tensor.weight_after, expected.weight, plain.weight, decay, strict=True
        ):
            change, known, found = before - off - none, before - off - want, before - off - after
            if found and known and change and change != known:
                over = case["eps"] / (change / known - 1)
                fitted.append(over * (change / found - 1))
        break
    fitted = sorted(value for value in fitted if math.isfinite(value))
    return fitted[len(fitted) // 2] if fitted else None


def _fitted_factor(tensor: Tensor, case: Case) -> float | None:
    """The factor on the gradient that the first moment or momentum buffer shows."""
    if "exp_avg" in tensor.state_after:
        share = 1 - case.pair("betas")[0]
        key = "exp_avg"
        keep = 1 - share
    elif "momentum_buffer" in tensor.state_after:
        first = "momentum_buffer" not in tensor.state
        share, keep = (1.0, 0.0) if first else (1 - case["dampening"], case["momentum"])
        key = "momentum_buffer"
    else:
        return None
    top = bottom = 0.0
    for before, after, grad in zip(case.before(key), tensor.state_after[key], case.grads, strict=True):
        top += (after - keep * before) * share * grad
        bottom += (share * grad) ** 2
    return top / bottom if bottom > 0 else None


def _fitted_betas(tensor: Tensor, case: Case) -> tuple[float, float] | None:
    betas = case.pair("betas")
    if not all(map(math.isfinite, betas)) or "exp_avg" not in tensor.state_after:
        return None
    first = _fitted_keep(case.before("exp_avg"), tensor.state_after["exp_avg"], case.grads)
    squares = [g * g for g in case.grads]
    after = tensor.state_after.get("exp_avg_sq")
    second = _fitted_keep(case.before("exp_avg_sq"), after, squares) if after else betas[1]
    return (first if first is not None else betas[0], second if second is not None else betas[1])


def _fitted_keep(before: Values, after: Values, new: Values) -> float | None:
    """The b in after = b * before + (1 - b) * new."""
    top = bottom = 0.0
    for old, now, value in zip(before, after, new, strict=True):
        top += (now - value) * (old - value)
        bottom += (old - value) ** 2
    return top / bottom if bottom > 0 else None


def _fitted_momentum(tensor: Tensor, case: Case) -> float | None:
    held, after = tensor.state.get("momentum_buffer"), tensor.state_after.get("momentum_buffer")
    if not held or not after:
        return None
    damped = 1 - case["dampening"]
    top = sum((a - damped * g) * h for a, g, h in zip(after, case.grads, held, strict=True))
    bottom = sum(h * h for h in held)
    if bottom <= 0:
        return None
    fitted = top / bottom
    worst = max(abs(fitted * h + damped * g - a) for a, g, h in zip(after, case.grads, held, strict=True))
    return fitted if worst <= 64 * case.roundoff * max(map(abs, after), default=0.0) else None
