"""The step engine: sees every optimizer step through torch's public global hooks and asks each link what it saw.

A *link* is one relation of a training step that can be checked (DESIGN: the chain of links). Each is a class in
its own file, listed in `links.LINKS`; for every step it returns a small JSON value, which goes out as one frame:

    kind "step", step = number of the optimizer step in this process (from 1), body =
      {"opt": index of the optimizer, "index": step of that optimizer (from 1), "wall_ns": time since the previous
       step began, "own_ns": time of our own, "checked": bool, "level": the governor's, "<link name>": value, …}

`checked` false means the governor skipped the step (budget) and only the links with `every_step` spoke.
Values of the links of this product are described in spec/evidence.md, "Step frames".
"""

from __future__ import annotations

import functools
import random
import sys
import threading
import time
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import links as _links
from . import roots, sample
from .client import Client
from .governor import Governor

wall_clock = time.perf_counter_ns
"""Time between steps: what a person waits."""

clock = time.thread_time_ns
"""Our own time: CPU time of this thread, so that a busy machine does not count as a busy guard."""


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

    def __init__(self, optimizer: Any, opt: int, gone: Callable[[Any], None]) -> None:
        self.ref = weakref.ref(optimizer, gone)
        self.opt = opt
        """Index of the optimizer in this process, in order of first step."""
        self.count = 0
        """Steps it made so far."""
        self.signature: Any = None
        self.entries: List[Entry] = []
        self.without_grad: frozenset[int] = frozenset()
        """Positions of parameters that had no gradient when last looked at; these are not drawn."""
        self.next_full = True
        self.next_sample: Optional[List[Tuple[Entry, sample.Place]]] = None
        """What the next step will sample, fixed beforehand so that gradient hooks can be armed for it."""
        self.pool: List[Entry] = []
        """Entries that can be drawn; empty when it has to be made anew."""
        self.permutations: Dict[int, List[int]] = {}
        self.shares: List[int] = []
        """Indices of other optimizers that hold some of the same parameters."""
        self.memory: Dict[str, Any] = {}
        """Each link's own values for this optimizer, by link name."""


class Step:
    """What a link is given: before the update, when the gradients are final, and after the update."""

    __slots__ = (
        "depth",
        "engine",
        "full",
        "grads",
        "index",
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
        self.own_ns = 0
        self.wall_ns = 0
        self.depth = 0
        """Steps of the same optimizer that began inside this one and have not ended."""


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
        self.steps = 0
        self.tracks: Dict[int, Track] = {}
        """id of a live optimizer → what we remember of it."""
        self.opts = 0
        self.last_ns = 0
        self.local = threading.local()
        self.lock = threading.Lock()
        self.idle_lock = threading.Lock()
        self.names: Dict[int, str] = {}
        self.unsent_ns = 0
        """Own time spent after a frame was built; booked with the next one."""
        self.links: List[Any] = _made(client)
        self.always = [link for link in self.links if link.every_step]
        self.readers = [link for link in self.links if hasattr(link, "ready")]
        self.idlers = [link for link in self.links if hasattr(link, "between")]

    # -- hooks ------------------------------------------------------------------------------------------------

    def before(self, optimizer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        """The pre-hook: nothing of the update has happened yet. May return arguments with the closure wrapped."""
        start = clock()
        stack = self._stack()
        if stack and stack[-1].optimizer is optimizer:
            if _inside_step_of(optimizer):
                stack[-1].depth += 1  # a subclass that calls its base's step: one step, the outer one
                return None
            stack.pop()  # left behind by an exception
        track = self.track(optimizer)
        with self.lock:
            self.steps += 1
            track.count += 1
            step = Step(self, optimizer, track, self.steps)
            now = wall_clock()
            step.wall_ns = now - self.last_ns if self.last_ns else 0
            self.last_ns = now
        self._refresh(track, optimizer)
        if step.full:
            step.sample = track.next_sample if track.next_sample is not None else self.draw_sample(track, step.index)
        stack.append(step)
        changed = None
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
        missing = frozenset(i for i, grad in enumerate(step.grads) if grad is None)
        if missing != track.without_grad:
            track.without_grad = missing
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
        body: Dict[str, Any] = {"opt": step.opt, "index": step.index, "wall_ns": step.wall_ns, "own_ns": 0}
        body["checked"] = step.full
        body["level"] = self.governor.level
        if step.full:
            with self.torch.no_grad():
                self._collect(self.links, step, body)
        else:
            self._collect(self.always, step, body)
        middle = clock()
        step.own_ns += middle - start + self.unsent_ns
        body["own_ns"] = step.own_ns
        self.client.send("step", body, step.number)
        self.governor.spend(step.own_ns, step.wall_ns, step.full)
        starting = step.number <= self.governor.always
        if self.idlers and (starting or self.governor.everything or self.governor.balance_ns(wall_clock()) > 0):
            self._idle(step)
        # The first pass over all code, hooks and kernels is part of starting up and is not taken from the credit,
        # which short runs need for their steps.
        self.unsent_ns = 0 if starting else clock() - middle

    # -- planning ---------------------------------------------------------------------------------------------

    def plan(self, track: Track, now_ns: int) -> None:
        """Decide whether the next step of this optimizer is checked and what it samples."""
        index = track.count + 1
        track.next_full = self.governor.wants(track.opt, index, now_ns)
        track.next_sample = self.draw_sample(track, index) if track.next_full else None

    def draw_sample(self, track: Track, index: int) -> List[Tuple[Entry, sample.Place]]:
        """The next tensors of the secret rotation and a secret place in each; equal on ranks with equal tensors.

        Every permutation covers all tensors, so none waits for more than two rounds of ceil(T / k) checked steps.
        """
        pool = track.pool
        if not pool:
            usable = [e for e in track.entries if e.reason is None]
            pool = track.pool = [e for e in usable if e.position not in track.without_grad] or usable
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
            track = Track(optimizer, opt, lambda ref: self._gone(key, opt, ref))
            self.opts += 1
            self.tracks[key] = track
        return track

    def _gone(self, key: int, opt: int, ref: Any) -> None:
        """The optimizer is no more: let go of its parameters."""
        known = self.tracks.get(key)
        if known is not None and known.ref is ref:
            del self.tracks[key]
        for link in self.links:
            forget = getattr(link, "forget", None)
            if forget is not None:
                forget(opt)

    def _refresh(self, track: Track, optimizer: Any) -> None:
        """Rebuild the table of parameters when a group was added, removed or changed in number."""
        signature = [(id(group["params"]), len(group["params"])) for group in optimizer.param_groups]
        if signature == track.signature:
            return
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
                with self.torch.no_grad():
                    self.ready(step)
            except Exception as error:
                self.client.fault("engine.ready", error)
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
            self.client.fault("link.%s.%s" % (link.name, phase), error)
            return None

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


def _made(client: Client) -> List[Any]:
    """One object of every link; a link that cannot be made is counted and left out."""
    made = []
    for link in _links.LINKS:
        try:
            made.append(link(client))
        except Exception as error:
            client.fault("link.%s" % link.__name__, error)
    return made


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
    if _hooked:
        return
    _hooked = True
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
    _engine = Engine(client) if client.alive and "key" in client.settings else None


def _never() -> bool:
    return False


_compiling: Callable[[], bool] = _never
"""torch.compiler.is_compiling. Where a step itself is compiled, torch traces the hooks with it: they then vanish, which
leaves the compiled step as it is and the guard blind to it, and that is what the record shows."""


def _before(optimizer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    if _compiling():
        return None
    engine = _engine
    if engine is None or not engine.client.alive:
        return None
    try:
        return engine.before(optimizer, args, kwargs)
    except Exception as error:
        engine.client.fault("engine.before", error)
        return None


def _after(optimizer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
    if _compiling():
        return
    engine = _engine
    if engine is None:
        return
    try:
        engine.after(optimizer)
    except Exception as error:
        engine.client.fault("engine.after", error)
