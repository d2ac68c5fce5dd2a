"""Link *weights*: between two steps of an optimizer, its weights and its state stay as the update left them.

After a step whose successor will be checked, a run of elements of every tensor and of its optimizer state is read;
before that successor the same elements are read again. Nobody but the optimizer may have changed them.

Value of the link (spec/evidence.md "weights"):

    {"after": digest of the sample taken after this step, "tensors": how many it covers}
    {"before": digest of the same elements before this step, "expected": digest taken after the step before,
     "held": bool, "changed": [{"name", "what": "weight" | state key, "differ": n, "of": n, "old": blob, "new": blob,
     "at": [offset, stride, count]}] at most 8, "changed_tensors": n}        in checked steps
    {"whole": {"tensors": n, "changed": [names, at most 8], "by": [what their sums moved by, decimal]}}
                                                                              in checked steps, tensors on the CPU
    {"writers": [{"op", "name", "stack": ["file:line:function", …]}]}         after an interval that was watched for
    {"may": ["file:line", …]}    once, with the first change: lines of the job that put other values into whole weights
    {"ranks": {"world", "was", "now": digests of the sampled weights alone}}  in checked steps, of several ranks
    {"off": reason}                                                           where the relation cannot hold
    {"replaced": true}       the optimizer's state was replaced as a whole (load_state_dict); weights are compared

Where there are other ranks, all of them look at the same places, whatever each one's budget: a script that averages
weights over ranks between steps changes them by no more than the ranks' own values, and that can be recomputed.

A sample cannot see one element of a large tensor. So the bytes of whole tensors are summed as well, before and after
the same intervals: WHOLE_ELEMENTS at a time, in turns, which is all of them for a small model.

After the first change that came from outside, the next interval runs under a TorchDispatchMode that names the
operation and the line that writes to a weight: it passes every operation on unchanged. At most 4 intervals of an
optimizer, and never while another mode is active or a model is compiled.
"""

from __future__ import annotations

import ctypes
import hashlib
import operator
import sys
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import sample, writers
from .client import Client
from .optimizer import SCALARS

if TYPE_CHECKING:
    from .engine import Entry, Step, Track

TENSORS_LIMIT = 128
"""Tensors per sample; where an optimizer holds more, they take turns."""
VALUES_TARGET = 1024
ROUNDS = 32
"""Samples taken at the same places before new places are drawn (making views costs more than reading them)."""
ARM_LIMIT = 4
EPOCH_STEPS = 128
"""Steps for which ranks look at the same places."""
CHANGED_LIMIT = 8
CHANGED_LIMIT_RANKS = 64
"""The same where there are other ranks, whose values explain a change only if they are known."""
WHOLE_ELEMENTS = 1 << 17
"""Elements summed whole per interval: about 25 microseconds; larger tensors take turns with themselves."""
WHOLE_PIECES = 32
WHOLE_EVERY = 4
VIEWS_LIMIT = 512
WRITERS_LIMIT = 16
STACK_LIMIT = 6


class _Snapshot:
    """Views on a set of places, and the bytes last read there."""

    def __init__(self, torch: Any, track: Track, optimizer: Any, chosen: List[Tuple[Entry, sample.Place]]) -> None:
        self.chosen = chosen
        self.state = optimizer.state
        self.rounds = 0
        self.epoch = 0
        """Where there are other ranks: number of the stretch of steps that these places were drawn for."""
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
        """Note where the tensors of all slots are now."""
        self.values = [held[key] for held, key in self.held]
        self.tensors = [sample.plain(tensor) for tensor in self.params + self.values]
        self.pointers = list(map(torch.Tensor.data_ptr, self.tensors))
        self.direct = all(map(_direct, self.tensors, self.slots))
        self.spans = [
            (slot[2][0] * tensor.element_size(), slot[2][2] * tensor.element_size())
            for tensor, slot in zip(self.tensors, self.slots)
        ]

    def read(self, torch: Any) -> Tuple[str, bytes]:
        """The values now: ("raw", their bytes one after the other), or what sample.Gathered gives off the CPU."""
        same = all(map(operator.is_, [held[key] for held, key in self.held], self.values))
        if not (same and self.direct and list(map(torch.Tensor.data_ptr, self.tensors)) == self.pointers):
            self._look(torch)
        if self.direct:
            at = ctypes.string_at
            return "raw", b"".join([at(p + begin, size) for p, (begin, size) in zip(self.pointers, self.spans)])
        views = [sample.view(torch, tensor.detach(), slot[2]) for tensor, slot in zip(self.tensors, self.slots)]
        return sample.Gathered(torch, views).raw(torch)


def _direct(tensor: Any, slot: Tuple[Entry, str, sample.Place]) -> bool:
    """Whether the run of this slot can be read straight from memory: on the CPU, in one piece, inside its storage."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.data_ptr():
        return False
    end = (tensor.storage_offset() + slot[2][0] + slot[2][2]) * tensor.element_size()
    return bool(end <= tensor.untyped_storage().nbytes())


class Weights:
    """Takes a sample after the update, and compares it before the next."""

    name = "weights"
    every_step = True

    def __init__(self, client: Client) -> None:
        self.client = client
        self.stray: Dict[int, _Watcher] = {}
        """Index of the optimizer → dispatch mode armed for the interval before its next step."""
        self.told = False
        """Which lines may have written."""

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
            if value["held"] is False and not self.told:
                self.told = True
                value["may"] = writers.restorers()
            sums = memory.get("sums")
            if sums is not None and sums.chosen and sums.signature is step.track.signature:
                value["whole"] = sums.compare(step.torch)
        step.scratch[self.name] = value
        for other in step.track.shares:
            _forget(step, other)

    def still(self, track: Track, optimizer: Any, still: Any) -> bool:
        """Nothing was taken after the step before, and nothing is under watch."""
        memory = track.memory.get(self.name)
        still.until = min(still.until, (track.count // 64 + 1) * 64)
        return memory is not None and memory["pending"] is None and track.opt not in self.stray and not track.shares

    def after(self, step: Step) -> Any:
        """Take the sample for the next step, if that one will be checked."""
        value: Dict[str, Any] = step.scratch.get(self.name) or {}
        memory = step.track.memory[self.name]
        if step.index == 1 or step.index % 64 == 0:
            memory["off"] = _off(step)
        if memory["off"] is not None:
            return {"off": memory["off"]} if step.full else None
        if step.track.next_full:
            with step.torch.no_grad():
                self._take(step, memory, value)
            self._arm(step, memory, value)
        for other in step.track.shares:
            _forget(step, other)
        return value or None

    def _take(self, step: Step, memory: Dict[str, Any], value: Dict[str, Any]) -> None:
        snapshot: Optional[_Snapshot] = memory.get("snapshot")
        alone = step.world() < 2
        turn = 0 if alone else step.index // EPOCH_STEPS + 1
        if snapshot is None or _stale(snapshot, turn) or not _same(step, snapshot, memory):
            chosen = _choose(step, step.index if alone else turn)
            if not chosen:
                return
            snapshot = _Snapshot(step.torch, step.track, step.optimizer, chosen)
            snapshot.epoch = turn
            memory["snapshot"] = snapshot
            memory["entries"] = step.track.signature
            memory["keys"] = _key_count(step)
        snapshot.rounds += 1
        snapshot.kind, snapshot.data = snapshot.read(step.torch)
        snapshot.digest = _digest(snapshot.data)
        memory["pending"] = snapshot
        sums: Optional[_Sums] = memory.get("sums")
        if sums is None or sums.signature is not step.track.signature:
            sums = memory["sums"] = _Sums(step.track)
        sums.take(step.torch)
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
        world = step.world()
        if world > 1:
            value["ranks"] = _for_ranks(world, snapshot, kind, data)
        if not value["held"]:
            limit = CHANGED_LIMIT if world < 2 else CHANGED_LIMIT_RANKS
            value["changed"], value["changed_tensors"] = _changes(step.torch, snapshot, kind, data, limit)

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

    def forget(self, opt: int) -> None:
        """The optimizer is gone."""
        watcher = self.stray.pop(opt, None)
        if watcher is not None:
            watcher.stop()

    def forked(self) -> None:
        """The parent's modes are not this child's."""
        for watcher in self.stray.values():
            watcher.stop()


class _Sums:
    """Sums over the bytes of whole tensors, piece by piece in turns: one changed element always shows in its piece."""

    def __init__(self, track: Track) -> None:
        self.signature = track.signature
        self.pieces: List[Tuple[Entry, int, int]] = []
        """Tensor, first element, number of elements (a multiple of 8 but for the last of a tensor)."""
        for entry in track.entries:
            if entry.reason is None and _summable(entry.param):
                for start in range(0, entry.numel, WHOLE_ELEMENTS):
                    self.pieces.append((entry, start, min(WHOLE_ELEMENTS, entry.numel - start)))
        self.views: Dict[int, Tuple[int, Any]] = {}
        """Piece → address of its tensor, view of its bytes as integers."""
        self.turn = self.rest = 0
        self.small = sum(length for _, _, length in self.pieces) <= WHOLE_ELEMENTS
        self.chosen: List[int] = []
        self.sums: List[int] = []

    def take(self, torch: Any) -> None:
        """Sum the next pieces; of large models only in every WHOLE_EVERY-th interval."""
        self.chosen = []
        self.rest = (self.rest + 1) % WHOLE_EVERY
        if self.rest and not self.small:
            return
        total = 0
        for offset in range(min(len(self.pieces), WHOLE_PIECES)):
            index = (self.turn + offset) % len(self.pieces)
            total += self.pieces[index][2]
            if self.chosen and total > WHOLE_ELEMENTS:
                break
            self.chosen.append(index)
        self.turn += len(self.chosen)
        self.sums = self._sums(torch)

    def compare(self, torch: Any) -> Dict[str, Any]:
        """Sum the same pieces again; what the frame says of it."""
        now = self._sums(torch)
        moved = [(i, new - old) for i, old, new in zip(self.chosen, self.sums, now) if old != new][:CHANGED_LIMIT]
        value: Dict[str, Any] = {"tensors": len(self.chosen), "changed": [self.pieces[i][0].name for i, _ in moved]}
        if moved:
            value["by"] = [str(difference) for _, difference in moved]
        return value

    def _sums(self, torch: Any) -> List[int]:
        if not self.chosen:
            return []
        result: List[int] = torch.stack([self._view(torch, i).sum(dtype=torch.int64) for i in self.chosen]).tolist()
        return result

    def _view(self, torch: Any, index: int) -> Any:
        entry, start, length = self.pieces[index]
        address = entry.param.data_ptr()
        known = self.views.get(index)
        if known is not None and known[0] == address:
            return known[1]
        flat = entry.param.detach().reshape(-1)[start : start + length]
        whole = (flat.storage_offset() * flat.element_size()) % 8 == 0 and (length * flat.element_size()) % 8 == 0
        view = flat.view(torch.int64 if whole else torch.uint8)
        if len(self.views) < VIEWS_LIMIT:
            self.views[index] = (address, view)
        return view


def _summable(param: Any) -> bool:
    """On the CPU (a GPU would have to be waited for), plain and in one piece."""
    return type(param.data).__name__ == "Tensor" and param.device.type == "cpu" and param.is_contiguous()


def _forget(step: Step, opt: int) -> None:
    """Another optimizer holds some of these parameters: what it left behind is no longer the last word."""
    for track in list(step.engine.tracks.values()):
        if track.opt == opt and Weights.name in track.memory:
            track.memory[Weights.name]["pending"] = None


def _off(step: Step) -> Optional[str]:
    if any(sample.shared(entry.param) for entry in step.track.entries[:4]):
        return "parameters are in shared memory; other processes write to them"
    return None


def _stale(snapshot: _Snapshot, turn: int) -> bool:
    """Whether new places are due: after ROUNDS samples, or where there are other ranks at a step told by the count."""
    return snapshot.epoch != turn or (not turn and snapshot.rounds >= ROUNDS)


def _choose(step: Step, turn: int) -> List[Tuple[Entry, sample.Place]]:
    """Tensors and places by the key and the number `turn`."""
    pool = [entry for entry in step.track.entries if entry.reason is None]
    count = min(len(pool), TENSORS_LIMIT)
    if not count:
        return []
    draw = step.engine.governor.draw
    elements = max(8, min(64, VALUES_TARGET // count))
    first = draw(b"window", step.opt, turn) % len(pool)
    chosen = [pool[(first + turn) % len(pool)] for turn in range(count)]
    return [
        (entry, sample.run(entry.numel, elements, draw(b"weight", step.opt, turn, entry.position))) for entry in chosen
    ]


def _key_count(step: Step) -> int:
    return sum(map(len, step.optimizer.state.values()))


def _same(step: Step, snapshot: _Snapshot, memory: Dict[str, Any]) -> bool:
    if step.optimizer.state is not snapshot.state or memory.get("entries") is not step.track.signature:
        return False
    return bool(memory.get("keys") == _key_count(step))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _for_ranks(world: int, snapshot: _Snapshot, kind: str, data: bytes) -> Dict[str, Any]:
    """Digests of the sampled weights, without the optimizer's state: as the update left them, and now."""
    weights = len(snapshot.chosen)
    end = sum(size for _, size in snapshot.spans[:weights])
    if kind != "raw":
        end = sum(where[2] for _, where in snapshot.chosen) * (4 if kind == "<f" else 8)
    now = _digest(data[:end])
    return {"world": world, "was": now if data == snapshot.data else _digest(snapshot.data[:end]), "now": now}


def _changes(torch: Any, snapshot: _Snapshot, kind: str, data: bytes, limit: int) -> Tuple[List[Dict[str, Any]], int]:
    """Which slots differ, with old and new values of the first `limit`."""
    out: List[Dict[str, Any]] = []
    total = position = 0
    if kind != snapshot.kind or len(data) != len(snapshot.data):
        return [{"name": "", "what": "dtype", "differ": 0, "of": 0}], 1
    for (entry, what, where), tensor in zip(snapshot.slots, snapshot.tensors):
        size = tensor.element_size() if kind == "raw" else 4 if kind == "<f" else 8
        end = position + where[2] * size
        old, new = snapshot.data[position:end], data[position:end]
        position = end
        if old == new:
            continue
        total += 1
        if len(out) < limit:
            differ = sum(old[i : i + size] != new[i : i + size] for i in range(0, len(old), size))
            change = {"name": entry.name, "what": what, "differ": differ, "of": where[2], "at": where}
            change["old"] = _blob(torch, kind, old, tensor.dtype)
            change["new"] = _blob(torch, kind, new, tensor.dtype)
            out.append(change)
    return out, total


def _blob(torch: Any, kind: str, data: bytes, dtype: Any) -> Dict[str, str]:
    if kind == "raw":
        kind, data = sample.raw(torch, torch.frombuffer(bytearray(data), dtype=dtype))
    return sample.blob(kind, data)


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
