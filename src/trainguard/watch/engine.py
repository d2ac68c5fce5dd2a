"""The step engine: sees every optimizer step through torch's public global hooks and asks each link what it saw.

A *link* is one relation of a training step that can be checked (DESIGN: the chain of links). Each is a class in
its own file, listed in `links.LINKS`; for every step it returns a small JSON value. A checked step is one frame:

    kind "step", step = number of the optimizer step in this process (from 1), body =
      {"opt": index of the optimizer, "index": step of that optimizer (from 1), "wall_ns": time since the previous
       step began, "own_ns": time of our own, "checked": true, "level": the governor's, "<link name>": value, …}

Steps that the governor skips (budget) are asked about only of the links with `every_step`. They go out together, a few
frames a second ("ended": when the last of them was over, by the wall clock, ns; in a checked step's frame too):

    kind "steps", step = number of the last, body = {"level": …, "ended": …, "rows": [
      [number, opt, index, count, wall_ns, own_ns], [number, opt, index, 1, wall_ns, own_ns, {"<link>": value, …}], …]}

A row stands for `count` steps in a row of one optimizer, from `number` and `index` on, with the sums of their times;
one with values is a single step. While nothing moves that a link has an eye on (`Still`), such a step costs some
comparisons after the update and nothing else. Values are described in spec/evidence.md, "Step frames".
"""

from __future__ import annotations

import atexit
import functools
import json
import random
import sys
import threading
import time
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import code as _code
from . import links as _links
from . import roots, sample
from .client import Client
from .governor import Governor

wall_clock = time.perf_counter_ns
"""Time between steps: what a person waits."""

clock = time.thread_time_ns
"""Our own time: CPU time of this thread, so that a busy machine does not count as a busy guard."""


TOGETHER_NS = 250_000_000
"""Unchecked steps wait at most until the step that ends this long after the last frame of them went out."""

ROWS_LIMIT = 512
FRAME_BYTES = 96 * 1024
"""A frame of unchecked steps beyond this is split; client.FRAME_LIMIT_BYTES is the hard limit."""

MEASURE_EVERY = 16
"""Of steps taken at a glance one in so many is timed (reading the thread's clock is a system call)."""

IDLE_EVERY = 10
"""Steps between two chances for sweeps while steps are taken at a glance."""

ABSENT_STEPS = 4
"""A tensor without a gradient at so many checked steps in a row is no longer drawn: it would tell nothing."""

ENTER_TURNS = 200
NEVER = 1 << 62

_ident = threading.get_ident


class Entry:
    """One parameter of an optimizer."""

    __slots__ = ("facts", "group", "name", "numel", "param", "position", "reason", "state_keys", "state_of")

    def __init__(self, param: Any, group: int, position: int, name: str) -> None:
        self.param = param
        self.group = group
        """Index of its parameter group."""
        self.position = position
        """Index among all parameters of the optimizer."""
        self.name = name
        self.numel = int(sample.plain(param.detach()).numel())
        self.reason = sample.why_not(param)
        """Why it cannot be sampled, or None."""
        self.facts = [name, group, position, self.numel, str(param.dtype)[6:], param.device.type]
        """What a frame says of it."""
        self.state_of: Any = None
        """The optimizer's state of it when last looked at, and what its entries are (optimizer._shape_of)."""
        self.state_keys: List[Tuple[Any, int]] = []


class Track:
    """What the engine remembers of one optimizer between its steps."""

    __slots__ = (
        "absent",
        "count",
        "entries",
        "memory",
        "missing",
        "nests",
        "next_full",
        "next_sample",
        "opt",
        "permutations",
        "pool",
        "ref",
        "shares",
        "signature",
        "without_grad",
    )

    def __init__(self, optimizer: Any, opt: int, gone: Callable[[Any], None], checking: bool = True) -> None:
        self.ref = weakref.ref(optimizer, gone)
        self.opt = opt
        """Index of the optimizer in this process, in order of first step."""
        self.count = 0
        """Steps it made so far."""
        self.signature: Any = None
        self.entries: List[Entry] = []
        self.without_grad: frozenset[int] = frozenset()
        """Positions of parameters that had no gradient when last looked at."""
        self.missing: List[frozenset[int]] = []
        """The same of the last ABSENT_STEPS looks."""
        self.absent: frozenset[int] = frozenset()
        """Positions that had none at any of these; they are not drawn."""
        self.next_full = checking
        self.next_sample: Optional[List[Tuple[Entry, sample.Place]]] = None
        """What the next step will sample, fixed beforehand so that gradient hooks can be armed for it."""
        self.pool: List[Entry] = []
        """Entries that can be drawn; empty when it has to be made anew."""
        self.permutations: Dict[int, List[int]] = {}
        self.nests = False
        """Whether its step() calls the step() of a base class: both run our hooks."""
        self.shares: List[int] = []
        """Indices of other optimizers that hold some of the same parameters."""
        self.memory: Dict[str, Any] = {}
        """Each link's own values for this optimizer, by link name."""


class Still:
    """What must not move for links to have nothing to say of a step: filled by `link.still`, compared after each."""

    __slots__ = ("same", "sizes", "tell", "until", "values")

    def __init__(self) -> None:
        self.same: List[Tuple[Any, str, Any]] = []
        """(object, attribute, the very object it must be)."""
        self.sizes: List[Tuple[Any, int]] = []
        """(container, its length)."""
        self.values: List[Tuple[Dict[Any, Any], Tuple[Any, ...]]] = []
        """(dictionary, its values in order)."""
        self.tell: Optional[Callable[[], Optional[Dict[str, Any]]]] = None
        """Called when `values` moved: what to say of it, by link name, with `values` brought up to date; or None."""
        self.until = NEVER
        """Step of this optimizer at which the links are to be asked in any case."""


class Tally:
    """What is counted at every step of a process, close together in memory."""

    __slots__ = (
        "alone",
        "busy",
        "code",
        "glance_ns",
        "last_ns",
        "lock",
        "own_ns",
        "rows",
        "sent_ns",
        "steps",
        "tail",
        "thread",
    )

    def __init__(self) -> None:
        self.thread = 0
        """The thread that made the first step."""
        self.alone = True
        """Whether no other thread has made one: then a step taken at a glance needs no lock, which costs 8 µs when the
        caches hold the job's data."""
        self.busy = False
        """Whether that thread is counting such a step."""
        self.lock = threading.RLock()  # a signal handler may step an optimizer while we hold it
        self.steps = 0
        self.last_ns = 0
        """When the last step was seen (wall clock)."""
        self.own_ns = 0
        """Own time that the governor has not booked yet."""
        self.glance_ns = 0
        """Running mean of what a step taken at a glance costs."""
        self.rows: List[List[Any]] = []
        """Unchecked steps that no frame has told of yet."""
        self.tail: Optional[List[Any]] = None
        """The last of `rows`, while it can be added to."""
        self.sent_ns = 0
        """When the last frame of unchecked steps went out."""
        self.code = _code.current()

    def enter(self) -> None:
        """Before `lock` is taken for a step: where this is another thread, the first one is to take it too."""
        me = _ident()
        if not self.thread:
            self.thread = me
        elif self.alone and me != self.thread:
            self.alone = False
            for _ in range(ENTER_TURNS):
                if not self.busy:
                    return
                time.sleep(0.0005)


class Glance:
    """One optimizer whose steps are, for a while, neither checked nor worth a word of most links.

    The machine's caches hold the job's data when we are called, so what counts here is how little is touched.
    """

    __slots__ = ("began", "engine", "groups", "index", "own", "row", "still", "tally", "timed", "track")

    def __init__(self, engine: "Engine", track: Track, still: Still, groups: List[Any]) -> None:
        self.engine = engine
        self.groups = groups
        self.tally = engine.tally
        self.track = track
        self.index = track.count
        """Steps of this optimizer so far; the track's count is brought up to date when links are asked."""
        self.still = still
        self.row: Optional[List[Any]] = None
        """Our row among those of the tally, as long as it is the last."""
        self.timed = False
        """Whether the step that comes is timed."""
        self.began = self.own = 0

    def passes(self, optimizer: Any) -> bool:
        """After the update: count the step, unless something moved or a link is due. Then the engine asks them all."""
        still, tally = self.still, self.tally
        start = clock() if self.timed else 0
        index = self.index + 1
        if index >= still.until or optimizer.param_groups is not self.groups or tally.thread != _ident():
            return False
        for one, name, value in still.same:
            if getattr(one, name) is not value:
                return False
        for container, size in still.sizes:
            if len(container) != size:
                return False
        said = None
        for known, values in still.values:
            if tuple(known.values()) != values:
                said = still.tell() if still.tell is not None else None
                if said is None:
                    return False
                break
        self.index = index
        now = wall_clock()
        tally.busy = True
        locked = not tally.alone
        if locked:
            tally.busy = False
            tally.lock.acquire()
        try:
            tally.steps = number = tally.steps + 1
            wall_ns, tally.last_ns = now - tally.last_ns, now
            tally.own_ns += tally.glance_ns
            row = self.row
            if said is not None:
                tally.rows.append([number, self.track.opt, index, 1, wall_ns, tally.glance_ns, said])
                tally.tail = None
            elif row is not None and row is tally.tail and row[0] + row[3] == number:
                row[3] += 1
                row[4] += wall_ns
                row[5] += tally.glance_ns
            else:
                row = self.row = tally.tail = [number, self.track.opt, index, 1, wall_ns, tally.glance_ns]
                tally.rows.append(row)
        finally:
            tally.busy = False
            if locked:
                tally.lock.release()
        if tally.code is not None:
            tally.code.step = number + 1
        self.timed = index % MEASURE_EVERY == 0
        if start or now - tally.sent_ns >= TOGETHER_NS or not number % IDLE_EVERY:
            self.engine.pause(self, number, now, start)
        return True


class Step:
    """What a link is given: before the update, when the gradients are final, and after the update."""

    __slots__ = (
        "aside_ns",
        "called",
        "calls",
        "depth",
        "engine",
        "full",
        "grads",
        "index",
        "late",
        "number",
        "opt",
        "optimizer",
        "own_ns",
        "ready",
        "rng",
        "sample",
        "scratch",
        "settings",
        "torch",
        "track",
        "value",
        "wall_ns",
    )

    def __init__(self, engine: "Engine", optimizer: Any, track: Track, number: int) -> None:
        self.engine = engine
        self.number = number
        """Optimizer step in this process, from 1."""
        self.optimizer = optimizer
        self.track = track
        self.opt = track.opt
        self.index = track.count
        """Step of this optimizer, from 1."""
        self.torch = engine.torch
        self.rng: random.Random = engine.rng
        """Private random.Random, keyed by the supervisor: the only source of sample positions."""
        self.settings = engine.settings
        self.scratch: Dict[str, Any] = {}
        """A link's own values carried from `before` to `after`, by link name."""
        self.full = track.next_full
        """Whether this step is checked in full or only by the links that always speak."""
        self.sample: List[Tuple[Entry, sample.Place]] = []
        """Tensors and places that this step samples; empty unless `full`."""
        self.grads: List[Any] = []
        """`.grad` of every entry of the track, once final; empty unless `full`."""
        self.ready = False
        """Whether the gradients were final when we looked (false while a closure is still to run)."""
        self.late = False
        """Whether the links are asked only now that the update is over: there is no before any more."""
        self.called: Optional[str] = ""
        """How step() was called: "" for plainly, "closure", or None for with anything else."""
        self.calls = 0
        """How often the closure has run, in checked steps."""
        self.value: Any = None
        """What it returned last; kept while `ready` is called, no longer."""
        self.own_ns = 0
        self.aside_ns = 0
        """Part of `own_ns` that is no matter of whether this step is checked (commits, what loaders delivered before):
        paid from the same account, but no part of what a checked or an unchecked step is taken to cost."""
        self.wall_ns = 0
        self.depth = 0
        """Steps of the same optimizer that began inside this one and have not ended."""

    def world(self) -> int:
        """Ranks of the job, as torch.distributed says; 1 without it."""
        distributed = getattr(self.torch, "distributed", None)
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            return 1
        return int(distributed.get_world_size())


class Engine:
    """Holds the links of one process. Nested steps (SAM, closures) count as their own."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.settings = client.settings
        self.torch = sys.modules["torch"]
        self.rng = random.Random(bytes.fromhex(client.settings["key"]) + b"engine")
        self.tensors = max(1, int(client.settings.get("tensors", 4)))
        self.elements = max(2, int(client.settings.get("elements", 32)))
        self.governor = Governor(client.settings, wall_clock())
        self.checking = client.settings.get("links") != "none"
        """False: steps are only committed to, none is checked."""
        self.tracks: Dict[int, Track] = {}
        """id of a live optimizer → what we remember of it."""
        self.opts = 0
        self.tally = Tally()
        self.rows_level = 0
        self.glances = _glances
        self.leaving = False
        """Whether the rest is sent when a child of multiprocessing ends."""
        self.local = threading.local()
        self.lock = threading.RLock()  # a signal handler may step an optimizer while we hold it
        self.idle_lock = threading.Lock()
        self.names: Dict[int, str] = {}
        self.unsent_ns = 0
        """Own time spent after a frame was built; booked with the next one."""
        self.links: List[Any] = _made(client)
        self.always = [link for link in self.links if link.every_step]
        self.readers = [link for link in self.links if hasattr(link, "ready")]
        self.idlers = [link for link in self.links if hasattr(link, "between")]
        self.armers = [link.arm for link in self.links if hasattr(link, "arm")]
        self.stills: Optional[List[Any]] = None
        """How each link with `every_step` says what it has an eye on; None where one cannot."""
        if all(hasattr(link, "still") for link in self.always):
            self.stills = [link.still for link in self.always]

    # -- hooks ------------------------------------------------------------------------------------------------

    def before(self, optimizer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        """The pre-hook: nothing of the update has happened yet. May return arguments with the closure wrapped."""
        if getattr(self.local, "twin", False):
            return None  # a twin's doing (shadow.py): copies, not the job's
        start = clock()
        stack = self._stack()
        if stack and stack[-1].optimizer is optimizer:
            if _inside_step_of(optimizer):
                stack[-1].depth += 1  # a subclass that calls its base's step: one step, the outer one
                stack[-1].track.nests = True
                return None
            stack.pop()  # left behind by an exception
        track = self.track(optimizer)
        tally = self.tally
        tally.enter()
        with tally.lock:
            tally.steps += 1
            track.count += 1
            step = Step(self, optimizer, track, tally.steps)
            now = wall_clock()
            step.wall_ns = now - tally.last_ns if tally.last_ns else 0
            tally.last_ns = now
        self._refresh(track, optimizer)
        if step.full:
            step.sample = track.next_sample if track.next_sample is not None else self.draw_sample(track, step.index)
        stack.append(step)
        changed = None
        step.called = _form(args, kwargs)
        if step.full:
            with self.torch.no_grad():
                for link in self.links:
                    self._call(link, "before", step)
                changed = self._with_closure(step, args, kwargs)
                if changed is None:
                    self.ready(step)
        else:
            for link in self.always:
                self._call(link, "before", step)
        step.own_ns += clock() - start
        return changed

    def ready(self, step: Step) -> None:
        """The gradients are final: called at once, or after every run of a closure."""
        step.ready = True
        track = step.track
        step.grads = [entry.param.grad for entry in track.entries]
        track.without_grad = missing = frozenset(i for i, grad in enumerate(step.grads) if grad is None)
        track.missing = [*track.missing[1 - ABSENT_STEPS :], missing]
        absent = frozenset.intersection(*track.missing)
        if absent != track.absent:
            track.absent = absent
            track.pool = []
        for link in self.readers:
            self._call(link, "ready", step)

    def after(self, optimizer: Any) -> None:
        """The post-hook: the update has been made."""
        start = clock()
        stack = self._stack()
        if not stack or stack[-1].optimizer is not optimizer:
            return
        if stack[-1].depth:
            stack[-1].depth -= 1
            return
        step = stack.pop()
        self.plan(step.track, wall_clock())
        self._end(step, start)

    def _end(self, step: Step, start: int) -> None:
        """Ask the links, send the frame or keep a row, book our time."""
        values: Dict[str, Any] = {}
        if step.full:
            with self.torch.no_grad():
                self._collect(self.links, step, values)
        else:
            self._collect(self.always, step, values)
            if step.track.next_full:
                for arm in self.armers:
                    self._arm(arm, step)
        middle = clock()
        step.own_ns += middle - start + self.unsent_ns
        if step.full:
            self.flush()
            body: Dict[str, Any] = {"opt": step.opt, "index": step.index, "wall_ns": step.wall_ns}
            body.update(own_ns=step.own_ns, checked=True, level=self.governor.level, ended=time.time_ns())
            body.update(values)
            self.client.send("step", body, step.number)
        else:
            if self._keep(step.number, step.track, step.wall_ns, step.own_ns, values):
                self.flush()
        starting = step.number <= self.governor.always
        aside_ns = 0 if starting else step.aside_ns
        self.governor.spend(step.own_ns - step.aside_ns, step.wall_ns, step.full, aside_ns)
        if not step.track.next_full:
            self.look_away(step.track, step.optimizer)
        balance = self._balance(wall_clock())
        if self.idlers and (starting or self.governor.everything or balance > 0):
            self._idle(step)
        # The first pass over all code, hooks and kernels is part of starting up and is not taken from the credit,
        # which short runs need for their steps.
        self.unsent_ns = 0 if starting else clock() - middle

    # -- at a glance ------------------------------------------------------------------------------------------

    def look_away(self, track: Track, optimizer: Any) -> None:
        """The next steps are not checked: find out what to compare so that links need not be asked, if they agree."""
        _glances.pop(id(optimizer), None)
        if track.next_full or self.stills is None or track.nests or self.governor.everything:
            return
        still = Still()
        still.until = self.governor.until(track.opt, track.count + 1)
        still.sizes.append((optimizer.param_groups, len(track.signature)))
        still.sizes.extend(track.signature)
        for say in self.stills:
            if not say(track, optimizer, still):
                return
        if still.until > track.count + 1:
            _glances[id(optimizer)] = Glance(self, track, still, optimizer.param_groups)

    def late(self, optimizer: Any) -> None:
        """A step that began at a glance and turns out to need more: ask the links now that it is over."""
        start = clock()
        glance = _glances.pop(id(optimizer))
        track = glance.track
        tally = self.tally
        tally.enter()
        with tally.lock:
            tally.steps += 1
            track.count = glance.index + 1
            step = Step(self, optimizer, track, tally.steps)
            now = wall_clock()
            step.wall_ns, tally.last_ns = now - tally.last_ns, now
        step.full, step.late = False, True
        self._refresh(track, optimizer)
        for link in self.always:
            self._call(link, "before", step)
        self.plan(track, now)
        self._end(step, start)

    def pause(self, glance: Glance, number: int, now: int, start: int) -> None:
        """After some of the steps taken at a glance: time them, send what waits, let sweeps have their turn."""
        tally = self.tally
        if start:
            own_ns = glance.own + clock() - start
            tally.glance_ns += int((own_ns - tally.glance_ns) * (0.1 if tally.glance_ns else 1.0))
            glance.own = 0
        start = clock()
        if now - tally.sent_ns >= TOGETHER_NS:
            tally.sent_ns = now
            self.flush()
        elif not self.leaving:
            self.leaving = True
            _at_exit_of_child(self)
        if self.idlers and not number % IDLE_EVERY and self._balance(now) > 0:
            optimizer = glance.track.ref()
            if optimizer is not None:
                glance.track.count = glance.index
                self._idle(Step(self, optimizer, glance.track, number))
        self.unsent_ns += clock() - start

    def _balance(self, now_ns: int) -> float:
        """What may still be spent, with all that the tally holds booked."""
        self.governor.own_ns += self.tally.own_ns
        self.tally.own_ns = 0
        return self.governor.balance_ns(now_ns)

    def look_again(self) -> None:
        """Ask all links again from the next step of every optimizer on."""
        for glance in list(_glances.values()):
            glance.track.count = glance.index
        _glances.clear()

    # -- frames of unchecked steps ------------------------------------------------------------------------------

    def _keep(self, number: int, track: Track, wall_ns: int, own_ns: int, values: Dict[str, Any]) -> bool:
        """Remember an unchecked step; returns whether it is time to send all that are remembered."""
        level, tally = self.governor.level, self.tally
        if level != self.rows_level or len(tally.rows) >= ROWS_LIMIT:
            self.flush()
        with tally.lock:
            self.rows_level = level
            row: List[Any] = [number, track.opt, track.count, 1, wall_ns, own_ns]
            tally.rows.append([*row, values] if values else row)
            tally.tail = None
        if tally.last_ns - tally.sent_ns >= TOGETHER_NS:
            tally.sent_ns = tally.last_ns
            return True
        if not self.leaving:
            self.leaving = True
            _at_exit_of_child(self)
        return False

    def flush(self) -> None:
        """Send the unchecked steps that no frame has told of yet."""
        tally = self.tally
        with tally.lock:
            rows, tally.rows = tally.rows, []
            tally.tail = None
            ended = time.time_ns() - (wall_clock() - tally.last_ns)
        if rows:
            self._send_rows(rows, ended)

    def _send_rows(self, rows: List[List[Any]], ended: int) -> None:
        if len(rows) > 1 and len(rows) * 40 > FRAME_BYTES // 8 and len(json.dumps(rows, default=str)) > FRAME_BYTES:
            later = rows[len(rows) // 2 :]
            self._send_rows(rows[: len(rows) // 2], ended - sum(row[4] for row in later))
            self._send_rows(later, ended)
            return
        body = {"level": self.rows_level, "rows": rows, "ended": ended}
        self.client.send("steps", body, rows[-1][0] + rows[-1][3] - 1)

    # -- planning ---------------------------------------------------------------------------------------------

    def plan(self, track: Track, now_ns: int) -> None:
        """Decide whether the next step of this optimizer is checked and what it samples."""
        index = track.count + 1
        track.next_full = self.checking and self.governor.wants(track.opt, index, now_ns)
        track.next_sample = self.draw_sample(track, index) if track.next_full else None

    def draw_sample(self, track: Track, index: int) -> List[Tuple[Entry, sample.Place]]:
        """The next tensors of the secret rotation and a secret place in each; equal on ranks with equal tensors.

        Every permutation covers all tensors, so none waits for more than two rounds of ceil(T / k) checked steps.
        """
        pool = track.pool
        if not pool:
            usable = [e for e in track.entries if e.reason is None]
            pool = track.pool = [e for e in usable if e.position not in track.absent] or usable
        if not pool:
            return []
        count = min(self.tensors, len(pool))
        first = self.governor.block(index) * count
        numbers = self.governor.draws(b"place", count, track.opt, index)
        chosen: List[Tuple[Entry, sample.Place]] = []
        for turn, number in zip(range(first, first + count), numbers):
            entry = pool[self._permutation(track, turn // len(pool), len(pool))[turn % len(pool)]]
            if any(entry is known for known, _ in chosen):
                continue  # the last of one permutation and the first of the next
            chosen.append((entry, sample.place(entry.numel, self.elements, number)))
        return chosen

    def _permutation(self, track: Track, epoch: int, size: int) -> List[int]:
        known = track.permutations.get(epoch)
        if known is None or len(known) != size:
            seed = self.governor.draw(b"permutation", track.opt, epoch, size)
            known = list(range(size))
            random.Random(seed).shuffle(known)
            track.permutations = {epoch: known}
        return known

    # -- optimizers -------------------------------------------------------------------------------------------

    def track(self, optimizer: Any) -> Track:
        """What we remember of this optimizer; made at its first step."""
        known = self.tracks.get(id(optimizer))
        if known is not None and known.ref() is optimizer:
            return known
        with self.lock:
            key, opt = id(optimizer), self.opts
            track = Track(optimizer, opt, lambda ref: self._gone(key, opt, ref), self.checking)
            self.opts += 1
            self.tracks[key] = track
        return track

    def _gone(self, key: int, opt: int, ref: Any) -> None:
        """The optimizer is no more: let go of its parameters."""
        known = self.tracks.get(key)
        if known is not None and known.ref is ref:
            del self.tracks[key]
            self.glances.pop(key, None)
        for link in self.links:
            forget = getattr(link, "forget", None)
            if forget is not None:
                forget(opt)

    def _refresh(self, track: Track, optimizer: Any) -> None:
        """Rebuild the table of parameters when a group was added, removed or changed in number."""
        if _same_groups(optimizer.param_groups, track.signature):
            return
        signature = [(group["params"], len(group["params"])) for group in optimizer.param_groups]
        self.names = roots.names()
        entries: List[Entry] = []
        for number, group in enumerate(optimizer.param_groups):
            given = group.get("param_names")
            for offset, param in enumerate(group["params"]):
                fallback = given[offset] if given and offset < len(given) else "param[%d]" % len(entries)
                entries.append(Entry(param, number, len(entries), self.names.get(id(param), fallback)))
        track.entries = entries
        track.signature = signature
        track.pool = []
        track.memory.pop("left_out", None)
        track.next_sample = None
        self._find_shared(track)

    def _find_shared(self, track: Track) -> None:
        own = {id(entry.param) for entry in track.entries}
        for other in list(self.tracks.values()):
            if other is track or other.ref() is None:
                continue
            if any(id(entry.param) in own for entry in other.entries):
                self.look_again()  # each must tell the other's links of its steps
                if other.opt not in track.shares:
                    track.shares.append(other.opt)
                if track.opt not in other.shares:
                    other.shares.append(track.opt)

    # -- helpers ----------------------------------------------------------------------------------------------

    def _with_closure(self, step: Step, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        """Arguments in which the closure also tells us when the gradients are final; None when there is none."""
        if callable(kwargs.get("closure")):
            return args, dict(kwargs, closure=self._wrapped(step, kwargs["closure"]))
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._wrapped(step, args[1]), *args[2:]), kwargs
        return None

    def _wrapped(self, step: Step, closure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(closure)
        def watched(*args: Any, **kwargs: Any) -> Any:
            value = closure(*args, **kwargs)
            start = clock()
            try:
                step.calls += 1
                step.value = value
                with self.torch.no_grad():
                    self.ready(step)
            except Exception as error:
                _count(self.client, "engine.ready", error)
            step.value = None
            step.own_ns += clock() - start
            return value

        return watched

    def _stack(self) -> List[Step]:
        """Open steps of this thread, outermost first."""
        stack: Optional[List[Step]] = getattr(self.local, "stack", None)
        if stack is None:
            stack = self.local.stack = []
        return stack

    def _collect(self, links: List[Any], step: Step, body: Dict[str, Any]) -> None:
        for link in links:
            value = self._call(link, "after", step)
            if value is not None:
                body[link.name] = value

    def _call(self, link: Any, phase: str, step: Step) -> Any:
        try:
            return getattr(link, phase)(step)
        except Exception as error:
            _count(self.client, "link.%s.%s" % (link.name, phase), error)
            return None

    def _arm(self, arm: Callable[[Step], None], step: Step) -> None:
        try:
            arm(step)
        except Exception as error:
            _count(self.client, "link.arm", error)

    def _idle(self, step: Step) -> None:
        if not self.idle_lock.acquire(blocking=False):
            return  # another thread is at it
        try:
            self._sweep(step)
        finally:
            self.idle_lock.release()

    def _sweep(self, step: Step) -> None:
        for link in self.idlers:
            value = self._call(link, "between", step)
            if value is not None:
                self.client.send("link", {"link": link.name, "value": value}, step.number)


def _count(client: Client, place: str, error: BaseException) -> None:
    """Have a fault counted; where even that fails (no stack left, an error that cannot be printed), let it be."""
    try:
        client.fault(place, error)
    except Exception:
        pass


def _made(client: Client) -> List[Any]:
    """One object of every link; a link that cannot be made is counted and left out."""
    made = []
    for link in _links.chosen(client.settings):
        try:
            made.append(link(client))
        except Exception as error:
            _count(client, "link.%s" % link.__name__, error)
    return made


def _same_groups(groups: List[Any], known: Any) -> bool:
    """Whether the groups hold the same lists of parameters, as long as they were."""
    if known is None or len(groups) != len(known):
        return False
    for group, (params, count) in zip(groups, known):
        if group["params"] is not params or len(params) != count:
            return False
    return True


def _at_exit_of_child(engine: "Engine") -> None:
    """A child of multiprocessing leaves without atexit; what multiprocessing runs instead sends the rest."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, _flush, args=(weakref.ref(engine),), exitpriority=100)


def _flush(ref: Any) -> None:
    engine = ref()
    if engine is not None:
        engine.flush()


def _form(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Optional[str]:
    """How step() was called; see Step.called. `args` begins with the optimizer."""
    given = [*args[1:2], *([kwargs["closure"]] if "closure" in kwargs else [])]
    if len(args) > 2 or len(given) > 1 or set(kwargs) - {"closure"}:
        return None
    if not given or given[0] is None:
        return ""
    return "closure" if callable(given[0]) else None


def _inside_step_of(optimizer: Any) -> bool:
    """Whether a step of this optimizer is on the stack besides the one that is calling us."""
    frame: Any = sys._getframe(1)
    found = 0
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename.endswith("optim/optimizer.py"):
            found += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found > 1


_engine: Optional[Engine] = None
_glances: Dict[int, Glance] = {}
"""id of an optimizer → it, while its steps can be taken at a glance."""
_hooked = False


def current() -> Optional[Engine]:
    """The engine of this process, once torch has been imported."""
    return _engine


def attach(client: Client) -> None:
    """Register the global optimizer hooks; called once torch has been imported."""
    global _engine, _hooked, _compiling
    if _engine is not None:
        return
    _engine = Engine(client)
    _glances.clear()
    if _hooked:
        return
    _hooked = True
    atexit.register(_last)
    torch = sys.modules["torch"]
    _compiling = getattr(getattr(torch, "compiler", None), "is_compiling", _never)
    roots.install(torch)
    optimizer = sys.modules["torch.optim.optimizer"]  # torch.optim deletes the names of its submodules
    optimizer.register_optimizer_step_pre_hook(_before)
    optimizer.register_optimizer_step_post_hook(_after)


def forked(client: Client) -> None:
    """In a forked child: start counting anew under the child's own connection; a child that never steps is silent."""
    global _engine
    if _engine is None:
        return
    for link in _engine.links:
        if hasattr(link, "forked"):
            link.forked()
    _glances.clear()
    _engine = Engine(client) if client.alive and "key" in client.settings else None


def _last() -> None:
    """At exit: what has not been sent."""
    if _engine is not None:
        _engine.flush()


def _never() -> bool:
    return False


_compiling: Callable[[], bool] = _never
"""torch.compiler.is_compiling. Where a step itself is compiled, torch traces the hooks with it: they then vanish, which
leaves the compiled step as it is and the guard blind to it, and that is what the record shows."""


def _before(optimizer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    if _compiling():
        return None
    glance = _glances.get(id(optimizer))
    if glance is not None:
        if glance.timed:
            glance.began = clock()
            glance.own = clock() - glance.began
        return None
    engine = _engine
    if engine is None or not engine.client.alive:
        return None
    try:
        return engine.before(optimizer, args, kwargs)
    except Exception as error:
        _count(engine.client, "engine.before", error)
        return None


def _after(optimizer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
    if _compiling():
        return
    glance = _glances.get(id(optimizer))
    engine = _engine if glance is None else glance.engine
    if engine is None:
        return
    try:
        if glance is None:
            engine.after(optimizer)
        elif not glance.passes(optimizer):
            engine.late(optimizer)
    except Exception as error:
        _count(engine.client, "engine.after", error)
