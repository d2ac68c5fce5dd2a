"""Link *deferred*: code that will run later, or elsewhere, without being called.

Threads, signal handlers, interval timers, exit and garbage-collector callbacks, trace and profile functions, import
hooks, exception hooks, Python functions in place of builtins, and a debugger that is attached. Each with the file and
line of its code. Looked at in the first step, whenever the number of running Python threads changes (also of those not
started through threading), and every 50 steps.

Frames (spec/evidence.md, "sweep"):

    kind "sweep", body {"what": "deferred", "checked": kinds looked at, "atexit": n, "threads": n,
                        "found": [{"kind", "origin", "function", "name", "count"}, …]}     new ones only

Not seen: threads that native code runs without Python, and signal handlers set in C.
"""

from __future__ import annotations

import _thread
import atexit
import builtins
import gc
import signal
import sys
import threading
from typing import Any, Dict, Iterator, List, Optional, Tuple

from . import origin
from .client import Client

EVERY = 50
BUILTINS = ("__import__", "open", "compile", "exec", "eval", "id", "len", "print", "isinstance", "getattr", "hasattr")
_TIMERS = (("real", "ITIMER_REAL"), ("virtual", "ITIMER_VIRTUAL"), ("prof", "ITIMER_PROF"))


class Deferred:
    """See the module."""

    name = "deferred"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.inventory = origin.Inventory()
        self.threads = 0

    def before(self, step: Any) -> None:
        """Nothing to carry."""

    def after(self, step: Any) -> None:
        """Look when due; nothing for the step frame."""
        threads = _thread._count()
        if step.number == 1 or threads != self.threads or step.number % EVERY == 0:
            self.threads = threads
            self._sweep(step.number)

    def _sweep(self, number: int) -> None:
        found: List[Dict[str, Any]] = []
        for look in LOOKS:
            try:
                found.extend(look())
            except Exception as error:
                self.client.fault("deferred." + look.__name__, error)
        body = {
            "what": "deferred",
            "checked": len(LOOKS),
            "threads": self.threads,
            "atexit": atexit._ncallbacks(),
            "found": self.inventory.news(found)[:200],
        }
        self.client.send("sweep", body, number)


def _line(kind: str, value: Any, name: str = "") -> Optional[Dict[str, Any]]:
    """One line of the inventory; None for the guard's own."""
    if origin.is_ours(value):
        return None
    where, function = origin.of(value)
    return {"kind": kind, "origin": where, "function": function, "name": name, "on": name}


def _lines(kind: str, values: Any) -> Iterator[Dict[str, Any]]:
    for value in values:
        line = _line(kind, value)
        if line is not None and line["origin"] is not None and not line["origin"].startswith("<frozen"):
            yield line


def threads() -> Iterator[Dict[str, Any]]:
    """Threads that Python knows, but the main one: by their target, else by the outermost frame they run."""
    frames = sys._current_frames()
    known: Dict[Optional[int], Any] = {thread.ident: thread for thread in threading.enumerate()}
    for ident in set(frames) | set(known):
        thread = known.get(ident)
        if thread is threading.main_thread() or ident == threading.get_ident():
            continue
        line = None
        target = getattr(thread, "_target", None)
        if thread is None and _is_guards(frames.get(ident) if ident is not None else None):
            continue
        if target is not None:
            line = _line("thread", target)
        elif thread is not None and type(thread).run is not threading.Thread.run:
            line = _line("thread", type(thread).run)
        if line is None or line["origin"] is None:
            place, function = _outermost(frames.get(ident) if ident is not None else None)
            line = {"kind": "thread", "origin": place, "function": function, "name": "", "on": ""}
        line["on"] = thread.name if thread is not None else "not started through threading"
        yield line


def _is_guards(frame: Any) -> bool:
    """Whether a thread runs a function of ours: the one that answers the supervisor (frames.py)."""
    outermost = frame
    while outermost is not None and outermost.f_back is not None:
        outermost = outermost.f_back
    ours = sys.modules.get("%s.frames" % __package__)
    return outermost is not None and ours is not None and outermost.f_globals is vars(ours)


def _outermost(frame: Any) -> Tuple[Optional[str], Optional[str]]:
    """The outermost frame that is not threading's own."""
    found = None
    while frame is not None:
        if frame.f_code.co_filename != threading.__file__:
            found = frame.f_code
        frame = frame.f_back
    return (origin.place(found), found.co_name) if found is not None else (None, None)


def handlers() -> Iterator[Dict[str, Any]]:
    """Python functions that signals run."""
    for number in range(1, signal.NSIG):
        try:
            handler = signal.getsignal(number)
        except (OSError, ValueError):
            continue
        if callable(handler) and not isinstance(handler, signal.Handlers) and handler is not signal.default_int_handler:
            line = _line("signal handler", handler, "signal %d" % number)
            if line is not None:
                yield line


def timers() -> Iterator[Dict[str, Any]]:
    """Interval timers that are running."""
    for label, name in _TIMERS:
        remaining, interval = signal.getitimer(getattr(signal, name))
        if remaining or interval:
            yield {"kind": "interval timer", "origin": None, "function": label, "name": label, "on": label}


def collectors() -> Iterator[Dict[str, Any]]:
    """Callbacks of the garbage collector."""
    return _lines("gc callback", gc.callbacks)


def tracers() -> Iterator[Dict[str, Any]]:
    """Trace and profile functions, and monitoring tools (Python 3.12 and later)."""
    hooks = (("trace function", sys.gettrace()), ("profile function", sys.getprofile()))
    for kind, value in (*hooks, ("thread trace function", getattr(threading, "_trace_hook", None))):
        if value is not None:
            line = _line(kind, value)
            if line is not None:
                yield line
    monitoring = getattr(sys, "monitoring", None)
    for number in range(6 if monitoring is not None else 0):
        tool = monitoring.get_tool(number)  # type: ignore[union-attr]
        if tool is not None:
            yield {"kind": "monitoring tool", "origin": None, "function": str(tool)[:80], "name": "", "on": ""}


def importers() -> Iterator[Dict[str, Any]]:
    """Entries of sys.meta_path and sys.path_hooks that are not the interpreter's."""
    yield from _lines("import finder", sys.meta_path)
    yield from _lines("path hook", sys.path_hooks)


def exceptions() -> Iterator[Dict[str, Any]]:
    """Functions that run when something goes wrong."""
    hooks = [("excepthook", sys.excepthook), ("unraisablehook", getattr(sys, "unraisablehook", None))]
    hooks.append(("threading.excepthook", getattr(threading, "excepthook", None)))
    for kind, value in hooks:
        if value is not None and not isinstance(value, type(len)):
            yield from _lines(kind, [value])


def replaced_builtins() -> Iterator[Dict[str, Any]]:
    """Builtins that are Python functions now."""
    for name in BUILTINS:
        value = getattr(builtins, name, None)
        if value is not None and not isinstance(value, type(len)):
            line = _line("builtin", value, name)
            if line is not None and line["origin"] is not None:
                yield line


def tracers_outside() -> Iterator[Dict[str, Any]]:
    """A process that is attached to this one as a debugger (Linux)."""
    try:
        with open("/proc/self/status") as file:
            pid = next((int(line.split()[1]) for line in file if line.startswith("TracerPid:")), 0)
        if pid:
            with open("/proc/%d/comm" % pid) as file:
                name = file.read().strip()
            yield {"kind": "debugger", "origin": None, "function": name, "name": name, "on": "process %d" % pid}
    except (OSError, ValueError):
        return


LOOKS = (tracers_outside, threads, handlers, timers, collectors, tracers, importers, exceptions, replaced_builtins)
