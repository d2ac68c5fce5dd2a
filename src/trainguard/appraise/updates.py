"""The updates of torch's optimizers, once more: in float64, element by element, without torch.

Each reference takes one `Case` (sampled elements of one tensor before the update, with the hyper-parameters) and gives
what state and weight must be afterwards, each with a *size*: the sum of the magnitudes of the terms that were
rounded on the way. The allowed error is `tolerance_ulp * unit_roundoff * size`, plus two units in the last place of
the result, plus what the type cannot tell from zero. Derivation: docs/checks/optimizer.md.

The weight is computed from the state *found* afterwards, not the one expected: so a wrong state and a wrong weight
are two separate observations, and the error of the weight does not include that of the state.

The formulas are those of the documentation of torch.optim (2.6 and later).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

PRECISION = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}
"""Bits of the significand, the hidden one included."""

SMALLEST_EXPONENT = {"float64": -1074, "float32": -149, "bfloat16": -133, "float16": -24}
"""The smallest positive number of the type is 2 to this power."""

Values = list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sampled elements of one tensor before an update."""

    weight: Values
    grad: Values
    state: dict[str, Values]
    found: dict[str, Values]
    """The state after the update, as found."""
    hyper: dict[str, Any]
    dtype: str
    step: float
    """Number of this update of the tensor, from 1."""
    no_bias_correction: bool = False
    """A hypothesis: the correction of the first steps' bias was left out."""
    grad_factor: float = 1.0
    """A hypothesis: the gradient was multiplied by this inside the step; 1/grad_scale where a scaler is fused."""

    def __getitem__(self, name: str) -> float:
        value = self.hyper.get(name, 0.0)
        return float(value) if isinstance(value, (int, float)) else math.nan

    def flag(self, name: str) -> bool:
        """Whether a boolean hyper-parameter is set."""
        return self.hyper.get(name) is True

    def pair(self, name: str) -> tuple[float, float]:
        """Two numbers, such as betas."""
        value = self.hyper.get(name)
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
            return float(value[0]), float(value[1])
        return math.nan, math.nan

    @property
    def roundoff(self) -> float:
        """Unit roundoff of the arithmetic: the tensor's type, or float32 where a hyper-parameter is a tensor."""
        own: float = 2.0 ** -PRECISION[self.dtype]
        return max(own, 2.0**-24) if self.hyper.get("tensors") else own

    @property
    def grads(self) -> Values:
        """The gradient as the formulas see it before weight decay."""
        factor = -self.grad_factor if self.flag("maximize") else self.grad_factor
        return [factor * g for g in self.grad] if factor != 1.0 else self.grad

    def before(self, key: str, start: float = 0.0) -> Values:
        """A state entry before the update; `start` where it did not exist yet."""
        return self.state.get(key) or [start] * len(self.weight)

    def after(self, key: str, expected: Values) -> Values:
        """A state entry found after the update; what was expected where it is missing."""
        found = self.found.get(key)
        return found if found is not None and len(found) == len(expected) else expected

    def scalar(self, key: str, start: float) -> float:
        """A state entry with one value, before the update."""
        values = self.state.get(key)
        return values[0] if values else start


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be there after the update."""

    weight: Values
    weight_size: Values
    """Magnitude of the terms whose rounding scales with the update (not with the weight)."""
    state: dict[str, tuple[Values, Values]] = field(default_factory=dict)
    """State entry → values, sizes."""
    decay: Values = field(default_factory=list)
    """The part of the change that is decoupled weight decay; empty for none."""


Reference = Callable[[Case], Expected]


def adam(case: Case) -> Expected:
    """Adam; also AdamW, which decays weights apart from the gradient, and AMSGrad."""
    return _adam(case, decoupled=case.flag("decoupled_weight_decay"))


def adamw(case: Case) -> Expected:
    """AdamW."""
    return _adam(case, decoupled=case.hyper.get("decoupled_weight_decay") is not False)


def _adam(case: Case, *, decoupled: bool) -> Expected:
    lr, eps, decay = case["lr"], case["eps"], case["weight_decay"]
    beta1, beta2 = case.pair("betas")
    grad, size = _coupled(case, 0.0 if decoupled else decay)
    first = _lerp(case.before("exp_avg"), grad, size, 1 - beta1)
    second = _square(case.before("exp_avg_sq"), grad, size, beta2)
    state = {"exp_avg": first, "exp_avg_sq": second}
    m, v = case.after("exp_avg", first[0]), case.after("exp_avg_sq", second[0])
    if case.flag("amsgrad"):
        top = [max(a, b) for a, b in zip(case.before("max_exp_avg_sq"), v, strict=True)]
        state["max_exp_avg_sq"] = (top, top)
        v = case.after("max_exp_avg_sq", top)
    bias1, bias2 = _bias(case, beta1, beta2)
    root = math.sqrt(bias2)
    change = [lr / bias1 * a / (_sqrt(b) / root + eps) if b >= 0 else math.nan for a, b in zip(m, v, strict=True)]
    wide = _loose_bias(case, bias1, bias2)
    return _applied(case, change, [abs(c) * wide for c in change], lr * decay if decoupled else 0.0, state)


def sgd(case: Case) -> Expected:
    """SGD with momentum, dampening, Nesterov's variant and weight decay."""
    lr, momentum = case["lr"], case["momentum"]
    grad, size = _coupled(case, case["weight_decay"])
    state: dict[str, tuple[Values, Values]] = {}
    if momentum:
        held = case.state.get("momentum_buffer")
        if held is None:
            buffer, sizes = grad, size
        else:
            damped = 1 - case["dampening"]
            buffer = [momentum * b + damped * g for b, g in zip(held, grad, strict=True)]
            sizes = [abs(momentum * b) + abs(damped) * s for b, s in zip(held, size, strict=True)]
        state["momentum_buffer"] = (buffer, sizes)
        found = case.after("momentum_buffer", buffer)
        if case.flag("nesterov"):
            grad = [g + momentum * b for g, b in zip(grad, found, strict=True)]
            size = [s + abs(momentum * b) for s, b in zip(size, found, strict=True)]
        else:
            grad, size = found, [abs(b) for b in found]
    return _applied(case, [lr * g for g in grad], [abs(lr) * s for s in size], 0.0, state)


def adagrad(case: Case) -> Expected:
    """Adagrad."""
    grad, size = _coupled(case, case["weight_decay"])
    rate = case["lr"] / (1 + (case.step - 1) * case["lr_decay"])
    start = case["initial_accumulator_value"]
    total = [s + g * g for s, g in zip(case.before("sum", start), grad, strict=True)]
    sizes = [abs(t) + 3 * s * s for t, s in zip(total, size, strict=True)]
    found = case.after("sum", total)
    change, wide = _divided(rate, grad, size, [_sqrt(t) + case["eps"] for t in found])
    return _applied(case, change, wide, 0.0, {"sum": (total, sizes)})


def rmsprop(case: Case) -> Expected:
    """RMSprop, centered or not, with momentum."""
    alpha, eps, momentum = case["alpha"], case["eps"], case["momentum"]
    grad, size = _coupled(case, case["weight_decay"])
    square = _square(case.before("square_avg"), grad, size, alpha)
    state = {"square_avg": square}
    v = case.after("square_avg", square[0])
    loose = [1.0] * len(v)
    if case.flag("centered"):
        mean = _lerp(case.before("grad_avg"), grad, size, 1 - alpha)
        state["grad_avg"] = mean
        a = case.after("grad_avg", mean[0])
        apart = [x - y * y for x, y in zip(v, a, strict=True)]
        loose = [1 + 4 * (x + y * y) / d if d > 0 else math.nan for x, y, d in zip(v, a, apart, strict=True)]
        v = apart
    over = [_sqrt(x) + eps for x in v]
    change, wide = _divided(1.0 if momentum else case["lr"], grad, size, over)
    wide = [w * factor for w, factor in zip(wide, loose, strict=True)]
    if momentum:
        held = case.before("momentum_buffer")
        buffer = [momentum * b + c for b, c in zip(held, change, strict=True)]
        sizes = [abs(momentum * b) + w for b, w in zip(held, wide, strict=True)]
        state["momentum_buffer"] = (buffer, sizes)
        found = case.after("momentum_buffer", buffer)
        change, wide = [case["lr"] * b for b in found], [abs(case["lr"] * b) for b in found]
    return _applied(case, change, wide, 0.0, state)


def adadelta(case: Case) -> Expected:
    """Adadelta."""
    rho, eps = case["rho"], case["eps"]
    grad, size = _coupled(case, case["weight_decay"])
    square = _square(case.before("square_avg"), grad, size, rho)
    v = case.after("square_avg", square[0])
    held = case.before("acc_delta")
    factor = [_sqrt(a + eps) / _sqrt(x + eps) for a, x in zip(held, v, strict=True)]
    delta = [f * g for f, g in zip(factor, grad, strict=True)]
    sizes = [f * s for f, s in zip(factor, size, strict=True)]
    total = [rho * a + (1 - rho) * d * d for a, d in zip(held, delta, strict=True)]
    total_size = [abs(rho * a) + (1 - rho) * 3 * s * s for a, s in zip(held, sizes, strict=True)]
    lr = case["lr"]
    state = {"square_avg": square, "acc_delta": (total, total_size)}
    return _applied(case, [lr * d for d in delta], [abs(lr) * s for s in sizes], 0.0, state)


def nadam(case: Case) -> Expected:
    """NAdam, with coupled or decoupled weight decay."""
    lr, eps, decay = case["lr"], case["eps"], case["weight_decay"]
    beta1, beta2 = case.pair("betas")
    decoupled = case.flag("decoupled_weight_decay")
    grad, size = _coupled(case, 0.0 if decoupled else decay)
    first = _lerp(case.before("exp_avg"), grad, size, 1 - beta1)
    second = _square(case.before("exp_avg_sq"), grad, size, beta2)
    mu = beta1 * (1 - 0.5 * 0.96 ** (case.step * case["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((case.step + 1) * case["momentum_decay"]))
    product = case.scalar("mu_product", 1.0) * mu
    state = {"exp_avg": first, "exp_avg_sq": second, "mu_product": ([product], [abs(product)])}
    m, v = case.after("exp_avg", first[0]), case.after("exp_avg_sq", second[0])
    found = case.after("mu_product", [product])[0]
    _, bias2 = _bias(case, beta1, beta2)
    over = [_sqrt(x / bias2) + eps if x >= 0 else math.nan for x in v]
    here, ahead = lr * (1 - mu) / (1 - found), lr * mu_next / (1 - found * mu_next)
    change = [(here * g + ahead * a) / o for g, a, o in zip(grad, m, over, strict=True)]
    loose = _loose_bias(case, 1 - found, bias2)
    wide = [loose * (abs(here) * s + abs(ahead * a)) / o for s, a, o in zip(size, m, over, strict=True)]
    return _applied(case, change, wide, lr * decay if decoupled else 0.0, state)


def radam(case: Case) -> Expected:
    """RAdam, with coupled or decoupled weight decay."""
    lr, eps, decay = case["lr"], case["eps"], case["weight_decay"]
    beta1, beta2 = case.pair("betas")
    decoupled = case.flag("decoupled_weight_decay")
    grad, size = _coupled(case, 0.0 if decoupled else decay)
    first = _lerp(case.before("exp_avg"), grad, size, 1 - beta1)
    second = _square(case.before("exp_avg_sq"), grad, size, beta2)
    m, v = case.after("exp_avg", first[0]), case.after("exp_avg_sq", second[0])
    bias1, bias2 = _bias(case, beta1, beta2)
    top = 2 / (1 - beta2) - 1
    length = top - 2 * case.step * beta2**case.step / (1 - beta2**case.step)
    loose = _loose_bias(case, bias1, bias2)
    if length > 5:
        rect = math.sqrt((length - 4) * (length - 2) * top / ((top - 4) * (top - 2) * length))
        factor = lr / bias1 * rect * math.sqrt(bias2)
        change = [factor * a / (_sqrt(x) + eps) if x >= 0 else math.nan for a, x in zip(m, v, strict=True)]
        loose *= 2 + top / (length - 4)
    else:
        change = [lr / bias1 * a for a in m]
    state = {"exp_avg": first, "exp_avg_sq": second}
    return _applied(case, change, [abs(c) * loose for c in change], lr * decay if decoupled else 0.0, state)


def adamax(case: Case) -> Expected:
    """Adamax."""
    lr, eps = case["lr"], case["eps"]
    beta1, beta2 = case.pair("betas")
    grad, size = _coupled(case, case["weight_decay"])
    first = _lerp(case.before("exp_avg"), grad, size, 1 - beta1)
    held = case.before("exp_inf")
    norm = [max(beta2 * n, abs(g) + eps) for n, g in zip(held, grad, strict=True)]
    sizes = [abs(beta2 * n) + s + eps for n, s in zip(held, size, strict=True)]
    m, n = case.after("exp_avg", first[0]), case.after("exp_inf", norm)
    bias1, _ = _bias(case, beta1, 0.0)
    change = [lr / bias1 * a / b if b > 0 else math.nan for a, b in zip(m, n, strict=True)]
    loose = _loose_bias(case, bias1, 1.0)
    state = {"exp_avg": first, "exp_inf": (norm, sizes)}
    return _applied(case, change, [abs(c) * loose for c in change], 0.0, state)


def asgd(case: Case) -> Expected:
    """ASGD."""
    lr, lambd = case["lr"], case["lambd"]
    grad, size = _coupled(case, case["weight_decay"])
    eta, mu = case.scalar("eta", _float32(lr)), case.scalar("mu", 1.0)
    change = [eta * g for g in grad]
    plain = _applied(case, change, [abs(eta) * s for s in size], lambd * eta, {})
    held = case.before("ax")
    average = [w if mu == 1 else a + (w - a) * mu for a, w in zip(held, plain.weight, strict=True)]
    sizes = [abs(a) + 4 * abs(w) + s for a, w, s in zip(held, plain.weight, plain.weight_size, strict=True)]
    rate = lr / (1 + lambd * lr * case.step) ** case["alpha"]
    share = 1 / max(1.0, case.step - case["t0"])
    state = {"ax": (average, sizes), "eta": ([rate], [abs(rate)]), "mu": ([share], [share])}
    return replace(plain, state=state)


def rprop(case: Case) -> Expected:
    """Rprop."""
    grad = case.grads
    shrink, grow = case.pair("etas")
    low, high = case.pair("step_sizes")
    turn = [g * h for g, h in zip(grad, case.before("prev"), strict=True)]
    factor = [grow if t > 0 else shrink if t < 0 else 1.0 for t in turn]
    sizes = [min(max(s * f, low), high) for s, f in zip(case.before("step_size", case["lr"]), factor, strict=True)]
    kept = [0.0 if t < 0 else g for t, g in zip(turn, grad, strict=True)]
    found = case.after("step_size", sizes)
    change = [math.copysign(s, g) if g else 0.0 for s, g in zip(found, kept, strict=True)]
    state = {"step_size": (sizes, sizes), "prev": (kept, [abs(g) for g in kept])}
    return _applied(case, change, [abs(c) for c in change], 0.0, state)


REFERENCES: dict[str, Reference] = {
    "torch.optim.adam.Adam": adam,
    "torch.optim.adamw.AdamW": adamw,
    "torch.optim.sgd.SGD": sgd,
    "torch.optim.adagrad.Adagrad": adagrad,
    "torch.optim.rmsprop.RMSprop": rmsprop,
    "torch.optim.adadelta.Adadelta": adadelta,
    "torch.optim.nadam.NAdam": nadam,
    "torch.optim.radam.RAdam": radam,
    "torch.optim.adamax.Adamax": adamax,
    "torch.optim.asgd.ASGD": asgd,
    "torch.optim.rprop.Rprop": rprop,
}
"""Class of the optimizer → its reference. What is not here is reported blind."""


def spacing(value: float, dtype: str) -> float:
    """Distance from `value` to the next number of its type."""
    smallest = SMALLEST_EXPONENT[dtype]
    if value == 0.0 or not math.isfinite(value):
        return 2.0**smallest
    return math.ldexp(1.0, max(math.frexp(value)[1] - PRECISION[dtype], smallest))


def _coupled(case: Case, decay: float) -> tuple[Values, Values]:
    """The gradient with weight decay added to it, and the magnitude of its terms."""
    grad = case.grads
    if not decay:
        return grad, [abs(g) for g in grad]
    mixed = [g + decay * w for g, w in zip(grad, case.weight, strict=True)]
    return mixed, [abs(g) + abs(decay * w) for g, w in zip(grad, case.weight, strict=True)]


def _lerp(held: Values, grad: Values, size: Values, share: float) -> tuple[Values, Values]:
    values = [a + share * (g - a) for a, g in zip(held, grad, strict=True)]
    return values, [abs(a) + s for a, s in zip(held, size, strict=True)]


def _square(held: Values, grad: Values, size: Values, beta: float) -> tuple[Values, Values]:
    values = [beta * v + (1 - beta) * g * g for v, g in zip(held, grad, strict=True)]
    return values, [abs(v) + 3 * (1 - beta) * s * s for v, s in zip(held, size, strict=True)]


def _divided(rate: float, grad: Values, size: Values, over: Values) -> tuple[Values, Values]:
    change = [rate * g / o if o > 0 else math.nan for g, o in zip(grad, over, strict=True)]
    return change, [abs(rate) * s / o if o > 0 else math.nan for s, o in zip(size, over, strict=True)]


def _applied(
    case: Case, change: Values, size: Values, decay: float, state: dict[str, tuple[Values, Values]]
) -> Expected:
    """The weight after `change` was subtracted and, where `decay` is not 0, that share of it taken off first."""
    weight = [w - decay * w - c for w, c in zip(case.weight, change, strict=True)]
    if not decay:
        return Expected(weight, size, state)
    decayed = [decay * w for w in case.weight]
    return Expected(weight, [s + abs(d) for s, d in zip(size, decayed, strict=True)], state, decayed)


def _bias(case: Case, beta1: float, beta2: float) -> tuple[float, float]:
    if case.no_bias_correction:
        return 1.0, 1.0
    return 1 - beta1**case.step, 1 - beta2**case.step


def _loose_bias(case: Case, bias1: float, bias2: float) -> float:
    """How much larger the error of the update is where the bias corrections themselves are float32.

    That is so when the step is a tensor on the device (capturable, fused, differentiable): 1 - beta**step loses
    digits while it is small. Elsewhere Python computes it in float64.
    """
    if not any(case.flag(name) for name in ("capturable", "fused", "differentiable")):
        return 1.0
    if case.dtype == "float64":
        return 1.0
    return 1.0 + (2.0**-24 / case.roundoff) * (1 / bias1 + 1 / bias2 if bias1 > 0 and bias2 > 0 else 1.0)


def _float32(value: float) -> float:
    """The nearest float32: scalar state is kept in that type."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0]) if abs(value) < 1e38 else value


def _sqrt(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan
