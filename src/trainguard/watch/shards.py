"""Link *shards*: gradients before they are reduced and scattered, and weights as they were gathered (fully_shard).

With `torch.distributed.fsdp.fully_shard` the optimizer holds a shard of every weight, and the gradient that reaches it
has been reduced already. What backward leaves is the gradient of the gathered weight, an ordinary leaf that lives only
inside fully_shard. For a few tensors of a checked step, in a secret rotation, one rank's shard is drawn, and places in
it: every rank copies its own gradient there the moment backward has added to it, before it is reduced, and the gathered
weight; the rank that holds the shard also reads the reduced gradient and its weight just before the update.

Value of the link (only in checked steps of sharded optimizers; spec/evidence.md "shards"):

    {"world", "rank", "tensors": [[name, rank that holds the shard, [offset, stride, count] in the whole tensor], …],
     "calls": [times backward added to each], "local": blob of this rank's gradients, "gathered": blob of the weights,
     "reduced": blob of the gradients used, "held": blob of the weights, both of this rank's own shards only}
    {"blind": reason}                                                    where that cannot be had

Found through private names of torch (`_get_fsdp_state`), which are only read: where they are others, the link is blind.
Nothing is gathered for this and no collective is called; hooks are put on for one step and taken off again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import armed, roots, sample
from .client import Client
from .gradients import put_first

if TYPE_CHECKING:
    from .engine import Entry, Step

LOOK_EVERY = 64
"""Steps between two looks for the gathered weights of an optimizer's shards."""

Found = Tuple[Dict[int, Any], Optional[str]]
"""Position of an entry → what fully_shard keeps of it; and why there is none."""


class _Watch(armed.Hooks):
    """Hooks on the gathered weights of some shards, for one step."""

    def __init__(self, torch: Any, chosen: List["_Chosen"], fault: Any) -> None:
        super().__init__()
        self.torch = torch
        self.chosen = chosen
        self.calls = [0] * len(chosen)
        self.totals: List[Any] = [None] * len(chosen)
        self.gathered: List[Any] = [None] * len(chosen)
        for number, each in enumerate(chosen):
            self._arm(number, each, fault)

    def _arm(self, number: int, each: "_Chosen", fault: Any) -> None:
        whole = each.kept._unsharded_param

        def copy(param: Any) -> None:
            try:
                with self.torch.no_grad():
                    self._copy(number, each, param)
            except Exception as error:
                fault("shards.copy", error)

        handle = whole.register_post_accumulate_grad_hook(copy)
        self.handles.append(handle)
        put_first(whole._post_accumulate_grad_hooks, handle.id)

    def _copy(self, number: int, each: "_Chosen", param: Any) -> None:
        """Add what this backward pass gives to the reduction; without one (no sync), only when the last has come."""
        if param.grad is None or sample.why_not(param.grad) is not None:
            return
        if each.reduces():
            value = sample.view(self.torch, param.grad, each.where).to(self.torch.float64, copy=True)
            earlier = each.kept.unsharded_accumulated_grad
            if earlier is not None:
                value += sample.view(self.torch, earlier, each.where)
            total = self.totals[number]
            self.totals[number] = value if total is None else total + value
        self.gathered[number] = sample.view(self.torch, param.detach(), each.where).clone()
        self.calls[number] += 1


class _Chosen:
    """One tensor of one step: whose shard of it, and where."""

    __slots__ = ("entry", "group", "inside", "kept", "owner", "where")

    def __init__(self, entry: Entry, kept: Any, group: Any, owner: int, inside: sample.Place, first: int) -> None:
        self.entry = entry
        self.kept = kept
        self.group = group
        self.owner = owner
        """Rank that holds the shard."""
        self.inside = inside
        """Places in the shard."""
        self.where: sample.Place = (first + inside[0], inside[1], inside[2])
        """The same places in the whole tensor."""

    def reduces(self) -> bool:
        """Whether the backward pass that runs now ends with a reduction."""
        return bool(self.group.reduce_grads)


class Shards(armed.Arms):
    """Arms hooks for the next checked step, and reports what they and the owners saw."""

    name = "shards"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        super().__init__()

    def before(self, step: Step) -> None:
        """Nothing yet: gradients may still be computed by a closure."""

    def ready(self, step: Step) -> None:
        """Read the reduced gradients, and the weights before the update, of this rank's own shards."""
        watch = self.watches.get(step.opt)
        if watch is not None:
            step.scratch[self.name] = _owned(step, watch)

    def after(self, step: Step) -> Any:
        """Report; take the hooks off, and arm those of the next step if it will be checked."""
        watch = self.taken_off(step.opt)
        found = self._found(step)
        value: Optional[Dict[str, Any]] = None
        if watch is not None and self.name in step.scratch:
            value = _value(step, watch, step.scratch[self.name])
        elif found is not None and found[1] is not None:
            value = {"blind": found[1]}
        self.arm(step)
        return value

    def arm(self, step: Step) -> None:
        """The next step is checked: put the hooks in place."""
        self.taken_off(step.opt)
        found = self._found(step)
        if step.track.next_full and found is not None and found[0]:
            chosen = _choose(step, found[0])
            if chosen:
                self.watches[step.opt] = _Watch(step.torch, chosen, self.client.fault)

    def _found(self, step: Step) -> Optional[Found]:
        """The gathered weights of this optimizer's shards; None where it holds none."""
        memory = step.track.memory.setdefault(self.name, {"signature": None, "found": None})
        if memory["signature"] is not step.track.signature or step.index % LOOK_EVERY == 0:
            memory["signature"] = step.track.signature
            sharded = step.world() > 1 and any(hasattr(entry.param, "to_local") for entry in step.track.entries)
            memory["found"] = _find(step) if sharded else None
        found: Optional[Found] = memory["found"]
        return found


def _find(step: Step) -> Found:
    """What fully_shard keeps of each parameter, or why that is of no use."""
    kept: Dict[int, Tuple[Any, Any]] = {}
    for root in roots.roots():
        for module in root.modules():
            state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:
                groups = [getattr(state, "_fsdp_param_group", None)]
            for group in groups:
                for each in getattr(group, "fsdp_params", ()):
                    kept[id(each.sharded_param)] = (each, group)
    found: Dict[int, Any] = {}
    reason: Optional[str] = None
    for entry in step.track.entries:
        if not entry.param.requires_grad:
            continue
        why = _why_not(entry.param, kept.get(id(entry.param)), step.world())
        if why is None:
            found[entry.position] = kept[id(entry.param)]
        reason = reason or why
    return found, None if found else reason


def _why_not(param: Any, kept: Any, world: int) -> Optional[str]:
    """Why the gradient of this shard cannot be had before it is reduced, or None."""
    if not hasattr(param, "to_local"):
        return "a weight of the optimizer is no shard"
    if kept is None:
        return "the shards are not those of fully_shard"
    mesh, placements = param.device_mesh, param.placements
    if mesh.ndim != 1 or mesh.size() != world:
        return "weights are sharded over a mesh that is not simply all ranks (replicas of shards, tensor parallel)"
    if not placements[0].is_shard(0):
        return "weights are sharded along another dimension than the first"
    whole = getattr(kept[0], "_unsharded_param", None)
    if whole is None:
        return "weights have never been gathered"
    if hasattr(whole, "to_local") or not hasattr(kept[0], "unsharded_accumulated_grad"):
        return "gathered weights are no plain tensors"
    return None


def _choose(step: Step, found: Dict[int, Any]) -> List[_Chosen]:
    """The next tensors of a secret rotation, one rank's shard of each, and places in it: the same on all ranks."""
    governor = step.engine.governor
    index = step.index + 1
    positions = sorted(found)
    count = min(step.engine.tensors, len(positions))
    first = governor.draw(b"shards", step.opt) + index * count  # told by the step alone, whatever a rank's budget
    chosen = []
    for turn, number in zip(range(first, first + count), governor.draws(b"shard", count, step.opt, index)):
        position = positions[turn % len(positions)]
        entry = step.track.entries[position]
        kept, group = found[position]
        shape = tuple(entry.param.shape)
        rows, inner = shape[0], entry.param.numel() // max(1, shape[0])
        per_rank = -(-rows // step.world())
        owners = -(-rows // per_rank) if per_rank else 0
        if not owners or not inner:
            continue
        part = number % owners
        start, end = part * per_rank, min(rows, (part + 1) * per_rank)
        inside = sample.place((end - start) * inner, step.engine.elements, number // owners)
        owner = int(entry.param.device_mesh.mesh[part])
        chosen.append(_Chosen(entry, kept, group, owner, inside, start * inner))
    return chosen


def _owned(step: Step, watch: _Watch) -> Dict[int, Tuple[Any, Any]]:
    """Number of a chosen tensor whose shard is ours → its reduced gradient, and the weight as others gather it."""
    rank, torch = int(step.torch.distributed.get_rank()), step.torch
    owned: Dict[int, Tuple[Any, Any]] = {}
    for number, each in enumerate(watch.chosen):
        grad = each.entry.param.grad
        if each.owner != rank or grad is None or watch.gathered[number] is None:
            continue
        used = sample.view(torch, sample.plain(grad), each.inside).clone()
        weight = sample.view(torch, sample.plain(each.entry.param.detach()), each.inside)
        owned[number] = (used, weight.to(watch.gathered[number].dtype, copy=True))
    return owned


def _value(step: Step, watch: _Watch, owned: Dict[int, Tuple[Any, Any]]) -> Dict[str, Any]:
    torch = step.torch
    seen = [n for n in range(len(watch.chosen)) if watch.totals[n] is not None]
    tensors = [watch.chosen[n] for n in seen]
    value: Dict[str, Any] = {
        "world": step.world(),
        "rank": int(torch.distributed.get_rank()),
        "tensors": [[each.entry.name, each.owner, each.where] for each in tensors],
        "calls": [watch.calls[n] for n in seen],
        "local": _blob(torch, [watch.totals[n] for n in seen]),
        "gathered": _blob(torch, [watch.gathered[n] for n in seen]),
        "reduced": _blob(torch, [owned[n][0] for n in seen if n in owned]),
        "held": _blob(torch, [owned[n][1] for n in seen if n in owned]),
    }
    return value


def _blob(torch: Any, parts: List[Any]) -> Dict[str, str]:
    if not parts:
        return sample.blob("<d", b"")
    return sample.blob(*sample.raw(torch, torch.cat([part.to(torch.float64).cpu() for part in parts])))
