"""Link *gradients*: the gradient right after backward, to be compared with the one the optimizer used.

For the tensors that a checked step will sample, a post-accumulate hook copies the sampled elements when backward
has just added to `.grad`: before DDP's reducer, before any later hook, before clipping. The gradient that the
optimizer used is in link *optimizer*, same tensors and places.

Value of the link (only in checked steps; spec/evidence.md "gradients"):

    {"armed": bool, "calls": [times backward added to tensor i of link *optimizer* since the last step],
     "world": world size, "scale": the GradScaler's scale, where one calls the step,
     "norm": total 2-norm of the gradients used, "zero": [names of tensors whose whole gradient is zero, at most 32],
     "sharded": true where the tensors are shards and the norm is of this rank's shards only,
     "hooked": [[tensor i, [file:line of its hooks], sampled gradient before them, and after], …] where hooks of the
      job on the tensor itself changed it,
     "kept": [tensors i whose gradient was not cleared since the last step: backward added to the one used there]}

A hook on a tensor (`Tensor.register_hook`) changes its gradient before `.grad` is written, so what is right after
backward has its mark already. Where a sampled tensor has such hooks, one of ours runs before the first and one after
the last of them; what they changed is reported. Tensors without hooks cost nothing.

Whether a gradient was cleared is read from where it lies and how often it was written: each run of backward finds it
as the last one, or the last step, left it, or it does not. No value is read.

Where there are other ranks, `from` says what backward started from (lineage.py): checksums, and `made_of` {checksum:
[names]} for those not sent before. Ranks that run the same code start from the same.

The norm is measured at every checked step from the first one on that changed a gradient after backward (a clip),
and at every 8th before that. The copies themselves travel in link *optimizer* (`local`).
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Set, Tuple

from . import armed, lineage, sample
from .client import Client

if TYPE_CHECKING:
    from .engine import Entry, Step

NAMES_LIMIT = 32
TAILS_LIMIT = 4
"""Runs of backward before one step that are told apart; gradient accumulation makes more of the same."""
NORM_EVERY = 8
KNOWN_LIMIT = 64


class _Watch(armed.Hooks):
    """Hooks on the tensors of one step of one optimizer."""

    def __init__(self, torch: Any, chosen: List[Tuple[Entry, sample.Place]], fault: Any) -> None:
        super().__init__()
        self.torch = torch
        self.fault = fault
        self.chosen = chosen
        self.calls = [0] * len(chosen)
        self.values: List[Any] = [None] * len(chosen)
        self.tails: Optional[List[Any]] = [] if _world(torch) > 1 else None
        """Where ranks are compared: what backward started from, once a run of backward."""
        self.hooked: Dict[int, List[Any]] = {}
        """Index of a sampled tensor → places of its hooks, sampled gradient before them, and after."""
        self.left = [_stamp(entry.param.grad) for entry, _ in chosen]
        """The gradient as last seen, as long as it is the one of the last step with more added; None from then on."""
        for number, (entry, _) in enumerate(chosen):
            self._arm(number, entry)

    def _arm(self, number: int, entry: Entry) -> None:
        if not entry.param.requires_grad or not entry.param.is_leaf:
            return

        def found(_: Any) -> None:
            try:
                if self.left[number] is not None and _stamp(entry.param.grad) != self.left[number]:
                    self.left[number] = None
            except Exception as error:
                self.fault("gradients.found", error)

        def copy(param: Any) -> None:
            try:
                if self.left[number] is not None:
                    self.left[number] = _stamp(param.grad)
                self._copy(number, param)
                if number == 0 and self.tails is not None and len(self.tails) < TAILS_LIMIT:
                    self.tails.append(lineage.tail_of(sys._getframe(1)))
            except Exception as error:
                self.fault("gradients.copy", error)

        handle = entry.param.register_post_accumulate_grad_hook(copy)
        self.handles.append(handle)
        put_first(entry.param._post_accumulate_grad_hooks, handle.id)
        if entry.param._backward_hooks:
            self._embrace(number, entry)
        if self.left[number] is not None:
            self.handles.append(entry.param.register_hook(found))

    def _embrace(self, number: int, entry: Entry) -> None:
        """Take the gradient before the first and after the last hook that the job has put on this tensor."""
        where = self.chosen[number][1]
        places = [_place(hook) for hook in list(entry.param._backward_hooks.values())[:NAMES_LIMIT]]

        def taken(grad: Any) -> Any:
            with self.torch.no_grad():
                return sample.view(self.torch, sample.plain(grad), where).clone()

        def before(grad: Any) -> None:
            try:
                self.hooked[number] = [places, taken(grad), None]
            except Exception as error:
                self.fault("gradients.hooked", error)

        def after(grad: Any) -> None:
            try:
                if number in self.hooked:
                    self.hooked[number][2] = taken(grad)
            except Exception as error:
                self.fault("gradients.hooked", error)

        first = entry.param.register_hook(before)
        self.handles += [first, entry.param.register_hook(after)]
        put_first(entry.param._backward_hooks, first.id)

    def kept(self) -> List[int]:
        """Tensors whose gradient still has that of the last step in it."""
        return [i for i, left in enumerate(self.left) if left is not None and self.calls[i]]

    def turned(self) -> List[Any]:
        """What hooks on the sampled tensors changed: [tensor, places, before, after], JSON values."""
        found = []
        for number, (places, before, after) in self.hooked.items():
            finite = after is not None and bool((before.isfinite() & after.isfinite()).all())
            if finite and not self.torch.equal(before, after):
                found.append([number, places, before.double().tolist(), after.double().tolist()])
        return found

    def _copy(self, number: int, param: Any) -> None:
        grad = param.grad
        if grad is None or sample.why_not(grad) is not None:
            return
        with self.torch.no_grad():
            self.values[number] = sample.view(self.torch, sample.plain(grad), self.chosen[number][1]).clone()
        self.calls[number] += 1

    def changed(self, step: Step) -> bool:
        """Whether a gradient to be used differs from its copy (reads only CPU tensors; True where it cannot tell)."""
        for value, (entry, where) in zip(self.values, self.chosen):
            grad = step.grads[entry.position]
            if value is None or grad is None:
                continue
            if value.device.type != "cpu" or sample.why_not(grad) is not None:
                return True
            if not self.torch.equal(value, sample.view(self.torch, sample.plain(grad), where)):
                return True
        return False


class Gradients(armed.Arms):
    """Arms hooks for the next checked step, and reports what they saw."""

    name = "gradients"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        super().__init__()
        self.known: Set[str] = set()
        """Checksums of what backward started from that have been sent in words."""

    def before(self, step: Step) -> None:
        """Nothing yet: gradients may still be computed by a closure."""

    def ready(self, step: Step) -> None:
        """Hand the copies to link *optimizer*; measure the norm of the gradients about to be used."""
        watch = self.watches.get(step.opt)
        if watch is not None and watch.chosen is not step.sample:
            watch = None  # the groups changed since it was armed
        if watch is not None:
            step.scratch["local"] = watch.values
        memory = step.track.memory.setdefault(self.name, {"changed": False})
        if not memory["changed"]:
            memory["changed"] = watch is not None and watch.changed(step)
        if memory["changed"] or step.index % NORM_EVERY == 1:
            step.scratch[self.name] = _measure(step)

    def after(self, step: Step) -> Any:
        """Report; take the hooks off, and arm those of the next step if it will be checked."""
        watch = self.taken_off(step.opt)
        chosen = step.track.next_sample
        if chosen:
            self.watches[step.opt] = _Watch(step.torch, chosen, self.client.fault)
        if not step.ready:
            return None
        if watch is not None and watch.chosen is not step.sample:
            watch = None
        value: Dict[str, Any] = {"armed": watch is not None, "world": _world(step.torch)}
        if watch is not None:
            value["calls"] = watch.calls
            value["kept"] = watch.kept()
            if watch.tails:
                self._from(watch.tails, value)
            hooked = watch.turned()
            if hooked:
                value["hooked"] = hooked
        scale = step.scratch.get("scale")
        if scale is not None:
            value["scale"] = scale
        measured = step.scratch.get(self.name)
        if measured is not None:
            _report(step, measured, value)
        return value

    def _from(self, tails: List[Any], value: Dict[str, Any]) -> None:
        """What backward started from: by checksum, and in words when it is new."""
        keys = []
        for tail in tails:
            key = lineage.key_of(tail)
            if key not in keys:
                keys.append(key)
            if key not in self.known and len(self.known) < KNOWN_LIMIT:
                self.known.add(key)
                value.setdefault("made_of", {})[key] = tail
        value["from"] = sorted(keys)

    def arm(self, step: Step) -> None:
        """An unchecked step has ended and the next one is checked: put the hooks in place."""
        self.taken_off(step.opt)
        if step.track.next_sample:
            self.watches[step.opt] = _Watch(step.torch, step.track.next_sample, self.client.fault)


def put_first(hooks: Any, own: int) -> None:
    """Have our hook run first. Autograd walks the plain dictionary, which `move_to_end` does not reorder."""
    if len(hooks) > 1:
        others = [(key, hook) for key, hook in hooks.items() if key != own]
        for key, hook in others:
            del hooks[key]
            hooks[key] = hook


def _stamp(grad: Any) -> Optional[Tuple[int, int]]:
    """Where a gradient lies and how often it was written in place; None where there is none or it cannot be told."""
    if grad is None or sample.why_not(grad) is not None or hasattr(grad, "to_local"):
        return None
    try:
        return grad.data_ptr(), grad._version
    except RuntimeError:  # a tensor without memory, or one that inference mode made
        return None


def _place(hook: Any) -> str:
    """`file:line` of the code of a hook, or its type where it has none."""
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    return "%s:%d" % (code.co_filename, code.co_firstlineno) if code is not None else type(hook).__name__


def _measure(step: Step) -> Any:
    """(norms of all gradients on their device, their entries' positions, whether they are shards), or None."""
    step.scratch["scale"] = _scale()
    positions = [i for i, grad in enumerate(step.grads) if grad is not None and sample.why_not(grad) is None]
    if not positions:
        return None
    grads = [step.grads[i] for i in positions]
    sharded = hasattr(grads[0], "to_local")
    return _norms(step.torch, [sample.plain(grad) for grad in grads] if sharded else grads), positions, sharded


def _report(step: Step, measured: Any, value: Dict[str, Any]) -> None:
    norms, positions, sharded = measured
    values = norms.cpu().tolist()
    total = math.hypot(*values)
    value["norm"] = total if math.isfinite(total) else repr(total)
    if sharded:
        value["sharded"] = True
    if 0.0 in values:
        entries = step.track.entries
        value["zero"] = [entries[i].name for i, norm in zip(positions, values) if norm == 0.0][:NAMES_LIMIT]


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
