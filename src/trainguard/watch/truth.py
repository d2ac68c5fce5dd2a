"""Link *truth*: is the gradient that backward reports the derivative of the loss that the forward pass computed?

Now and then an interval between two steps is put on a tape (tape.py). When its gradients are final, and before the
update, the tape is replayed in float64: once as it was, which must give the loss that the job saw, and twice with all
weights moved a little, along and against one direction d. For a true gradient g the loss changes by ⟨g, d⟩.

d covers every tensor at once and gives each the same say: for tensor k with gradient g_k and s_k = max(‖g_k‖, FLOOR ·
largest ‖g‖), d_k = (c_k g_k / s_k + e_k) / s_k, where c_k in [0.5, 1.5] and the signs e_k = ±1 are secret. The first
part makes a wrong sign or scale of any one tensor show as a number near 1, the second makes gradients show that were
set to zero or lost a part. Where the two do not agree, halves of the tensors are tried until the ones are named.

Value of the link (spec/evidence.md "truth"), only in steps whose interval was on tape:

    {"tensors": n, "left_out": {reason: n}, "expected": ⟨g, d⟩, "plus": …, "minus": …  slopes along d and against it,
     "step": size of the move, "loss": [as the job computed it, as replayed], "roots": n, "nodes": n, "low": bool,
     "device": "cpu", "seeds": [[gradient that backward was given, place]] where it is not 1,
     "sources": [[class, place]] custom autograd functions in the graph, "hooks": [places] on tensors in the graph,
     "odd": [[name, expected, found]] tensors whose part does not agree, "cost_ns": n}
    {"blind": reason}; with "losses" (loss.py) where only the gradients could not be compared

The gradients compared are those right after backward, before any reducer, clip or scaler had them.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import sample, tape
from .client import Client
from .loss import Losses

if TYPE_CHECKING:
    from .engine import Step, Track

EVERY = 500
"""Steps from one check to the next, at least."""

EVERY_ALL = 6
"""The same where every check is asked for."""

FIRST_WITHIN = 10
SHARE = 0.0025
"""Of the wall time, at most, over the long run."""

PRESSED_SHARE = 0.001
"""The same while the governor is pressed: steps so short that looking at one in 64 is more than the budget."""

CREDIT_SECONDS = 4.0
"""What the first check may cost by estimate; with larger steps it waits until SHARE has paid for it."""

CREDIT_CHECKS = 3
"""Checks of an optimizer that need not wait until SHARE has paid for them, while all together cost less than
CREDIT_SECONDS: with short steps these would else pay for tens of thousands of steps."""

STEPS_PER_CHECK = 4.0
"""Estimated price of a check, in steps, before one was made."""

RECHECKS = 3
FLOOR = 1e-3
MOVE = 1e-6
"""Largest relative move of a tensor, by root mean square."""
WEIGHT_FLOOR = 1e-2
MOVES = (1.0, 32.0, 1.0 / 32.0)
"""If the slopes along d and against it differ, larger and smaller moves are tried."""
SMOOTH = 0.25
"""Slopes that differ by more than this share of the tolerance are no basis: the loss has a kink here."""
ROUGH = (1e-2, 3e-1)
"""Disagreement over √tensors from which tensors are looked for: full and half precision."""
LOSS_ROUGH = (1e-3, 5e-2)
MEASURES_LIMIT = 24
ODD_LIMIT = 8
MEMORY_SHARE = 0.25
BYTES_PER_ELEMENT = 40


SAME = 1e-5
"""Relative to the largest element: a weight that was written to is what it was when it was used."""


class _Leaf:
    """What backward did to one parameter in the interval."""

    __slots__ = ("calls", "grad", "reason", "seen", "start")

    def __init__(self) -> None:
        self.calls = 0
        self.start = 0
        """First root whose gradient is in it."""
        self.seen: Any = None
        self.grad: Any = None
        self.reason: Optional[str] = None


class _Watch:
    """One interval of one optimizer on tape."""

    def __init__(self, link: "Truth", step: Step) -> None:
        torch = step.torch
        self.torch = torch
        self.opt = step.opt
        self.fault = link.client.fault
        self.began_ns = time.thread_time_ns()
        self.entries = step.track.entries
        self.leaves = [_Leaf() for _ in self.entries]
        self.handles: List[Any] = []
        for number, entry in enumerate(self.entries):
            if entry.param.requires_grad and entry.param.is_leaf and entry.reason is None:
                self._hook(number, entry.param)
            if entry.param.grad is not None:
                self.leaves[number].seen = (id(entry.param.grad), entry.param.grad._version)
                self.leaves[number].start = -1  # holds what came before the tape, unless it is cleared
        self.tape = tape.Tape(torch, link.client.fault, self._root, link.kinds)
        self.losses = Losses(self.tape, link.client.fault)
        self.tape.observer = self.losses
        self.tape.start()

    def _hook(self, number: int, param: Any) -> None:
        leaf = self.leaves[number]

        def note(tensor: Any) -> None:
            try:
                grad = tensor.grad
                leaf.calls += 1
                if grad is None or sample.why_not(grad) is not None:
                    leaf.reason = "sparse gradients"
                    return
                with self.torch.no_grad():
                    leaf.grad = grad.detach().clone()
                leaf.seen = (id(grad), grad._version)
            except Exception as error:
                leaf.reason = "could not be read"
                self.fault("truth.note", error)

        handle = param.register_post_accumulate_grad_hook(note)
        self.handles.append(handle)
        _first(param._post_accumulate_grad_hooks, handle.id)

    def _root(self, index: int) -> None:
        """Backward begins: which parameters start from nothing?"""
        for entry, leaf in zip(self.entries, self.leaves):
            grad = entry.param.grad
            if grad is None:
                leaf.start, leaf.grad = index, None
                continue
            if leaf.seen == (id(grad), grad._version):
                continue
            with self.torch.no_grad():
                if sample.why_not(grad) is None and not bool(grad.any()):
                    leaf.start, leaf.grad = index, None
                else:
                    leaf.reason = "gradients were changed between two backward passes"

    def stop(self) -> bool:
        """Take everything off again; False when the mode could not be left yet."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        return self.tape.stop()


class Truth:
    """Puts an interval on tape now and then, and compares."""

    name = "truth"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.everything = client.settings.get("links") == "all"
        self.every = int(client.settings.get("truth_every", EVERY_ALL if self.everything else EVERY))
        """Steps between checks; 0: none is made."""
        self.watch: Optional[_Watch] = None
        self.left: List[tape.Tape] = []
        """Tapes whose mode has not been left yet."""
        self.kinds: Dict[Any, Any] = {}
        self.earned_ns = 0.0
        """What the share of the time has paid for so far."""
        self.paid_until_ns = time.perf_counter_ns()
        self.spent_ns = 0.0
        self.cost_ns = 0.0
        """What the last check cost."""
        self.dearest_ns = 0.0
        """What the dearest one cost."""

    def before(self, step: Step) -> None:
        """Nothing yet: gradients may still be computed by a closure."""
        if self.left:
            self.left = [each for each in self.left if not each.stop()]
        watch = self.watch
        if watch is not None and watch.opt == step.opt and watch.entries is not step.track.entries:
            self._drop()  # the groups changed

    def ready(self, step: Step) -> None:
        """The gradients are final."""
        watch = self.watch
        if watch is None or watch.opt != step.opt:
            return
        self._drop()
        memory = self._memory(step)
        try:
            step.scratch[self.name] = {"value": self._value(step, watch)}
        finally:
            cost = float(time.thread_time_ns() - watch.began_ns)
            work = max(0.0, cost - step.wall_ns)
            self.cost_ns = max(work, cost / 4)
            self.spent_ns += self.cost_ns
            self.dearest_ns = max(self.dearest_ns, self.cost_ns)
            memory["next"] = step.index + self.every

    def after(self, step: Step) -> Any:
        """Report; decide whether the next interval is put on tape."""
        if not self.every:
            return None
        value = (step.scratch.get(self.name) or {}).get("value")
        if value is not None:
            self._plan(step, self._memory(step), value)
        elif step.track.next_full:
            reason = self._start(step)
            value = {"blind": reason} if reason else None
        return value

    def arm(self, step: Step) -> None:
        """An unchecked step before a checked one: as `after`."""
        if self.every:
            self._memory(step)["unsaid"] = self._start(step) or self._memory(step).get("unsaid")

    def forget(self, opt: int) -> None:
        """The optimizer is gone."""
        if self.watch is not None and self.watch.opt == opt:
            self._drop()

    def forked(self) -> None:
        """A child does not record for its parent."""
        if self.watch is not None:
            self._drop()

    # -- when -------------------------------------------------------------------------------------------------

    def _memory(self, step: Step) -> Dict[str, Any]:
        memory: Optional[Dict[str, Any]] = step.track.memory.get(self.name)
        if memory is None:
            first = 1 + step.engine.governor.draw(b"truth", step.opt) % FIRST_WITHIN
            memory = step.track.memory[self.name] = {"next": min(first, self.every), "rechecks": 0, "said": None}
        return memory

    def _start(self, step: Step) -> Optional[str]:
        """Put the interval that begins on tape, if it is time; otherwise why not, if that is new."""
        memory = self._memory(step)
        unsaid: Optional[str] = memory.pop("unsaid", None)
        if step.index < memory["next"] or self.watch is not None:
            return unsaid
        reason = self._reason(step)
        if reason is None:
            self.watch = _Watch(self, step)
        elif reason:
            memory["next"] = step.index + self.every
            if reason != memory["said"]:
                memory["said"] = unsaid = reason
        return unsaid

    def _plan(self, step: Step, memory: Dict[str, Any], value: Dict[str, Any]) -> None:
        """When to look again: soon after what does not agree, twice at the start, then rarely."""
        if "blind" in value:
            memory["blind"] = memory.get("blind", 0) + 1
            memory["next"] = step.index + (1 if memory["blind"] < 3 else self.every)
        elif value["odd"] and memory["rechecks"] < RECHECKS:
            memory["rechecks"] += 1
            memory["next"] = step.index + 1
        elif step.index < step.engine.governor.always:
            memory["next"] = step.index + min(self.every, FIRST_WITHIN)
        elif not self.everything:
            turn = step.engine.governor.draw(b"truth", step.opt, step.index) % max(1, self.every // 2)
            memory["next"] = step.index + self.every - self.every // 4 + turn

    def _reason(self, step: Step) -> Optional[str]:
        """Why this interval cannot be put on tape; "" when it is only too early."""
        torch = step.torch
        reason = tape.unsupported(torch) or _compiled()
        if reason:
            return reason
        if sys.modules["torch.utils._python_dispatch"]._get_current_dispatch_mode_stack():
            return "another dispatch mode is in force"
        if any(hasattr(entry.param, "to_local") for entry in step.track.entries[:4]):
            return "parameters are shards"
        if any(sample.shared(entry.param) for entry in step.track.entries[:4]):
            return "parameters are in shared memory"
        if not self._affordable(step):
            return ""
        return _memory(torch, step.track)

    def _affordable(self, step: Step) -> bool:
        if self.everything:
            return True
        governor = step.engine.governor
        price = self.cost_ns or STEPS_PER_CHECK * max(step.wall_ns, governor.wall_ns)
        now = time.perf_counter_ns()
        self.earned_ns += (PRESSED_SHARE if governor.pressed else SHARE) * (now - self.paid_until_ns)
        self.paid_until_ns = now
        credit = CREDIT_SECONDS * 1e9
        if self.cost_ns:
            checks = CREDIT_CHECKS * len(step.engine.tracks) + self._memory(step)["rechecks"]
            credit = max(2 * price, min(checks * self.dearest_ns, credit))
        return self.spent_ns + price <= credit + self.earned_ns

    def _drop(self) -> None:
        watch, self.watch = self.watch, None
        if watch is not None and not watch.stop():
            watch.tape.fail("left")
            self.left.append(watch.tape)

    # -- the comparison ---------------------------------------------------------------------------------------

    def _value(self, step: Step, watch: _Watch) -> Dict[str, Any]:
        problem = watch.tape.problem or (None if watch.tape.roots else "no backward pass was seen")
        if problem is not None:
            return {"blind": problem}
        torch = step.torch
        with torch.no_grad(), torch._C.DisableTorchFunction(), _no_autocast(torch):
            try:
                return _Comparison(step, watch).value()
            except (RuntimeError, NotImplementedError, TypeError, IndexError, KeyError) as error:
                return {"blind": "an operator could not be run again in double precision: %s" % _short(error)}


class _Comparison:
    """One tape against the gradients it left."""

    def __init__(self, step: Step, watch: _Watch) -> None:
        self.step = step
        self.torch = step.torch
        self.watch = watch
        self.left_out: Dict[str, int] = {}
        self.names: List[str] = []
        self.slots: List[int] = []
        self.grads: List[Any] = []
        start = self._start()
        self.roots = watch.tape.roots[start:]
        self.replay = tape.Replay(watch.tape, self.roots)
        self._collect(start)
        self.directions: List[Any] = []
        self.expected: List[float] = []
        self.largest: List[float] = []
        self.rough = ROUGH[0]

    def _start(self) -> int:
        """The first root that counts, for most tensors."""
        starts = [leaf.start for leaf in self.watch.leaves if leaf.calls and leaf.reason is None and leaf.start >= 0]
        return max(set(starts), key=starts.count) if starts else 0

    def _collect(self, start: int) -> None:
        slots = self.replay.weights()
        for entry, leaf in zip(self.watch.entries, self.watch.leaves):
            reason = self._why_not(entry, leaf, start, slots)
            if reason is not None:
                self.left_out[reason] = self.left_out.get(reason, 0) + 1
                continue
            self.names.append(entry.name)
            self.slots.append(slots[id(entry.param)])
            grad = leaf.grad if leaf.calls else None
            self.grads.append(None if grad is None else grad.to(self.torch.float64))

    def _why_not(self, entry: Any, leaf: _Leaf, start: int, slots: Dict[int, int]) -> Optional[str]:
        if not entry.param.requires_grad:
            return "requires no gradient"
        if entry.reason is not None:
            return str(entry.reason)
        if id(entry.param) not in slots:
            return "takes no part in the loss"
        if leaf.reason is not None:
            return leaf.reason
        if leaf.grad is not None and leaf.start != start:
            return "gradients of another stretch of the step"
        return None

    def value(self) -> Dict[str, Any]:
        """The frame's value."""
        watch, replay = self.watch, self.replay
        if replay.stale is not None:
            return {"blind": replay.stale}
        watch.losses.want(replay)
        overwritten = replay.overwritten()
        replay.wanted.update(dict.fromkeys(overwritten))
        base = replay.run()
        if any(_stays(weight, replay.wanted.get(slot)) for slot, weight in overwritten.items()):
            return {"blind": "a weight was written to before it was used"}
        if not self.slots:
            return self._losses_only(base)
        seen = sum(_seen(self.torch, root) for root in self.roots)
        value: Dict[str, Any] = {
            "tensors": len(self.slots),
            "left_out": self.left_out,
            "loss": [seen, base],
            "roots": len(self.roots),
            "nodes": len(replay.nodes),
            "low": self._low(),
            "device": self.step.track.entries[0].param.device.type,
            "sources": _merged(self.roots),
            "hooks": watch.tape.hooks,
            "seeds": self._seeds(),
        }
        losses = watch.losses.value(replay, self.roots, base)
        if losses:
            value["losses"] = losses
        if not math.isfinite(base) or not math.isfinite(seen):
            return {"blind": "the loss is not finite"}
        if abs(base - seen) > LOSS_ROUGH[value["low"]] * max(abs(seen), abs(base), 1e-3):
            return {"blind": "the forward pass, run again, gives %.6g and not %.6g" % (base, seen)}
        self._compare(base, value)
        value["cost_ns"] = time.thread_time_ns() - watch.began_ns
        return value

    def _losses_only(self, base: float) -> Dict[str, Any]:
        """No gradient can be compared; by what the losses were multiplied can still be said."""
        value: Dict[str, Any] = {"blind": "no parameter takes part in what backward started from"}
        if self.left_out:
            value["blind"] = "no gradient can be compared: %s" % max(self.left_out, key=lambda key: self.left_out[key])
        losses = self.watch.losses.value(self.replay, self.roots, base)
        if losses:
            value["losses"] = losses
        return value

    def _compare(self, base: float, value: Dict[str, Any]) -> None:
        self._directions()
        everything = list(range(len(self.slots)))
        rough = self.rough = ROUGH[value["low"]]
        expected, plus, minus, move = self._measure(everything, base)
        value.update(expected=expected, plus=plus, minus=minus, step=move, odd=[])
        smooth = abs(plus - minus) <= SMOOTH * rough * math.sqrt(len(everything))
        if smooth and not _agree(expected, plus, minus, len(everything), rough):
            value["odd"] = self._search(everything, base, rough)

    def _directions(self) -> None:
        torch, count = self.torch, len(self.slots)
        norms = [0.0 if grad is None else float(grad.norm()) for grad in self.grads]
        floor = FLOOR * max(norms) or 1.0
        numbers = self.step.engine.governor.draws(b"direction", count, self.step.opt, self.step.index)
        constants = self.watch.tape.constants
        for slot, grad, norm, number in zip(self.slots, self.grads, norms, numbers):
            weight = constants[slot].tensor.detach()
            generator = torch.Generator(device=weight.device)
            generator.manual_seed(number & 0x7FFFFFFFFFFFFFFF)
            signs = torch.empty(weight.shape, dtype=torch.float64, device=weight.device)
            signs.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)
            scale = max(norm, floor)
            along = 0.5 + ((number >> 64) & 0xFFFFFFFF) / 2.0**32
            direction = signs / scale if grad is None else (grad * (along / scale) + signs) / scale
            self.directions.append(direction)
            self.expected.append(0.0 if grad is None else float((grad * direction).sum()))
            rms = float(direction.norm()) / math.sqrt(weight.numel())
            self.largest.append(
                rms / max(float(weight.to(torch.float64).norm()) / math.sqrt(weight.numel()), WEIGHT_FLOOR)
            )

    def _measure(self, chosen: List[int], base: float) -> Tuple[float, float, float, float]:
        """Expected slope, slopes along and against the direction of some tensors, and the move."""
        size = MOVE / max(self.largest[i] for i in chosen)
        expected = math.fsum(self.expected[i] for i in chosen)
        best = (math.inf, 0.0, 0.0, size)
        for factor in MOVES:
            move = size * factor
            plus = (self._shifted(chosen, move) - base) / move
            minus = (base - self._shifted(chosen, -move)) / move
            best = min(best, (abs(plus - minus), plus, minus, move))
            if best[0] <= SMOOTH * self.rough * math.sqrt(len(chosen)):
                break
        return (expected, *best[1:])

    def _shifted(self, chosen: List[int], move: float) -> float:
        return self.replay.run({self.slots[i]: self.directions[i] * move for i in chosen})

    def _search(self, everything: List[int], base: float, rough: float) -> List[List[Any]]:
        """The tensors that do not agree, by halves."""
        odd: List[List[Any]] = []
        waiting, measures = [everything], 0
        while waiting and measures < MEASURES_LIMIT and len(odd) < ODD_LIMIT:
            group = waiting.pop()
            if group is not everything:
                expected, plus, minus, _ = self._measure(group, base)
                measures += 1
                if _agree(expected, plus, minus, len(group), rough):
                    continue
                if len(group) == 1:
                    if abs(plus - minus) <= SMOOTH * rough:
                        odd.append([self.names[group[0]], expected, (plus + minus) / 2])
                    continue
            elif len(group) == 1:
                expected, plus, minus, _ = self._measure(group, base)
                return [[self.names[0], expected, (plus + minus) / 2]]
            half = len(group) // 2
            waiting += [group[:half], group[half:]]
        return odd

    def _low(self) -> bool:
        """Whether the job computed with less than single precision."""
        return bool(self.watch.tape.low) or _tensor_float(self.torch, self.step.track)

    def _seeds(self) -> List[List[Any]]:
        found: List[List[Any]] = []
        for root in self.roots:
            if root.seed is None:
                continue
            if root.seed.numel() != 1:
                found.append([None, root.place])
            elif float(root.seed) != 1.0:
                found.append([float(root.seed), root.place])
        return found[:8]


def _agree(expected: float, plus: float, minus: float, count: int, rough: float) -> bool:
    return abs((plus + minus) / 2 - expected) <= rough * math.sqrt(count)


def _stays(weight: Any, used: Any) -> bool:
    """Whether a weight still is what was written to it on tape and then used: averages, slow weights, a rollback.

    One that was put back meanwhile is not: the loss was then not that of the weights that the optimizer holds.
    """
    if used is None or used.shape != weight.shape:
        return False
    apart = (weight.detach().to(used.dtype) - used).abs().max()
    return bool(apart <= SAME * used.abs().max())


def _seen(torch: Any, root: Any) -> float:
    value = root.value.to(torch.float64)
    return float((value if root.seed is None else value * root.seed.to(torch.float64)).sum())


def _merged(roots: List[tape.Root]) -> List[List[str]]:
    out: List[List[str]] = []
    for root in roots:
        out.extend(entry for entry in root.sources if entry not in out)
    return out[: tape.SOURCES_LIMIT]


def _tensor_float(torch: Any, track: Track) -> bool:
    if not track.entries or track.entries[0].param.device.type != "cuda":
        return False
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


def _compiled() -> Optional[str]:
    """Compiling would turn out otherwise under a dispatch mode."""
    frame = sys.modules.get("torch._dynamo.convert_frame")
    evaluation = sys.modules.get("torch._dynamo.eval_frame")
    backends = getattr(evaluation, "cached_backends", None) or {}
    if getattr(frame, "FRAME_COUNTER", None) or any(callable(each) for each in backends.values()):
        return "the job compiles code"
    return None


def _memory(torch: Any, track: Track) -> Optional[str]:
    need = sum(entry.numel for entry in track.entries) * BYTES_PER_ELEMENT
    device = track.entries[0].param.device if track.entries else None
    if device is not None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = _available_bytes()
    return "too little memory to replay a step" if need > MEMORY_SHARE * free else None


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo", "rb") as file:
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 1 << 62


def _no_autocast(torch: Any) -> Any:
    import contextlib

    stack = contextlib.ExitStack()
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _first(hooks: Any, own: int) -> None:
    """Have our hook run first (as in gradients.py)."""
    others = [(key, hook) for key, hook in hooks.items() if key != own]
    for key, hook in others:
        del hooks[key]
        hooks[key] = hook


def _short(error: BaseException) -> str:
    return ("%s: %s" % (type(error).__name__, str(error).split("\n", 1)[0]))[:160]
