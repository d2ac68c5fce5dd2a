"""Link *stalls*, inner half: says where the training thread is, when the supervisor asks.

The supervisor sees from outside that a thread waits, and in which system call (watch/stalls.py); which line of Python
waits only this process can say. A thread of ours sleeps in `poll` until it is asked, reads the frames of the training
thread and answers. It costs nothing while nobody asks.

    supervisor → process   {"ask": n, "slices": how often the thread had been given a processor when it was looked at}
    process → supervisor   kind "stack", body {"ask": n, "id": i, "frames": ["file:line:function", …] innermost first,
                           absent when this id was sent before, "same": whether the thread has not run since,
                           "done": optimizer steps finished, "since_ns": since the last of them}

The thread is started at the first optimizer step, is unknown to `threading` (a job may join every thread it finds
there) and is gone for the length of a fork: the child gets none, and Python does not warn of threads.
"""

from __future__ import annotations

import _thread
import json
import os
import select
import sys
import time
from typing import Any, Dict, List, Optional, Tuple

from .client import Client

DEPTH = 40
"""Innermost frames that are told."""

STACKS_LIMIT = 1024
STOP_SECONDS = 0.2

_OWN = os.path.dirname(os.path.abspath(__file__))


class Frames:
    """See the module. As a link it only says which thread makes the steps."""

    name = "stalls"
    every_step = True

    def __init__(self, client: Client) -> None:
        self.client = client
        self.thread: Optional[int] = None

    def before(self, step: Any) -> None:
        """A step has begun."""
        if _answerer is not None:
            _answerer.inside = True

    def still(self, track: Any, optimizer: Any, still: Any) -> bool:
        """The answering thread is there; after a fork it is not."""
        if _answerer is None:
            return False
        still.same.append((sys.modules[__name__], "_answerer", _answerer))
        return True

    def after(self, step: Any) -> Optional[Dict[str, Any]]:
        """The kernel's number of the thread, when it is a new one."""
        if _answerer is not None:
            _answerer.inside = False
        ident = _thread.get_ident()
        if _answerer is None:
            _start(self.client, ident)
        if ident == self.thread:
            return None
        self.thread = ident
        if _answerer is not None:
            _answerer.follow(ident, _thread.get_native_id())
        return {"tid": _thread.get_native_id(), "pid": os.getpid()}

    def forked(self) -> None:
        """The child has no thread of ours; its first step starts one."""
        _forget()


class _Answerer:
    """The thread that answers."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.ident = self.native = 0
        self.inside = False
        """Whether a step that the links are asked about is going on."""
        self.ids: Dict[Tuple[str, ...], int] = {}
        self.names: Dict[str, str] = {}
        self.listens, self.wakes = os.pipe()
        self.running = _thread.allocate_lock()
        """Held while the thread runs."""

    def follow(self, ident: int, native: int) -> None:
        """Answer for this thread from now on."""
        self.ident, self.native = ident, native

    def begin(self) -> None:
        """Start the thread."""
        self.running.acquire()
        try:
            _thread.start_new_thread(self._serve, ())
        except RuntimeError:
            self.running.release()
            raise

    def end(self) -> None:
        """Stop the thread and wait for it, briefly."""
        os.write(self.wakes, b"x")
        if self.running.acquire(timeout=STOP_SECONDS):
            self.running.release()
            self.close()

    def close(self) -> None:
        """Give back the descriptors."""
        os.close(self.listens)
        os.close(self.wakes)

    def _serve(self) -> None:
        try:
            link = self.client.socket
            poll = select.poll()
            poll.register(self.listens, select.POLLIN)
            if link is not None:
                poll.register(link.fileno(), select.POLLIN)
            while link is not None:
                if any(fd == self.listens for fd, _ in poll.poll()):
                    return
                data = link.recv(4096)
                if not data:
                    return
                self._answer(json.loads(data))
        except Exception as error:
            self.client.fault("frames", error)
        finally:
            self.running.release()

    def _answer(self, ask: Any) -> None:
        frame = sys._current_frames().get(self.ident)
        stack = self._stack(frame)
        del frame
        same = ask.get("slices") is not None and ask["slices"] == self._slices()
        body: Dict[str, Any] = {"ask": ask["ask"], "same": same}
        if len(self.ids) >= STACKS_LIMIT:
            self.ids = {}
        body.update(self._progress())
        known = self.ids.get(stack)
        if known is None:
            known = self.ids[stack] = time.monotonic_ns()
            body["frames"] = list(stack)
        body["id"] = known
        self.client.send("stack", body)

    def _progress(self) -> Dict[str, int]:
        """Steps finished, and the time since the last one began or ended."""
        module = sys.modules.get("%s.engine" % __package__)
        tally = getattr(getattr(module, "_engine", None), "tally", None)
        if tally is None:
            return {}
        return {"done": tally.steps - self.inside, "since_ns": max(0, time.perf_counter_ns() - tally.last_ns)}

    def _stack(self, frame: Any) -> Tuple[str, ...]:
        """`file:line:function` of the frames, innermost first, without the guard's own."""
        lines: List[str] = []
        while frame is not None and len(lines) < DEPTH:
            code = frame.f_code
            name = self.names.get(code.co_filename)
            if name is None:
                name = code.co_filename if code.co_filename[:1] == "<" else os.path.abspath(code.co_filename)
                self.names[code.co_filename] = name
            if not name.startswith(_OWN):
                lines.append("%s:%d:%s" % (name, frame.f_lineno or 0, code.co_name))
            frame = frame.f_back
        return tuple(lines)

    def _slices(self) -> Optional[int]:
        """How often the thread was given a processor; it has not run while this stands still (Linux)."""
        try:
            with open("/proc/self/task/%d/schedstat" % self.native, "rb", buffering=0) as file:
                return int(file.read(128).split()[2])
        except (OSError, IndexError, ValueError):
            return None


_answerer: Optional[_Answerer] = None
_registered = False


def _start(client: Client, ident: int) -> None:
    global _answerer, _registered
    if not client.alive or getattr(client, "socket", None) is None:
        return
    answerer = _Answerer(client)
    answerer.follow(ident, _thread.get_native_id())
    answerer.begin()
    _answerer = answerer
    if not _registered:
        _registered = True
        os.register_at_fork(before=_before_fork)


def _before_fork() -> None:
    """No thread of ours in a process that forks; the next step starts one."""
    global _answerer
    answerer, _answerer = _answerer, None
    try:
        if answerer is not None:
            answerer.end()
    except OSError:
        pass


def _forget() -> None:
    global _answerer
    _answerer = None
