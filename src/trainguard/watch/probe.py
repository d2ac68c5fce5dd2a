"""Scale probe, inner half: this one process is rank 0 of a job of any size, for a few steps.

Runs only where the supervisor's welcome carries a plan (`trainguard probe`): never in a real training. It does what a
guard must not: it replaces functions. torch's `fake` process group stands in for the others (its collectives return at
once and move nothing), so everything that asks for the world size gets the planned one, and code that is on only for
big jobs runs here. The data a rank sees is held at the small job's share, so that runs of two sizes can be compared
line by line and step by step.

Plan: {"world": N, "share": world size whose share of the data is used, "steps": n, "seconds": limit,
"identity": {"host", "user", "time", "gpus"}} (any of these may be missing).

Frames: kind "probe", body one of
    {"began": true, "world": N}
    {"lines": {file: {line: step in which it first ran}}}      Python lines that ran, job's files and packages
    {"sleeps": {place: [times, seconds, first step]}}
    {"stopped": "steps" | "seconds" | "end", "steps": n}
    {"replaced": what, "why"}                                   what of the job's own was not run as it is
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import time
from typing import Any, Callable, Dict, Optional, Set

from . import children, code, identity, inputs
from .client import Client

LINES_A_FRAME = 4_000
IDLE_SHARE = 0.01
"""A probe that uses less of a processor than this waits for something that will not come."""
FILES_LIMIT = 2_000

_OWN = os.path.dirname(os.path.abspath(__file__))
_LIBRARY = os.path.dirname(os.__file__)
_probe: Optional["Probe"] = None


class Probe:
    """One probed process."""

    def __init__(self, client: Client, plan: Dict[str, Any]) -> None:
        self.client = client
        self.world = int(plan["world"])
        self.share = int(plan.get("share") or self.world)
        self.limit = max(1, int(plan.get("steps", 5)))
        self.seconds = float(plan.get("seconds", 30.0))
        self.identity: Dict[str, Any] = plan.get("identity") or {}
        self.steps = 0
        self.lines: Dict[Any, Dict[int, int]] = {}
        """Code object → line → optimizer step in whose work it first ran (0: before the first)."""
        self.sleeps: Dict[str, list[Any]] = {}
        self.skipped: Set[Any] = set()
        """Code objects that are not followed; emptied at the first step, when installed packages come in."""
        self.pid = os.getpid()
        self.done = threading.Lock()
        self.over = threading.Event()
        self.collecting = False
        self.paused = False
        """Whether the main thread is at work of ours."""

    # -- lines ------------------------------------------------------------------------------------------------

    def trace(self) -> None:
        """From now on note every line that runs in this and later threads."""
        threading.settrace(self.enter)
        sys.settrace(self.enter)
        frame: Any = sys._getframe(1)
        while frame is not None:  # what is under way, such as the main script that has just imported torch
            if self._wanted(frame.f_code):
                self.lines.setdefault(frame.f_code, {})
                frame.f_trace = self.line
            frame = frame.f_back

    def enter(self, frame: Any, event: str, argument: Any) -> Any:
        """Trace function: a new frame. Follow it, or not."""
        its = frame.f_code
        if its in self.skipped or self.collecting:
            return None
        known = self.lines.get(its)
        if known is None:
            if not self._wanted(its):
                self.skipped.add(its)
                return None
            known = self.lines.setdefault(its, {})
        known.setdefault(frame.f_lineno, self.steps)
        return self.line

    def line(self, frame: Any, event: str, argument: Any) -> Any:
        """Trace function: a line of a frame that is followed."""
        if event == "line":
            self.lines[frame.f_code].setdefault(frame.f_lineno, self.steps)
        return self.line

    def _wanted(self, its: Any) -> bool:
        """Not the guard, not the standard library; installed packages once training has begun."""
        name = its.co_filename
        outside = "site-packages" in name or "dist-packages" in name
        if name.startswith((_OWN, "<frozen")) or (name.startswith(_LIBRARY) and not outside):
            return False
        return self.steps > 0 or not (outside or name.startswith("<"))

    def pause(self, *_: Any) -> None:
        """Look for no lines in what follows: the guard's own work, in which most of a probe's time would be spent."""
        if os.getpid() == self.pid and sys.gettrace() is not None:
            self.paused = True
            sys.settrace(None)

    def go_on(self, *_: Any) -> None:
        """Look for lines again."""
        if self.paused and os.getpid() == self.pid and not self.done.locked():
            self.paused = False
            sys.settrace(self.enter)

    def collected(self, phase: str, _: Any) -> None:
        """Around garbage collection: its moment is chance, and so are the lines of finalizers that it runs."""
        self.collecting = phase == "start"

    # -- the end ----------------------------------------------------------------------------------------------

    def stepped(self, *_: Any) -> None:
        """An optimizer has stepped; after the last planned one the process is over."""
        if os.getpid() != self.pid:
            return
        self.steps += 1
        if self.steps == 1:
            self.skipped = set()
        if self.steps >= self.limit:
            self.stop("steps")

    def stop(self, why: str) -> None:
        """Report and leave at once: nothing of the job's own clean-up runs, so nothing is saved over."""
        if not self.done.acquire(blocking=False):
            return
        self.over.set()
        self.report(why)
        loaded, opened = code.current(), inputs._inputs
        if loaded is not None:
            code._last(loaded)
        if opened is not None:
            inputs._last(opened)
        self.client.close()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass
        os._exit(0)

    def limit_time(self) -> None:
        """The thread that ends a probe: after `seconds` of processor time, or as long a wait that used next to none.

        Not of the clock on the wall: on a busy machine a small job would seem to do less than a big one.
        """
        wall, spent = time.monotonic(), time.process_time()
        while not self.done.locked():
            self.over.wait(0.25)
            if time.process_time() >= self.seconds:
                self.stop("seconds")
            elif time.monotonic() - wall >= self.seconds:
                if time.process_time() - spent < IDLE_SHARE * self.seconds:
                    self.stop("seconds")
                wall, spent = time.monotonic(), time.process_time()

    def ended(self) -> None:
        """At exit: the script came to its own end first."""
        if os.getpid() == self.pid and self.done.acquire(blocking=False):
            self.over.set()
            self.report("end")

    def report(self, why: str) -> None:
        """Send lines, sleeps and the reason of the end."""
        threading.settrace(None)
        sys.settrace(None)
        files: Dict[str, Dict[str, int]] = {}
        for its, lines in list(self.lines.items()):
            entry = files.setdefault(its.co_filename, {})
            for line, step in list(lines.items()):
                key = str(line)
                entry[key] = min(step, entry.get(key, step))
        batch: Dict[str, Dict[str, int]] = {}
        for name in list(files)[:FILES_LIMIT]:
            batch[name] = files[name]
            if sum(map(len, batch.values())) > LINES_A_FRAME:
                self.client.send("probe", {"lines": batch})
                batch = {}
        self.client.send("probe", {"lines": batch})
        self.client.send("probe", {"sleeps": self.sleeps})
        self.client.send("probe", {"stopped": why, "steps": self.steps})

    def replaced(self, what: str, why: str) -> None:
        """Say what of the job's own does not run as it is."""
        self.client.send("probe", {"replaced": what, "why": why})

    # -- replacements -----------------------------------------------------------------------------------------

    def watch_sleeps(self) -> None:
        """Sleep no less, and note where."""
        sleep = time.sleep

        def noted(seconds: Any) -> None:
            try:
                entry = self.sleeps.setdefault(children.place() or "?", [0, 0.0, self.steps])
                entry[0] += 1
                entry[1] += float(seconds)
            except Exception as error:
                self.client.fault("probe.sleep", error)
            sleep(seconds)

        time.sleep = noted

    def attach(self, torch: Any) -> None:
        """torch has been imported: replace what would talk to other ranks."""
        optimizer = sys.modules["torch.optim.optimizer"]
        for register, hooks in (
            (optimizer.register_optimizer_step_pre_hook, optimizer._global_optimizer_pre_hooks),
            (optimizer.register_optimizer_step_post_hook, optimizer._global_optimizer_post_hooks),
        ):  # the engine's hook is there already: pause before it, go on after it
            hooks.move_to_end(register(self.pause).id, last=False)
            register(self.go_on)
        optimizer.register_optimizer_step_post_hook(self.stepped)
        gc.callbacks.append(self.collected)
        distributed = torch.distributed
        if distributed.is_available():
            self._fake_group(distributed)
            self._hold_share(torch)
            self._plain_reducer(torch)
        gpus = self.identity.get("gpus")
        if isinstance(gpus, int):
            torch.cuda.device_count = lambda: gpus
        self.trace()

    def _fake_group(self, distributed: Any) -> None:
        original, group = distributed.init_process_group, distributed.new_group

        from torch.testing._internal.distributed.fake_pg import FakeStore

        def init_process_group(*args: Any, **kwargs: Any) -> Any:
            return original(backend="fake", store=FakeStore(), rank=0, world_size=self.world)

        def new_group(*args: Any, **kwargs: Any) -> Any:
            if len(args) > 2:
                args = (*args[:2], None, *args[3:])
            kwargs.pop("backend", None)
            return group(*args, **kwargs)

        replace(original, init_process_group, "torch")
        replace(group, new_group, "torch")
        if hasattr(distributed, "monitored_barrier"):
            replace(distributed.monitored_barrier, lambda *args, **kwargs: None, "torch")

    def _hold_share(self, torch: Any) -> None:
        """DistributedSampler deals out the small job's share: the same samples at every probed size."""
        sampler = torch.utils.data.distributed.DistributedSampler
        original = sampler.__init__

        def __init__(this: Any, dataset: Any, num_replicas: Any = None, rank: Any = None, *a: Any, **k: Any) -> None:
            original(this, dataset, min(self.share, num_replicas or self.world), 0, *a, **k)

        sampler.__init__ = __init__

    def _plain_reducer(self, torch: Any) -> None:
        """DistributedDataParallel reduces through a hook that hands gradients back: the fake group has no reducer."""
        parallel = torch.nn.parallel.DistributedDataParallel
        original, register = parallel.__init__, parallel.register_comm_hook

        def hand_back(state: Any, bucket: Any) -> Any:
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        hand_back.__annotations__ = {}  # torch compares them with its own types, ours are texts

        def __init__(this: Any, *args: Any, **kwargs: Any) -> None:
            original(this, *args, **kwargs)
            register(this, None, hand_back)

        def register_comm_hook(this: Any, state: Any, hook: Callable[..., Any]) -> None:
            self.replaced(
                "communication hook %s" % getattr(hook, "__qualname__", "?"), "there is nobody to reduce with"
            )

        parallel.__init__ = __init__
        parallel.register_comm_hook = register_comm_hook


def replace(old: Any, new: Any, root: str) -> None:
    """Put `new` wherever a module of package `root` has `old` under its name."""
    name = old.__name__
    for module in list(sys.modules.values()):
        owner = getattr(module, "__name__", "") if module is not None else ""
        if isinstance(owner, str) and owner.split(".")[0] == root and vars(module).get(name) is old:
            setattr(module, name, new)


def install(client: Client) -> None:
    """Begin, where the welcome carries a plan."""
    global _probe
    plan = client.settings.get("probe")
    if not isinstance(plan, dict):
        return
    _probe = Probe(client, plan)
    client.send("probe", {"began": True, "world": _probe.world})
    identity.assume(_probe.identity)
    _probe.watch_sleeps()
    atexit.register(_probe.ended)
    threading.Thread(target=_probe.limit_time, name="trainguard-probe", daemon=True).start()


def attach(torch: Any) -> None:
    """Called once torch has been imported, after the engine."""
    if _probe is not None:
        _probe.attach(torch)


def forked() -> None:
    """In a forked child: it is a helper of the probed process and ends with it."""
    if _probe is not None:
        sys.settrace(None)
        threading.settrace(None)
