"""Link *weights*: between two steps of an optimizer, its weights and its state stay as the update left them.

After a step whose successor will be checked, a run of elements of every tensor and of its optimizer state is read;
before that successor the same elements are read again. Nobody but the optimizer may have changed them.

Value of the link (spec/evidence.md "weights"):

    {"after": digest of the sample taken after this step, "tensors": how many it covers}
    {"before": digest of the same elements before this step, "expected": digest taken after the step before,
     "held": bool, "changed": [{"name", "what": "weight" | state key, "differ": n, "of": n, "old": blob, "new": blob,
     "at": [offset, stride, count]}] at most 8, "changed_tensors": n}        in checked steps
    {"whole": {"tensors": n, "changed": [names, at most 8]}}                  in checked steps, tensors on the CPU
    {"writers": [{"op", "name", "stack": ["file:line:function", …]}]}         after an interval that was watched for
    {"off": reason}                                                           where the relation cannot hold
    {"replaced": true}       the optimizer's state was replaced as a whole (load_state_dict); weights are compared

A sample cannot see one element of a large tensor. So the bytes of whole tensors are summed as well, before and after
the same intervals: as many tensors as WHOLE_ELEMENTS allow, in turns, which is all of them for a small model.

After the first change that came from outside, the next interval runs under a TorchDispatchMode that names the
operation and the line that writes to a weight: it passes every operation on unchanged. At most 4 intervals of an
optimizer, and never while another mode is active or a model is compiled.
"""

from __future__ import annotations

import hashlib
import operator
import sys
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import sample
from .client import Client
from .optimizer import SCALARS

if TYPE_CHECKING:
    from .engine import Entry, Step, Track

TENSORS_LIMIT = 128
"""Tensors per sample; where an optimizer holds more, they take turns."""
VALUES_TARGET = 2048
ROUNDS = 32
"""Samples taken at the same places before new places are drawn (making views costs more than reading them)."""
ARM_LIMIT = 4
CHANGED_LIMIT = 8
WHOLE_ELEMENTS = 1 << 20
"""Elements summed whole per interval: about 0.2 ms."""
WRITERS_LIMIT = 16
STACK_LIMIT = 6


class _Snapshot:
    """Views on a set of places, and the bytes last read there."""

    def __init__(self, torch: Any, track: Track, optimizer: Any, chosen: List[Tuple[Entry, sample.Place]]) -> None:
        self.chosen = chosen
        self.state = optimizer.state
        self.rounds = 0
        self.kind = ""
        self.data = b""
        self.digest = ""
        self.slots: List[Tuple[Entry, str, sample.Place]] = []
        """What each view shows: entry, "weight" or state key, place."""
        self.params: List[Any] = []
        self.held: List[Tuple[Dict[Any, Any], Any]] = []
        """(a parameter's state, key), for every slot that shows state; these come after the weights."""
        for entry, where in chosen:
            self.slots.append((entry, "weight", where))
            self.params.append(entry.param)
        for entry, where in chosen:
            held = optimizer.state.get(entry.param) or {}
            for key, value in held.items():
                if not isinstance(value, torch.Tensor) or key in SCALARS or value.shape != entry.param.shape:
                    continue
                if sample.why_not(value) is None:
                    self.slots.append((entry, str(key), where))
                    self.held.append((held, key))
        self._look(torch)

    def _look(self, torch: Any) -> None:
        self.pointers = list(map(torch.Tensor.data_ptr, self.params))
        self.values = [held[key] for held, key in self.held]
        tensors = [sample.plain(tensor) for tensor in self.params + self.values]
        self.views = [sample.view(torch, tensor, slot[2]) for tensor, slot in zip(tensors, self.slots)]
        self.copied = any(not tensor.is_contiguous() for tensor in tensors)

    def read(self, torch: Any) -> Tuple[str, bytes]:
        """The values now. Looks again where a tensor's memory has moved or where looking makes a copy."""
        moved = self.copied or list(map(torch.Tensor.data_ptr, self.params)) != self.pointers
        if moved or not all(map(operator.is_, [held[key] for held, key in self.held], self.values)):
            self._look(torch)
        return sample.Gathered(torch, self.views).raw(torch)


class Weights:
    """Takes a sample after the update, and compares it before the next."""

    name = "weights"
    every_step = True

    def __init__(self, client: Client) -> None:
        self.client = client
        self.stray: Dict[int, _Watcher] = {}
        """Index of the optimizer → dispatch mode armed for the interval before its next step."""

    def before(self, step: Step) -> None:
        """Compare with the sample taken after the last step; name the writers if the interval was watched."""
        memory = step.track.memory.setdefault(self.name, {"pending": None, "arms": 0, "off": None, "gaps": []})
        value: Dict[str, Any] = {}
        watcher = self.stray.pop(step.opt, None)
        if watcher is not None:
            value["writers"] = watcher.stop()
        snapshot: Optional[_Snapshot] = memory["pending"]
        memory["pending"] = None
        if step.full and snapshot is not None:
            self._compare(step, snapshot, value)
            _compare_whole(step, memory, value)
        step.scratch[self.name] = value
        for other in step.track.shares:
            _forget(step, other)

    def after(self, step: Step) -> Any:
        """Take the sample for the next step, if that one will be checked."""
        value: Dict[str, Any] = step.scratch.get(self.name) or {}
        memory = step.track.memory[self.name]
        if step.index == 1 or step.index % 64 == 0:
            memory["off"] = _off(step)
        if memory["off"] is not None:
            return {"off": memory["off"]} if step.full else None
        if step.track.next_full:
            self._take(step, memory, value)
            self._arm(step, memory, value)
        for other in step.track.shares:
            _forget(step, other)
        return value or None

    def _take(self, step: Step, memory: Dict[str, Any], value: Dict[str, Any]) -> None:
        snapshot: Optional[_Snapshot] = memory.get("snapshot")
        if snapshot is None or snapshot.rounds >= ROUNDS or not _same(step, snapshot, memory):
            chosen = _choose(step)
            if not chosen:
                return
            snapshot = _Snapshot(step.torch, step.track, step.optimizer, chosen)
            memory["snapshot"] = snapshot
            memory["entries"] = step.track.signature
            memory["keys"] = _key_count(step)
        snapshot.rounds += 1
        snapshot.kind, snapshot.data = snapshot.read(step.torch)
        snapshot.digest = _digest(snapshot.data)
        memory["pending"] = snapshot
        memory["whole"] = _whole(step, memory)
        value["after"] = snapshot.digest
        value["tensors"] = len(snapshot.chosen)

    def _compare(self, step: Step, snapshot: _Snapshot, value: Dict[str, Any]) -> None:
        replaced = step.optimizer.state is not snapshot.state
        kind, data = snapshot.read(step.torch)
        value["before"] = _digest(data)
        value["expected"] = snapshot.digest
        value["held"] = data == snapshot.data and kind == snapshot.kind
        if replaced:
            value["replaced"] = True
            step.track.memory[self.name]["snapshot"] = None
        if not value["held"]:
            value["changed"], value["changed_tensors"] = _changes(snapshot, kind, data)

    def _arm(self, step: Step, memory: Dict[str, Any], value: Dict[str, Any]) -> None:
        if value.get("held") is False:
            memory["gaps"] = [*memory["gaps"][-1:], step.index]
        gaps = memory["gaps"]
        if not gaps or memory["arms"] >= ARM_LIMIT:
            return
        due = gaps[-1] + (gaps[-1] - gaps[-2] if len(gaps) == 2 else 1)
        if step.index + 1 == due or (value.get("held") is False and memory["arms"] == 0):
            watcher = _watcher(step)
            if watcher is not None:
                memory["arms"] += 1
                self.stray[step.opt] = watcher
                watcher.start()

    def forked(self) -> None:
        """The parent's modes are not this child's."""
        for watcher in self.stray.values():
            watcher.stop()


def _whole(step: Step, memory: Dict[str, Any]) -> Tuple[List[Entry], Any]:
    """The next tensors in turn, and the sums of their bytes."""
    pool = [e for e in step.track.entries if e.reason is None and _summable(e.param)]
    chosen: List[Entry] = []
    total, start = 0, memory.get("turn", 0)
    for offset in range(len(pool)):
        entry = pool[(start + offset) % len(pool)]
        if chosen and total + entry.numel > WHOLE_ELEMENTS:
            break
        chosen.append(entry)
        total += entry.numel
    memory["turn"] = (start + len(chosen)) % max(1, len(pool))
    return chosen, [_sum(step.torch, entry.param) for entry in chosen]


def _compare_whole(step: Step, memory: Dict[str, Any], value: Dict[str, Any]) -> None:
    chosen, sums = memory.get("whole") or ([], [])
    if not chosen:
        return
    now = [_sum(step.torch, entry.param) if _summable(entry.param) else None for entry in chosen]
    changed = [entry.name for entry, old, new in zip(chosen, sums, now) if old != new]
    value["whole"] = {"tensors": len(chosen), "changed": changed[:CHANGED_LIMIT]}


def _summable(param: Any) -> bool:
    """On the CPU (a GPU would have to be waited for), plain and in one piece."""
    return type(param.data).__name__ == "Tensor" and param.device.type == "cpu" and param.is_contiguous()


def _sum(torch: Any, param: Any) -> int:
    """The tensor's bytes as integers, summed modulo 2**64: one changed element always shows."""
    flat = param.detach().reshape(-1)
    size = flat.numel() * flat.element_size()
    return int(flat.view(torch.int64 if size % 8 == 0 and size else torch.uint8).sum(dtype=torch.int64))


def _forget(step: Step, opt: int) -> None:
    """Another optimizer holds some of these parameters: what it left behind is no longer the last word."""
    for track in list(step.engine.tracks.values()):
        if track.opt == opt and Weights.name in track.memory:
            track.memory[Weights.name]["pending"] = None


def _off(step: Step) -> Optional[str]:
    for entry in step.track.entries[:4]:
        if entry.param.device.type == "cpu" and entry.param.is_shared():
            return "parameters are in shared memory; other processes write to them"
    return None


def _choose(step: Step) -> List[Tuple[Entry, sample.Place]]:
    pool = [entry for entry in step.track.entries if entry.reason is None]
    count = min(len(pool), TENSORS_LIMIT)
    if not count:
        return []
    draw = step.engine.governor.draw
    elements = max(8, min(64, VALUES_TARGET // count))
    first = draw(b"window", step.opt, step.index) % len(pool)
    chosen = [pool[(first + turn) % len(pool)] for turn in range(count)]
    return [
        (entry, sample.run(entry.numel, elements, draw(b"weight", step.opt, step.index, entry.position)))
        for entry in chosen
    ]


def _key_count(step: Step) -> int:
    return sum(map(len, step.optimizer.state.values()))


def _same(step: Step, snapshot: _Snapshot, memory: Dict[str, Any]) -> bool:
    if step.optimizer.state is not snapshot.state or memory.get("entries") is not step.track.signature:
        return False
    return bool(memory.get("keys") == _key_count(step))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _changes(snapshot: _Snapshot, kind: str, data: bytes) -> Tuple[List[Dict[str, Any]], int]:
    """Which slots differ, with old and new values of the first few."""
    out: List[Dict[str, Any]] = []
    total = 0
    if kind != snapshot.kind or len(data) != len(snapshot.data):
        return [{"name": "", "what": "dtype", "differ": 0, "of": 0}], 1
    size = 4 if kind == "<f" else 8
    position = 0
    for entry, what, where in snapshot.slots:
        end = position + where[2] * size
        old, new = snapshot.data[position:end], data[position:end]
        position = end
        if old == new:
            continue
        total += 1
        if len(out) < CHANGED_LIMIT:
            differ = sum(old[i : i + size] != new[i : i + size] for i in range(0, len(old), size))
            out.append(
                {
                    "name": entry.name,
                    "what": what,
                    "differ": differ,
                    "of": where[2],
                    "at": where,
                    "old": sample.blob(kind, old),
                    "new": sample.blob(kind, new),
                }
            )
    return out, total


class _Watcher:
    """Names the operations that write to some tensors, for one interval, in this thread."""

    def __init__(self, torch: Any, names: Dict[int, str]) -> None:
        self.names = names
        """Address of a storage → name of the tensor in it."""
        self.found: List[Dict[str, Any]] = []
        self.folder = torch.__file__.rsplit("/", 1)[0] + "/"
        watcher = self

        class Mode(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                try:
                    watcher.see(func, args, kwargs or {})
                except Exception:
                    pass
                return result

        self.mode = Mode()

    def start(self) -> None:
        """Enter the mode."""
        self.mode.__enter__()

    def stop(self) -> List[Dict[str, Any]]:
        """Leave the mode, if it is still the innermost one; returns what was seen."""
        stack = sys.modules["torch.utils._python_dispatch"]._get_current_dispatch_mode_stack()
        if stack and stack[-1] is self.mode:
            self.mode.__exit__(None, None, None)
        return self.found

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        """Keep the line behind an operation that writes to a watched tensor."""
        schema = func._schema
        if not schema.is_mutable or len(self.found) >= WRITERS_LIMIT:
            return
        for number, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                name = self.names.get(_storage(tensor)) if tensor is not None else None
                if name is not None:
                    self._keep(str(func), name)

    def _keep(self, op: str, name: str) -> None:
        entry = {"op": op, "name": name, "stack": stack_of(sys._getframe(3))}
        if not any(known["op"] == op and known["stack"] == entry["stack"] for known in self.found):
            self.found.append(entry)


def stack_of(frame: Any) -> List[str]:
    """`file:line:function` of a frame and its callers, innermost first, without the guard's own."""
    here = __file__.rsplit("/", 1)[0]
    out: List[str] = []
    while frame is not None and len(out) < STACK_LIMIT:
        code = frame.f_code
        if not code.co_filename.startswith(here) and "_python_dispatch" not in code.co_filename:
            out.append("%s:%d:%s" % (code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    return out


def _storage(tensor: Any) -> int:
    return int(sample.plain(tensor).untyped_storage().data_ptr())


def _watcher(step: Step) -> Optional[_Watcher]:
    torch = step.torch
    try:
        import torch.utils._python_dispatch as dispatch
    except ImportError:
        return None
    if dispatch._get_current_dispatch_mode_stack() or _compiled():
        return None
    names: Dict[int, str] = {}
    for entry in step.track.entries:
        names[_storage(entry.param)] = entry.name
        for key, value in (step.optimizer.state.get(entry.param) or {}).items():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                names[_storage(value)] = "%s.%s" % (entry.name, key)
    return _Watcher(torch, names)


def _compiled() -> bool:
    frame = sys.modules.get("torch._dynamo.convert_frame")
    return bool(frame is not None and getattr(frame, "FRAME_COUNTER", 0))
