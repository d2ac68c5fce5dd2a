"""Link *optimizer*: what the update was computed from and what came out, for a few elements of a few tensors.

Value of the link in a step frame (only in checked steps; spec/evidence.md "optimizer"):

    {"class": [class, nearest base class in torch.optim | null, function that step() is],
     "hyper": {group: {name: value}}, "extra": [name], "left_out": {reason: tensors},
     "tensors": [[name, group, position, numel, dtype, device]], "at": [[offset, stride, count]],
     "grad": [true | reason], "local": [bool], "state": [[state key]], "state_after": [[state key]],
     "shared": true where other processes may write to the weights, "before": blob, "after": blob,
     "shadow": see shadow.py}

`before` holds the extra scalars (`grad_scale`, `found_inf`), then for every tensor: the weight, the gradient (where
`grad` is true), the gradient right after backward (where `local` is true; link *gradients*) and each state entry;
`after` holds the weight and each state entry. A piece has `count` values, a state entry named in SCALARS has one.
The judge recomputes the update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import sample
from .client import Client
from .shadow import Shadow

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
        self.shadow = Shadow(client)

    def before(self, step: Step) -> None:
        """Copies for a shadow; the sample waits, for gradients may still be computed by a closure."""
        self.shadow.before(step)

    def ready(self, step: Step) -> None:
        """Read what the update will be computed from."""
        if step.calls:
            self.shadow.called(step, step.value)
        if not step.sample:
            return
        torch = step.torch
        views, extra = _extra(step)
        locals_ = step.scratch.get("local") or [None] * len(step.sample)
        value: Dict[str, Any] = {"extra": extra, "grad": [], "local": [], "state": []}
        for (entry, where), local in zip(step.sample, locals_):
            views.append(sample.view(torch, sample.plain(entry.param), where))
            grad = step.grads[entry.position]
            reason = "none" if grad is None else sample.why_not(grad)
            value["grad"].append(reason or True)
            if reason is None:
                views.append(sample.view(torch, sample.plain(grad), where))
            value["local"].append(local is not None)
            if local is not None:
                views.append(local)
            value["state"].append(_state(step, entry, where, views))
        step.scratch[self.name] = (value, sample.Gathered(torch, views))

    def after(self, step: Step) -> Any:
        """Read what came out; wait for the device once."""
        shadow = self.shadow.after(step)
        value = self._value(step)
        if shadow is not None and value is not None:
            value["shadow"] = shadow
        return value

    def forget(self, opt: int) -> None:
        """The optimizer is gone."""
        self.shadow.forget(opt)

    def _value(self, step: Step) -> Any:
        found = step.scratch.get(self.name)
        if found is None:
            return {"class": _identity(step), "left_out": _left_out(step), "tensors": []} if not step.sample else None
        value, first = found
        torch = step.torch
        views: List[Any] = []
        value["state_after"] = states = []
        for entry, where in step.sample:
            views.append(sample.view(torch, sample.plain(entry.param), where))
            states.append(_state(step, entry, where, views))
        second = sample.Gathered(torch, views)
        known = step.track.memory["hyperparameters"]["json"]
        value["class"] = _identity(step)
        value["tensors"] = [entry.facts for entry, _ in step.sample]
        value["at"] = [where for _, where in step.sample]
        value["hyper"] = {str(entry.group): known[entry.group] for entry, _ in step.sample}
        value["left_out"] = _left_out(step)
        if any(sample.shared(entry.param) for entry, _ in step.sample):
            value["shared"] = True
        value["before"] = sample.blob(*first.raw(torch))
        value["after"] = sample.blob(*second.raw(torch))
        return value


def _extra(step: Step) -> Tuple[List[Any], List[str]]:
    views, names = [], []
    for name in ("grad_scale", "found_inf"):
        value = getattr(step.optimizer, name, None)
        if isinstance(value, step.torch.Tensor) and value.numel() == 1:
            views.append(value.detach().reshape(1))
            names.append(name)
    return views, names


def _state(step: Step, entry: Entry, where: sample.Place, views: List[Any]) -> List[str]:
    """Append views of this parameter's optimizer state; returns their keys, in order."""
    held = step.optimizer.state.get(entry.param)
    if not held:
        return []
    torch = step.torch
    if entry.state_of is not held or len(entry.state_keys) != len(held):
        entry.state_of = held
        entry.state_keys = [(key, _shape_of(torch, entry, key, value)) for key, value in held.items()]
    keys: List[str] = []
    for key, shape in entry.state_keys:
        if shape == 0:
            continue
        value = held[key]
        if value is None:
            continue
        if shape == 3:
            views.append(torch.tensor([float(value)], dtype=torch.float64, device="cpu"))
        elif shape == 2:
            views.append(sample.plain(value.detach()).reshape(1))
        else:
            views.append(sample.view(torch, sample.plain(value), where))
        keys.append(str(key))
    return keys


def _shape_of(torch: Any, entry: Entry, key: Any, value: Any) -> int:
    """1: as large as the parameter; 2: one number; 3: a Python number; 0: none of these."""
    if not isinstance(value, torch.Tensor):
        return 3 if key in SCALARS and isinstance(value, (int, float)) else 0
    if key in SCALARS:
        return 2 if value.numel() == 1 and value.is_floating_point() else 0
    return 1 if value.shape == entry.param.shape and sample.why_not(value) is None else 0


def _identity(step: Step) -> List[Optional[str]]:
    memory = step.track.memory
    known: Optional[List[Optional[str]]] = memory.get("identity")
    if known is None:
        kind = type(step.optimizer)
        known = memory["identity"] = [class_of(step.optimizer), _base(kind), _step_of(kind)]
    return known


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
    counted: Optional[Dict[str, int]] = step.track.memory.get("left_out")
    if counted is None:
        counted = step.track.memory["left_out"] = {}
        for entry in step.track.entries:
            if entry.reason is not None:
                counted[entry.reason] = counted.get(entry.reason, 0) + 1
    return counted
