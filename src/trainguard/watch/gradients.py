"""Link *gradients*: the gradient right after backward, to be compared with the one the optimizer used.

For the tensors that a checked step will sample, a post-accumulate hook copies the sampled elements when backward
has just added to `.grad`: before DDP's reducer, before any later hook, before clipping. The gradient that the
optimizer used is in link *optimizer*, same tensors and places.

Value of the link (only in checked steps; spec/evidence.md "gradients"):

    {"armed": bool, "calls": [times backward added to tensor i since the last step], "local": blob of the tensors
     with calls > 0, in order, "norm": total 2-norm of the gradients used | null, "tensors_with_grad": n,
     "zero": [names of tensors whose whole gradient is zero, at most 32], "sharded": bool,
     "scale": the GradScaler's scale | null, "world": world size}
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import sample
from .client import Client

if TYPE_CHECKING:
    from .engine import Entry, Step

NAMES_LIMIT = 32


class _Watch:
    """Hooks on the tensors of one step of one optimizer."""

    def __init__(self, torch: Any, chosen: List[Tuple[Entry, sample.Place]], fault: Any) -> None:
        self.torch = torch
        self.fault = fault
        self.chosen = chosen
        self.calls = [0] * len(chosen)
        self.values: List[Any] = [None] * len(chosen)
        self.handles: List[Any] = []
        for number, (entry, _) in enumerate(chosen):
            self._arm(number, entry)

    def _arm(self, number: int, entry: Entry) -> None:
        if not entry.param.requires_grad or not entry.param.is_leaf:
            return

        def copy(param: Any) -> None:
            try:
                self._copy(number, param)
            except Exception as error:
                self.fault("gradients.copy", error)

        handle = entry.param.register_post_accumulate_grad_hook(copy)
        self.handles.append(handle)
        hooks = entry.param._post_accumulate_grad_hooks
        if len(hooks) > 1:
            hooks.move_to_end(handle.id, last=False)  # before every other hook, so that what they change shows

    def _copy(self, number: int, param: Any) -> None:
        grad = param.grad
        if grad is None or sample.why_not(grad) is not None:
            return
        with self.torch.no_grad():
            self.values[number] = sample.view(self.torch, sample.plain(grad), self.chosen[number][1]).clone()
        self.calls[number] += 1

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Gradients:
    """Arms hooks for the next checked step, and reports what they saw."""

    name = "gradients"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.watches: Dict[int, _Watch] = {}
        """Index of the optimizer → hooks armed for its next step."""

    def before(self, step: Step) -> None:
        """Nothing yet: gradients may still be computed by a closure."""

    def ready(self, step: Step) -> None:
        """Measure the norm of the gradients about to be used, on their device."""
        torch = step.torch
        grads = [sample.plain(g) for g in step.grads if g is not None and sample.why_not(g) is None]
        sharded = any(hasattr(g, "to_local") for g in step.grads if g is not None)
        norms = None
        if grads:
            with torch.no_grad():
                norms = _norms(torch, grads)
        watch = self.watches.get(step.opt)
        seen = None
        if watch is not None and any(watch.calls):
            with torch.no_grad():
                seen = sample.Gathered(torch, [value for value in watch.values if value is not None])
        step.scratch[self.name] = (norms, sharded, seen, list(watch.calls) if watch is not None else [], _scale())

    def after(self, step: Step) -> Any:
        """Report; take the hooks off, and arm those of the next step if it will be checked."""
        watch = self.watches.pop(step.opt, None)
        if watch is not None:
            watch.remove()
        chosen = step.track.next_sample
        if chosen:
            self.watches[step.opt] = _Watch(step.torch, chosen, self.client.fault)
        found = step.scratch.get(self.name)
        if found is None:
            return None
        norms, sharded, seen, calls, scale = found
        value: Dict[str, Any] = {"armed": watch is not None, "calls": calls, "sharded": sharded, "scale": scale}
        value["norm"], value["zero"], value["tensors_with_grad"] = self._norm(step, norms)
        if seen is not None:
            value["local"] = sample.blob(*seen.raw(step.torch))
        value["world"] = _world(step.torch)
        return value

    def _norm(self, step: Step, norms: Any) -> Tuple[Any, List[str], int]:
        if norms is None:
            return None, [], 0
        values = norms.cpu().tolist()
        total = math.hypot(*values)
        zero: List[str] = []
        if 0.0 in values:
            owners = [
                entry.name
                for entry, grad in zip(step.track.entries, step.grads)
                if grad is not None and sample.why_not(grad) is None
            ]
            zero = [name for name, norm in zip(owners, values) if norm == 0.0][:NAMES_LIMIT]
        return (total if math.isfinite(total) else repr(total)), zero, len(values)

    def forked(self) -> None:
        """Take the parent's hooks off this child's copies of the tensors."""
        for watch in self.watches.values():
            watch.remove()


def _norms(torch: Any, grads: List[Any]) -> Any:
    """2-norm of every gradient, as one float32 (or float64) tensor on the first one's device."""
    if len({(g.device, g.dtype) for g in grads}) == 1:
        kind = grads[0].dtype
        if kind in (torch.float32, torch.float64):
            return torch.stack(torch._foreach_norm(grads))
        return torch.stack(torch._foreach_norm(grads, 2, torch.float32))
    wide = [
        torch.linalg.vector_norm(g, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32) for g in grads
    ]
    return torch.stack([norm.to(grads[0].device, torch.float64) for norm in wide])


def _scale() -> Optional[float]:
    """The scale of the torch GradScaler that is calling this step, if one is on the stack."""
    frame: Any = sys._getframe(1)
    for _ in range(24):
        if frame is None:
            return None
        code = frame.f_code
        if code.co_name in ("step", "_maybe_opt_step") and code.co_filename.endswith("amp/grad_scaler.py"):
            scaler = frame.f_locals.get("self")
            return float(scaler.get_scale()) if scaler is not None else None
        frame = frame.f_back
    return None


def _world(torch: Any) -> int:
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())
