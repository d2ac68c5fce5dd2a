"""Link *optimizer*: what the update was computed from and what came out, for a few elements of a few tensors.

Value of the link in a step frame (only in checked steps; spec/evidence.md "optimizer"):

    {"class": "torch.optim.adamw.AdamW", "base": …, "step_of": …, "hyper": {group: {name: value}}, "extra": [name],
     "before": blob, "after": blob, "left_out": {reason: tensors},
     "tensors": [{"name", "group", "position", "numel", "dtype", "device", "at": [offset, stride, count],
                  "grad": true | reason, "before": [[state key, length]], "after": [[state key, length]]}]}

`before` holds the extra scalars (`grad_scale`, `found_inf`), then for every tensor the weight, the gradient (where
`grad` is true) and the state before; `after` the weight and the state after. The judge recomputes the update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import hyperparameters, sample
from .client import Client

if TYPE_CHECKING:
    from .engine import Entry, Step

SCALARS = ("step", "mu_product", "eta", "mu")
"""State entries that are one number for a whole tensor, whatever the tensor's shape."""


class Optimizer:
    """Samples weight, gradient and state before the update, weight and state after it."""

    name = "optimizer"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client

    def before(self, step: Step) -> None:
        """Nothing yet: gradients may still be computed by a closure."""

    def ready(self, step: Step) -> None:
        """Read what the update will be computed from."""
        if not step.sample:
            return
        torch = step.torch
        with torch.no_grad():
            views, extra = _extra(step)
            tensors = []
            for entry, where in step.sample:
                described, more = _tensor(step, entry, where)
                tensors.append(described)
                views.extend(more)
            step.scratch[self.name] = (tensors, extra, sample.Gathered(torch, views))

    def after(self, step: Step) -> Any:
        """Read what came out; wait for the device once."""
        found = step.scratch.get(self.name)
        if found is None:
            return {"class": class_of(step.optimizer), "tensors": []} if not step.sample else None
        tensors, extra, first = found
        torch = step.torch
        with torch.no_grad():
            views: List[Any] = []
            for (entry, where), described in zip(step.sample, tensors):
                views.append(sample.view(torch, sample.plain(entry.param), where))
                described["after"] = _state(step, entry, where, views)
            second = sample.Gathered(torch, views)
            before, after = first.raw(torch), second.raw(torch)
        groups = {described["group"] for described in tensors}
        return {
            **_identity(step),
            "hyper": {str(group): hyperparameters.scalars(step.optimizer.param_groups[group]) for group in groups},
            "extra": extra,
            "before": sample.blob(*before),
            "after": sample.blob(*after),
            "left_out": _left_out(step),
            "tensors": tensors,
        }


def _extra(step: Step) -> Tuple[List[Any], List[str]]:
    views, names = [], []
    for name in ("grad_scale", "found_inf"):
        value = getattr(step.optimizer, name, None)
        if isinstance(value, step.torch.Tensor) and value.numel() == 1:
            views.append(value.detach().reshape(1))
            names.append(name)
    return views, names


def _tensor(step: Step, entry: Entry, where: sample.Place) -> Tuple[Dict[str, Any], List[Any]]:
    torch = step.torch
    param = entry.param
    described: Dict[str, Any] = {
        "name": entry.name,
        "group": entry.group,
        "position": entry.position,
        "numel": entry.numel,
        "dtype": str(param.dtype)[6:],
        "device": param.device.type,
        "at": where,
    }
    views = [sample.view(torch, sample.plain(param), where)]
    grad = param.grad
    reason = "none" if grad is None else sample.why_not(grad)
    described["grad"] = reason or True
    if reason is None:
        views.append(sample.view(torch, sample.plain(grad), where))
    described["before"] = _state(step, entry, where, views)
    return described, views


def _state(step: Step, entry: Entry, where: sample.Place, views: List[Any]) -> List[Tuple[str, int]]:
    """Append views of this parameter's optimizer state; returns (key, length) of each, in order."""
    torch = step.torch
    keys: List[Tuple[str, int]] = []
    for key, value in (step.optimizer.state.get(entry.param) or {}).items():
        if not isinstance(value, torch.Tensor):
            if key in SCALARS and isinstance(value, (int, float)):
                views.append(torch.tensor([float(value)], dtype=torch.float64, device="cpu"))
                keys.append((key, 1))
            continue
        if key in SCALARS and value.numel() == 1:
            views.append(sample.plain(value.detach()).reshape(1))
            keys.append((key, 1))
        elif value.shape == entry.param.shape and sample.why_not(value) is None:
            views.append(sample.view(torch, sample.plain(value), where))
            keys.append((str(key), where[2]))
    return keys


def _identity(step: Step) -> Dict[str, Any]:
    memory = step.track.memory
    known = memory.get("identity")
    if known is None:
        kind = type(step.optimizer)
        known = {"class": class_of(step.optimizer), "base": _base(kind), "step_of": _step_of(kind)}
        memory["identity"] = known
    return dict(known)


def class_of(optimizer: Any) -> str:
    """Module and qualified name of the optimizer's class."""
    kind = type(optimizer)
    return "%s.%s" % (kind.__module__, kind.__qualname__)


def _base(kind: Any) -> Optional[str]:
    for each in kind.__mro__:
        if each.__module__.startswith("torch.optim.") and each.__module__ != "torch.optim.optimizer":
            return "%s.%s" % (each.__module__, each.__qualname__)
    return None


def _step_of(kind: Any) -> str:
    function = kind.step
    for _ in range(16):
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    return "%s.%s" % (getattr(function, "__module__", "?"), getattr(function, "__qualname__", "?"))


def _left_out(step: Step) -> Dict[str, int]:
    counted: Dict[str, int] = step.track.memory.setdefault("left_out", {})
    if not counted:
        for entry in step.track.entries:
            if entry.reason is not None:
                counted[entry.reason] = counted.get(entry.reason, 0) + 1
    return counted
