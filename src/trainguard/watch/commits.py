"""Link *commits*: what a step was made from and what it left, as fingerprints, for replay to compare with afterwards.

Value of the link in a step frame (spec/replay.md, "Commits"):

    {"build": {…}, "tensors": [name], "shared": n}         in the first frame of an optimizer, and when they change
     "rng": [torch, numpy, python, …cuda], "modes": hex,   before the update
     "groups": digest, "hyper": {group: {name: value}}     settings; their values in the first frame of an optimizer,
     "changed": [[group, name, value]],                    then what changed, and
     "inside": [[group, name, value]],                     what is other right after the update (in "groups" then too)
     "before": vector, "raw": vector, "used": vector,      weights before the step, gradients after backward and as used
     "state": vector, "weights": vector, "buffers": vector optimizer state, weights and buffers after the step
     "places", "lanes", "edited": real values of some elements (lanes.py)
     "lean": true}                                         where only rng, modes, groups and weights were affordable
     "world": [rank, ranks], "sampled": [[tensor, n]],     first frame of an optimizer, where there are other ranks
     "own": floats, "got": floats                          gradient given to the reduction, and used (shares.py)

Where not even that is, steps in between are not committed to: what happened in them is in the weights of the next.

A *vector* is base64 of little-endian 32-bit numbers, one for each tensor of `tensors`. `weights` is a keyed linear
hash: sum over i of k_i x_i mod 2**64 over the tensor's bytes taken as 64-bit integers, with odd k_i drawn from the
run's secret key; the others are the same sum with every k_i = 1, six times cheaper. Each is folded to its upper 32 bits
after a multiplication. Any change of one element changes either; the keyed one also sees a permutation. These numbers
say *where* two runs part. What binds a run to its state are the points (points.py), which are hashed outside.

Nothing here writes to a tensor, draws a random number or keeps a gradient alive.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import lanes, points, rng, roots, sample, shares
from .client import Client

if TYPE_CHECKING:
    from .engine import Entry, Step, Track

SLOTS = 256
"""At most this many numbers a vector; beyond, neighbouring tensors share one."""

KEY_LENGTH = 1 << 16
"""Distinct k_i: a longer tensor is cut into blocks of this many 64-bit words, each with a factor of its own."""

FOLD = -7046029254386353131
"""2**64 / golden ratio as a signed number: odd, so that multiplying loses nothing before the upper half is taken."""

NAMES_LIMIT_BYTES = 60_000
MODES_EVERY = 64
TRIAL_STEPS = 20
"""Every link is committed in these first steps; then the budget decides."""

NOTHING, LEAN, EVERYTHING = 0, 1, 2
"""What a step commits to."""

TRIALS_LIMIT = 8
"""Optimizers that have such first steps: a script may make one every few steps."""

FULL_LEVEL_LIMIT, LEAN_LEVEL_LIMIT = 9, 6
ASKED = 3
"""A step that commits is not taken at a glance, nor is the one before it: that costs about three times what asking the
links before the update does, and is counted as a cost of committing."""
PRESSED = 0.5
"""Part of their budget that commits keep while the governor is pressed."""
CPUINFO_BYTES = 16_384
"""More than one processor's part of /proc/cpuinfo; machines have hundreds of them."""

VIEWS_LIMIT = 20_000

clock = time.thread_time_ns


class Commits:
    """Takes fingerprints around every step and says them in its frame."""

    name = "commits"
    every_step = True

    def __init__(self, client: Client) -> None:
        self.client = client
        self.on = client.settings.get("commits") is True
        percent = float(client.settings.get("commit_percent", 0.4))
        self.percent = min(percent, float(client.settings.get("budget_percent", 1.0)) / 2)
        """A part of the guard's budget, at most half of it: the governor's account pays (Step.aside_ns)."""
        self.thorough = client.settings.get("links") == "none"
        self.seed = hashlib.blake2b(b"commits", key=bytes.fromhex(client.settings["key"])[:64]).digest()
        self.keys: Dict[str, Any] = {}
        """Device → the k_i on it."""
        self.factors: List[int] = []
        self.switches: List[Tuple[Any, Optional[str]]] = []
        """Modules whose mode is committed, and the name of their rate."""
        self.buffers: List[Any] = []
        self.looked = 0
        self.full_ns = self.lean_ns = self.wall_ns = 0.0
        self.full_level = self.lean_level = 0
        """One step of an optimizer in 2**level commits to everything, or to what is lean."""
        self.tally: Any = None
        """The engine's tally, once there was a step."""
        self.live = 1
        """Optimizers that are in use."""
        self.raw: Dict[int, "_Raw"] = {}
        self.shares: Dict[int, shares.Shares] = {}
        """Optimizer → its samples; only where there are other ranks."""
        self.told = False
        self.views: Dict[int, Tuple[int, Any, Any]] = {}
        """Number of a parameter in its optimizers' entries → where its memory is, it as words, it."""
        self.points = points.Writer(client)

    def before(self, step: Step) -> None:
        """Streams, modes, weights and gradients that the update will be made from."""
        if not self.on or step.late or self._share(step.index, step.opt) == NOTHING:
            return  # late: what the update was made from is no longer there to be read
        start = clock()
        with step.torch.no_grad():
            self._look(step)
            step.scratch[self.name] = self._take_before(step)
        spent = clock() - start + step.scratch.get("raw_ns", 0)
        step.scratch["commits_ns"] = spent
        step.aside_ns += spent

    def after(self, step: Step) -> Any:
        """What the update left; a point when one is due."""
        found = step.scratch.get(self.name)
        if not self.on:
            return None
        start = clock()
        if found is None:
            self._book(step, 0, NOTHING)
            self._offer(step, 0)
            return None
        with step.torch.no_grad():
            value = self._take_after(step, *found)
            after_ns = clock() - start
            step.aside_ns += after_ns
            spent = after_ns + step.scratch["commits_ns"]
            self._book(step, spent, LEAN if "lean" in value else EVERYTHING)
            self._offer(step, spent)
        return value

    def _offer(self, step: Step, spent: int) -> None:
        """Points have a budget of their own (`points_percent`)."""
        start = clock()
        self.points.offer(step, spent)
        step.own_ns -= clock() - start

    def still(self, track: Track, optimizer: Any, still: Any) -> bool:
        """Steps that are not committed to may be taken at a glance, until the one before the next that is."""
        if not self.on:
            return True
        if self._share(track.count + 1, track.opt) != NOTHING:
            return False
        last = track.count | ((1 << self.lean_level) - 1)
        still.until = min(still.until, last, track.count + self._points_ahead())
        return True

    def _points_ahead(self) -> int:
        """Steps of one optimizer until a point may be due; optimizers are taken to step by turns."""
        if self.tally is None:
            return 1
        return self.points.ahead(self.tally.steps) // max(1, self.live)

    def forked(self) -> None:
        """Hooks on the parent's parameters say nothing here."""
        self.on = False

    def forget(self, opt: int) -> None:
        """The optimizer is gone: take its hook off, let go of its parameters."""
        self.views.clear()
        for held in (self.raw, self.shares):
            kept = held.pop(opt, None)
            if kept is not None:
                kept.remove()

    # -- before ---------------------------------------------------------------------------------------------------

    def _take_before(self, step: Step) -> Tuple[Dict[str, Any], Dict[str, List[Any]]]:
        track, torch = step.track, step.torch
        value: Dict[str, Any] = {"rng": streams(torch), "modes": self._modes()}
        self._header(step, track, value)
        self._groups(step, track, value)
        sums: Dict[str, List[Any]] = {}
        if self._share(step.index, step.opt) == LEAN:
            value["lean"] = True
            return value, sums
        sums["before"] = [total(self._words(torch, entry.param)) for entry in track.entries]
        found = lanes.edited(step, sums["before"], track.memory.get("left"), lambda param: self._words(torch, param))
        if found:
            value["edited"] = found
        row = step.scratch["lanes"] = lanes.Lanes(torch, track.entries, track.memory["places"])
        row.weights("before")
        raw = self.raw.get(step.opt)
        if raw is not None:
            raw.seen = raw.passes
            raw.inside = True
            step.own_ns += raw.own_ns  # within backward
            step.scratch["raw_ns"], raw.own_ns = raw.own_ns, 0
            if raw.values is not None and len(raw.values) == len(track.entries):
                sums["raw"] = raw.values
                row.rows.update(raw.lanes.rows)
            raw.values = None
        sums["used"] = _gradients(torch, track.entries)
        own = self.shares.get(step.opt)
        if own is not None:
            own.take(value)
            step.own_ns += own.own_ns
            step.scratch["raw_ns"] = step.scratch.get("raw_ns", 0) + own.own_ns
            own.own_ns = 0
        row.gradients("used")
        return value, sums

    def _from_closure(self, step: Step, value: Dict[str, Any], sums: Dict[str, List[Any]]) -> None:
        """Where a closure ran backward within the step, the gradients before it were those of another step."""
        raw = self.raw.get(step.opt)
        if raw is None or raw.passes == raw.seen:
            return
        if raw.values is not None and len(raw.values) == len(step.track.entries):
            sums["raw"] = raw.values
            step.scratch["lanes"].rows.update(raw.lanes.rows)
        raw.values = None
        sums["used"] = _gradients(step.torch, step.track.entries)
        if step.opt in self.shares:
            self.shares[step.opt].take(value)
        step.scratch["lanes"].gradients("used")

    def _header(self, step: Step, track: Track, value: Dict[str, Any]) -> None:
        if track.memory.get(self.name) is track.signature:
            return
        track.memory[self.name] = track.signature
        if not self.told:
            self.told = True
            value["build"] = build(step.torch)
        names = [entry.name for entry in track.entries]
        share = -(-len(names) // SLOTS) if names else 1
        shown = names[::share]
        value["tensors"] = shown if sum(map(len, shown)) < NAMES_LIMIT_BYTES else ["#%d" % i for i in range(len(shown))]
        value["shared"] = share
        track.memory["share"] = share
        track.memory["places"] = value["places"] = lanes.places(track, self.seed[:64])
        self.forget(step.opt)
        rank, ranks = shares.world(step.torch)
        self.raw[step.opt] = _Raw(step.torch, track.entries, self._fault, self._wants_raw, step, ranks > 1)
        if ranks > 1:
            value["world"] = [rank, ranks]
            raw = self.raw[step.opt]
            self.shares[step.opt] = shares.Shares(step.torch, track.entries, ranks, self.seed, raw.looks, self._fault)
            value["sampled"] = self.shares[step.opt].told

    def _wants_raw(self, track: Track) -> bool:
        """Whether the next step of an optimizer commits to everything."""
        return self._share(track.count + 1, track.opt) == EVERYTHING

    def _fault(self, place: str, error: BaseException) -> None:
        self.client.fault(place, error)

    def _groups(self, step: Step, track: Track, value: Dict[str, Any]) -> None:
        """Every entry of every parameter group but its tensors."""
        told = _groups_of(step.optimizer)
        known = track.memory.get("told")
        if told != known:
            track.memory["told"] = told
            track.memory["groups"] = _digest_of(told)
            if known is None or known.keys() != told.keys():
                value["hyper"] = told
            else:
                value["changed"] = _changed(known, told)
        value["groups"] = track.memory["groups"]

    def _groups_inside(self, step: Step, track: Track, value: Dict[str, Any]) -> None:
        """Settings that are other ones right after the update: the step was made with them, or left them behind."""
        told, known = _groups_of(step.optimizer), track.memory.get("told")
        if known is None or told == known:
            return
        value["inside"] = _changed(known, told) if known.keys() == told.keys() else [["*", "groups", len(told)]]
        value["groups"] = _digest_of([known, told])

    def _modes(self) -> str:
        """Training modes and rates of all modules."""
        told = [
            (module.training, None if rate is None else getattr(module, rate, None)) for module, rate in self.switches
        ]
        return hashlib.blake2b(repr(told).encode(), digest_size=6).hexdigest()

    def _look(self, step: Step) -> None:
        """Modules and buffers of the models that are trained; others may be waiting for the garbage collector."""
        tracks = list(step.engine.tracks.values())
        self.live = len(tracks)
        if self.looked == len(tracks) and step.number % MODES_EVERY:
            return
        self.looked = len(tracks)
        trained = {id(entry.param) for track in tracks for entry in track.entries}
        self.switches, self.buffers = [], []
        for root in roots.roots():
            if not any(id(param) in trained for param in root.parameters()):
                continue
            for module in root.modules():
                names = ("p", "dropout", "drop_prob", "momentum", "eps")
                rate = next((n for n in names if isinstance(module.__dict__.get(n), (int, float))), None)
                self.switches.append((module, rate))
            self.buffers.extend(each for each in root.buffers() if each.numel() and not each.is_meta)

    # -- after ----------------------------------------------------------------------------------------------------

    def _take_after(self, step: Step, value: Dict[str, Any], sums: Dict[str, List[Any]]) -> Dict[str, Any]:
        torch, entries = step.torch, step.track.entries
        self._groups_inside(step, step.track, value)
        if "lean" not in value:
            self._from_closure(step, value, sums)
            sums["state"] = [_state(torch, step.optimizer, entry) for entry in entries]
            if self.buffers:
                each = [total(words(torch, buffer)) for buffer in self.buffers]
                sums["buffers"] = [_stacked(torch, each).sum()]
            row = step.scratch["lanes"]
            row.weights("weights")
            row.state(step.optimizer)
            value["lanes"] = row.told()
        self._left(step)
        sums["weights"] = [self._keyed(torch, self._words(torch, entry.param)) for entry in entries]
        self._encode(torch, sums, step.track.memory["share"], value)
        return value

    def _left(self, step: Step) -> None:
        """What the step left, for the next to say what was edited since; only where that one commits to everything."""
        track = step.track
        track.memory["left"] = None
        if self._share(track.count + 1, track.opt) != EVERYTHING:
            return
        if all(entry.param.device.type == "cpu" for entry in track.entries):
            left = [total(self._words(step.torch, entry.param)) for entry in track.entries]
            track.memory["left"] = (track.signature, left)

    def _encode(self, torch: Any, sums: Dict[str, List[Any]], share: int, value: Dict[str, Any]) -> None:
        """All vectors with one copy from the device."""
        lengths = [(name, len(numbers)) for name, numbers in sums.items() if numbers]
        if not lengths:
            return
        flat = _stacked(torch, [number for name, _ in lengths for number in sums[name]])
        parts = []
        for part, (name, _) in zip(flat.split([length for _, length in lengths]), lengths):
            parts.append(_grouped(torch, part, share) if share > 1 and name != "buffers" else part)
        folded = torch.cat(parts).mul_(FOLD).bitwise_right_shift_(32).to(torch.int32).cpu()
        data = ctypes.string_at(folded.data_ptr(), folded.numel() * 4)
        used = 0
        for part, (name, _) in zip(parts, lengths):
            value[name] = base64.b64encode(data[used : used + 4 * len(part)]).decode("ascii")
            used += 4 * len(part)

    def _words(self, torch: Any, param: Any) -> Any:
        """`words` of a parameter, remembered as long as it stays where it is."""
        known = self.views.get(id(param))
        if known is not None and known[2] is param and known[0] == param.data_ptr() and known[1].data_ptr() == known[0]:
            return known[1]
        view = words(torch, param)
        if len(self.views) > VIEWS_LIMIT:
            self.views.clear()
        self.views[id(param)] = (param.data_ptr(), view, param)
        return view

    def _keyed(self, torch: Any, x: Any) -> Any:
        """Keyed linear hash of 64-bit words, mod 2**64, as a tensor of one number."""
        key = self._key(torch, x.device)
        length = x.numel()
        if length <= KEY_LENGTH:
            return _dot(torch, x, key[:length])
        out = None
        for block, start in enumerate(range(0, length, KEY_LENGTH)):
            part = x[start : start + KEY_LENGTH]
            number = _dot(torch, part, key[: part.numel()]) * self._factor(block)
            out = number if out is None else out + number
        return out

    def _key(self, torch: Any, device: Any) -> Any:
        known = self.keys.get(str(device))
        if known is None:
            data = bytearray(hashlib.shake_128(self.seed).digest(8 * KEY_LENGTH))
            for place in range(0, len(data), 8):
                data[place] |= 1
            known = torch.frombuffer(data, dtype=torch.int64).clone().to(device)
            self.keys[str(device)] = known
        return known

    def _factor(self, block: int) -> int:
        while len(self.factors) <= block:
            label = b"%d" % len(self.factors)
            number = int.from_bytes(hashlib.blake2b(label, key=self.seed, digest_size=8).digest(), "little") | 1
            self.factors.append(number - (1 << 64) if number >> 63 else number)
        return self.factors[block]

    # -- the budget -----------------------------------------------------------------------------------------------

    def _book(self, step: Step, spent: int, share: int) -> None:
        self.tally, self.live = step.engine.tally, len(step.engine.tracks)
        raw = self.raw.get(step.opt)
        if raw is not None:
            raw.inside = False
        if share != NOTHING and not step.full:
            spent += ASKED * max(0, step.own_ns - step.scratch["commits_ns"])
        if share == LEAN:
            self.lean_ns += (spent - self.lean_ns) * (0.1 if self.lean_ns else 1.0)
        elif share == EVERYTHING and step.number > 1:
            self.full_ns += (spent - self.full_ns) * (0.1 if self.full_ns else 1.0)
        if step.wall_ns and step.number > 2:  # the first ones load and warm up
            wall_ns = min(step.wall_ns, 4 * self.wall_ns) if self.wall_ns else step.wall_ns  # not an evaluation between
            self.wall_ns += (wall_ns - self.wall_ns) * (0.1 if self.wall_ns else 1.0)
        percent = self.percent * PRESSED if step.engine.governor.pressed else self.percent
        spare = max(percent / 200.0 * self.wall_ns, 1.0)  # half of the budget for each kind of step
        lean_ns = self.lean_ns or self.full_ns / 3
        self.full_level = _level(self.full_ns, spare, FULL_LEVEL_LIMIT)
        self.lean_level = min(_level(lean_ns, spare, LEAN_LEVEL_LIMIT), self.full_level)

    def _share(self, index: int, opt: int) -> int:
        """How much step `index` of optimizer `opt` commits to."""
        if self.thorough or index & ((1 << self.full_level) - 1) == 0:
            return EVERYTHING
        if index <= TRIAL_STEPS and opt < TRIALS_LIMIT:
            return EVERYTHING
        return LEAN if index & ((1 << self.lean_level) - 1) == 0 else NOTHING


def _level(cost: float, spare: float, limit: int) -> int:
    """Smallest n for which one step in 2**n is affordable."""
    level = 0
    while level < limit and cost > spare * (1 << level):
        level += 1
    return level


class _Raw:
    """Gradients right at the end of every backward pass that reaches the optimizer's first parameter."""

    def __init__(
        self, torch: Any, entries: List[Entry], fault: Any, wanted: Any, step: Step, reduced: bool = False
    ) -> None:
        self.reduced = reduced
        """Whether there are other ranks: then the gradient is looked at when all callbacks of this backward are done,
        DistributedDataParallel's reduction among them. Before that it may be half reduced."""
        self.waited = False
        self.torch = torch
        self.entries = entries
        self.fault = fault
        self.wanted = wanted
        self.engine = step.engine
        self.track = step.track
        self.optimizer = id(step.optimizer)
        self.own_ns = 0
        self.inside = False
        """Whether a step that commits to everything is under way: a closure may run backward in it."""
        self.values: Optional[List[Any]] = None
        self.lanes = lanes.Lanes(torch, entries, step.track.memory["places"])
        self.passes = self.seen = 0
        """Backward passes so far, and when a step last began."""
        self.handle: Any = None
        first = next((e.param for e in reversed(entries) if e.param.requires_grad and e.param.is_leaf), None)
        if first is not None and hasattr(first, "register_post_accumulate_grad_hook"):
            self.handle = first.register_post_accumulate_grad_hook(self.arrived)

    def arrived(self, param: Any) -> None:
        """A backward pass is under way: look when it is over."""
        try:
            if self.looks():
                self.waited = not self.reduced
                self.torch.autograd.Variable._execution_engine.queue_callback(self.over)
        except Exception as error:
            self.fault("commits.arrived", error)

    def looks(self) -> bool:
        """Whether what this backward leaves is going to be committed to."""
        return self.inside or (self.optimizer not in self.engine.glances and self.wanted(self.track))

    def over(self) -> None:
        """The gradients are complete: before clipping, before a scaler undoes its scale."""
        if not self.waited:
            self.waited = True
            self.torch.autograd.Variable._execution_engine.queue_callback(self.over)  # behind those queued meanwhile
            return
        self.passes += 1
        start = clock()
        try:
            with self.torch.no_grad():
                self.values = _gradients(self.torch, self.entries)
                self.lanes.gradients("raw")
        except Exception as error:
            self.fault("commits.over", error)
        self.own_ns += clock() - start

    def remove(self) -> None:
        """Take the hook off."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


# -- sums --------------------------------------------------------------------------------------------------------------


def words(torch: Any, tensor: Any) -> Any:
    """The tensor's bytes, in memory order, as a flat tensor of the widest integers that fit. Shares its memory.

    Sparse and other layouts without plain memory give an empty tensor.
    """
    tensor = sample.plain(tensor.detach())
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return torch.empty(0, dtype=torch.int64)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_contiguous():
        tensor = _dense(torch, tensor)
    flat = tensor.reshape(-1)
    size = flat.element_size()
    nbytes = flat.numel() * size
    if nbytes % 8 == 0 and (flat.storage_offset() * size) % 8 == 0:
        return flat.view(torch.int64)
    narrow = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return flat.view(narrow).to(torch.int64)


def _dense(torch: Any, tensor: Any) -> Any:
    """A tensor whose elements fill their memory, in memory order; a copy for all others."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    turned = tensor.permute(order)
    return turned if turned.is_contiguous() else tensor.contiguous()


def total(x: Any) -> Any:
    """Sum of 64-bit words mod 2**64."""
    return x.sum()


def _dot(torch: Any, x: Any, key: Any) -> Any:
    return torch.dot(x, key) if x.device.type == "cpu" else (x * key).sum()


def _gradients(torch: Any, entries: List[Entry]) -> List[Any]:
    """Sum over every gradient; 0 where there is none."""
    zero = torch.zeros((), dtype=torch.int64)
    grads = [entry.param.grad for entry in entries]
    return [zero if grad is None else total(words(torch, grad)) for grad in grads]


def _state(torch: Any, optimizer: Any, entry: Entry) -> Any:
    """One number over all of this parameter's optimizer state, in the order of its keys."""
    out: Any = torch.zeros((), dtype=torch.int64)
    held = optimizer.state.get(entry.param)
    for place, value in enumerate((held or {}).values()):
        if isinstance(value, torch.Tensor):
            number = total(words(torch, value))
        elif isinstance(value, (int, float)):
            out = out + _signed(hash(float(value)) * (2 * place + 1))
            continue
        else:
            continue
        out = out.to(number.device) if number.device != out.device else out
        out = out + number * (2 * place + 1)
    return out


def _signed(number: int) -> int:
    """`number` mod 2**64 as a signed 64-bit integer."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def _stacked(torch: Any, numbers: List[Any]) -> Any:
    device = numbers[0].device
    if any(number.device != device for number in numbers):
        numbers = [number.cpu() for number in numbers]
    return torch.stack(numbers)


def _grouped(torch: Any, numbers: Any, share: int) -> Any:
    spare = -len(numbers) % share
    padded = torch.nn.functional.pad(numbers, (0, spare)) if spare else numbers
    return padded.view(-1, share).sum(1)


# -- other words -------------------------------------------------------------------------------------------------------


def streams(torch: Any) -> List[Optional[str]]:
    """Digests of the global generators: torch, numpy and python (null where not loaded), then every CUDA device's."""
    found = rng.states(torch)
    if torch.cuda.is_initialized():
        found.extend("%d:%d" % (each.initial_seed(), each.get_offset()) for each in torch.cuda.default_generators)
    return found


def build(torch: Any) -> Dict[str, Any]:
    """What decides whether two processes can be expected to compute the same bits."""
    capability = getattr(getattr(torch.backends, "cpu", None), "get_cpu_capability", None)
    told: Dict[str, Any] = {
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "capability": capability() if capability else None,
        "mkldnn": bool(torch.backends.mkldnn.enabled),
        "cpu": processor(),
        "deterministic": bool(torch.are_deterministic_algorithms_enabled()),
        "devices": [],
    }
    if torch.cuda.is_initialized():
        told["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return told


def processor() -> Optional[str]:
    """Vendor, family, model, stepping, and a digest of what it can do: libraries choose their kernels by these."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read(CPUINFO_BYTES).split("\n\n")[0]
    except OSError:
        return None
    told = {
        name.strip(): value.strip() for name, sign, value in (line.partition(":") for line in text.split("\n")) if sign
    }
    names = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU architecture", "CPU part")
    able = " ".join(sorted((told.get("flags") or told.get("Features") or "").split()))
    words = [told[name] for name in names if name in told]
    return " ".join([*words, hashlib.blake2b(able.encode(), digest_size=4).hexdigest()]) if words else None


def _groups_of(optimizer: Any) -> Dict[str, Dict[str, Any]]:
    return {
        str(number): {name: _plain(item) for name, item in group.items() if name not in ("params", "param_names")}
        for number, group in enumerate(optimizer.param_groups)
    }


def _digest_of(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _changed(was: Dict[str, Any], now: Dict[str, Any]) -> List[List[Any]]:
    return [
        [group, name, value]
        for group, entries in now.items()
        for name, value in entries.items()
        if name not in was[group] or was[group][name] != value
    ]


def _plain(item: Any) -> Any:
    """A JSON value for an entry of a parameter group; tensors of one element by their value."""
    if isinstance(item, (bool, int, float, str, type(None))):
        return item if not isinstance(item, float) or item == item else "nan"
    if isinstance(item, (list, tuple)) and len(item) < 16:
        return [_plain(each) for each in item]
    if hasattr(item, "numel") and item.numel() == 1:
        return float(item)
    return type(item).__name__
