"""Replay, inner half: tries a step again with something done to it, to see whether that gives what the run recorded.

Runs only where the plan has a "window" (`trainguard audit`, once a difference is proved): never in a real training.
Before each step of the window the replayed process waits and is told what to try. Every trial is a fork: the child
does the *acts* (acts.py), goes on with the unmodified script to the end of a step, and hands over the frames that this
gave; the parent stays as it was. So a trial costs one step, not one replay. Frames, kind "replay":

    {"ready": step} or {"unable": why}            then, from the outer half, one message at a time:
        {"trial": n, "acts": […], "until": step}  answered by {"tried": n, "frame": [kind, body, step]} for each frame
                                                  and {"tried": n, "done": failure or "", "facts": {…}}
        {"ask": n, "what": …, …}                  answered by {"asked": n, "found": […]} (acts.solve, no fork)
        {"go": true}                              on to the next step

What a fork must not share is taken care of: our connection and its sequence stay the parent's; Python's generator,
reseeded by the interpreter after a fork, is put back; OpenMP's threads are given up before; batches that loader
processes make are fetched by the parent and kept for it and for every later child.
"""

from __future__ import annotations

import ctypes
import glob
import io
import json
import os
import pickle
import random
import select
import signal
import socket
import sys
import time
from typing import Any, Dict, List, Optional

from . import acts, bootstrap

TRIAL_SECONDS = 120.0
MESSAGE_BYTES = 1 << 18
PAUSE_HARD = 2
"""omp_pause_hard of OpenMP 5.0: the threads of the pool end; the next parallel region makes new ones."""


class Explorer:
    """One replayed process whose steps can be tried again."""

    def __init__(self, warp: Any, first: int, last: int) -> None:
        self.warp = warp
        self.first, self.last = first, last
        self.trial: Optional[Dict[str, Any]] = None
        """In a child: what it is for."""
        self.frames: List[Any] = []
        self.out = -1
        self.line: Optional[socket.socket] = None
        """In a child: where it asks the parent for batches."""
        self.stage = acts.Stage(warp.torch, self)
        self.stage.listen(max(0, first - acts.REMEMBERED))
        self.fetched: Dict[int, List[bytes]] = {}
        """Loader iterator → batches that children asked for and the parent has not had yet, pickled."""
        self.taken: Dict[int, int] = {}
        """In a child: how many of these it has had."""
        self.iterators: Dict[int, Any] = {}
        self._plain_next: Any = None
        if first <= 1:
            self.stage.on_first_call = lambda: self.serve(1)

    # -- the parent ------------------------------------------------------------------------------------------------

    def stepped(self, done: int) -> None:
        """Step `done` is over."""
        if self.trial is not None:
            if done >= self.trial["until"]:
                self.leave("")
            return
        if done + 1 >= self.first - acts.REMEMBERED:
            self.stage.keep()
        if self.first <= done + 1 <= self.last and done > 0:
            self.serve(done + 1)

    def serve(self, number: int) -> None:
        """Wait for what to try at step `number`; returns to go on, in the parent, or as a trial, in a child."""
        warp = self.warp
        warp.engine.flush()
        why = self._unable()
        if why:
            warp.client.send("replay", {"unable": why})
            return
        self._tee()
        warp.client.send("replay", {"ready": number}, number)
        while True:
            message = self._message()
            if message is None or message.get("stop"):
                warp.stop()
            elif message.get("go"):
                return
            elif "ask" in message:
                found = acts.solve(self.stage, message)
                warp.client.send("replay", {"asked": message["ask"], "found": found}, number)
            elif self._trial(message, number):
                return

    def _unable(self) -> str:
        if self.warp.torch.cuda.is_initialized():
            return "a process that computes on an accelerator cannot be forked"
        return ""

    def _message(self) -> Optional[Dict[str, Any]]:
        link = self.warp.client.socket
        if link is None:
            return None
        select.select([link], [], [])
        try:
            data = link.recv(MESSAGE_BYTES)
        except OSError:
            return None
        return json.loads(data) if data else None

    def _trial(self, message: Dict[str, Any], number: int) -> bool:
        """Fork; returns True in the child. The parent sends on what the child says, and serves it batches."""
        _rest_threads()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        state = random.getstate()
        client, bootstrap._client = bootstrap._client, None  # a child of ours says no hello
        child = os.fork()
        if child == 0:
            ours.close()
            random.setstate(state)
            self._enter(message, theirs, number)
            return True
        bootstrap._client = client
        theirs.close()
        said = _Lines(ours)
        failure = "it ended before the step was over"
        deadline = time.monotonic() + TRIAL_SECONDS
        facts: Dict[str, Any] = {}
        while True:
            line = said.read(deadline)
            if line is None:
                break
            if "batch" in line:
                data = self._fetch(int(line["batch"]), int(line["turn"]))
                ours.sendall(len(data).to_bytes(8, "little") + data)
            elif "frame" in line:
                self.warp.client.send("replay", {"tried": message["trial"], "frame": line["frame"]}, number)
            elif "done" in line:
                failure, facts = str(line["done"]), line.get("facts") or {}
                break
        if said.late:
            failure = "it took longer than %d s" % TRIAL_SECONDS
        _end(child)
        ours.close()
        self.warp.client.send("replay", {"tried": message["trial"], "done": failure, "facts": facts}, number)
        return False

    # -- a child ---------------------------------------------------------------------------------------------------

    def _enter(self, message: Dict[str, Any], line: socket.socket, number: int) -> None:
        """Become a trial."""
        self.trial = message
        self.line = line
        self.warp.pid = os.getpid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        client = self.warp.client
        client.send = self._said
        sys.excepthook = lambda kind, error, _: self.leave("%s: %s" % (kind.__name__, str(error)[:300]))
        loaders = sys.modules.get("torch.utils.data.dataloader")
        kind = getattr(loaders, "_MultiProcessingDataLoaderIter", None)
        if kind is not None:
            _leave_workers(kind)
        try:
            self.stage.perform(message.get("acts") or [], number)
        except Exception as error:
            self.leave("%s: %s" % (type(error).__name__, str(error)[:300]))

    def _said(self, kind: str, body: Any, step: Optional[int] = None) -> None:
        if kind in ("step", "steps"):
            self._tell({"frame": [kind, body, step]})

    def _tell(self, value: Dict[str, Any]) -> None:
        if self.line is not None:
            self.line.sendall(json.dumps(value, default=str).encode() + b"\n")

    def leave(self, failure: str) -> None:
        """In a child: say how it went, and be gone without any clean-up of the job's."""
        try:
            if not failure:
                self.warp.engine.flush()
            self._tell({"done": failure, "facts": self.stage.facts()})
        finally:
            os._exit(0)

    # -- batches of loader processes ---------------------------------------------------------------------------------

    def _tee(self) -> None:
        """From now on the batches of loader processes go through us."""
        loaders = sys.modules.get("torch.utils.data.dataloader")
        kind = getattr(loaders, "_MultiProcessingDataLoaderIter", None)
        if kind is None or self._plain_next is not None:
            return
        plain = self._plain_next = kind._next_data
        explorer = self

        def _next_data(iterator: Any) -> Any:
            return explorer._next(plain, iterator)

        kind._next_data = _next_data

    def _next(self, plain: Any, iterator: Any) -> Any:
        key = id(iterator)
        if self.trial is None:
            self.iterators[key] = iterator
            waiting = self.fetched.get(key)
            return _opened(waiting.pop(0)) if waiting else plain(iterator)
        workers = getattr(iterator, "_workers", None)
        if not workers or workers[0]._parent_pid == os.getpid() or self.line is None:
            return plain(iterator)  # made in this very child
        turn = self.taken[key] = self.taken.get(key, 0) + 1
        self._tell({"batch": key, "turn": turn})
        size = int.from_bytes(_exactly(self.line, 8), "little")
        return _opened(_exactly(self.line, size))

    def _fetch(self, key: int, turn: int) -> bytes:
        """The `turn`-th batch of an iterator from here on, for a child."""
        waiting = self.fetched.setdefault(key, [])
        while len(waiting) < turn:
            if key not in self.iterators:
                self.iterators[key] = _object(key, "_MultiProcessingDataLoaderIter")
            iterator = self.iterators[key]
            stream = self.warp.torch.default_generator
            state = stream.get_state()
            try:
                content = (True, self._plain_next(iterator))
            except BaseException as error:  # StopIteration too: it is the child's, and ours later
                content = (False, error)
            stream.set_state(state)  # a sampler may draw from it: that is the child's doing, not yet ours
            waiting.append(_closed(content))
        return waiting[turn - 1]


class _Pickler(pickle.Pickler):
    """Tensors as plain bytes: torch.save, which torch's own way goes through, does nothing in a replay."""

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules["torch"]
        if type(value) is torch.Tensor and value.layout is torch.strided and value.device.type == "cpu":
            plain = value.detach().contiguous()
            data = bytes(plain.view(-1).view(torch.uint8).numpy()) if plain.numel() else b""
            return _tensor, (data, str(plain.dtype)[6:], tuple(plain.shape))
        return NotImplemented


def _tensor(data: bytes, dtype: str, shape: Any) -> Any:
    torch = sys.modules["torch"]
    kind = getattr(torch, dtype)
    return (torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)).reshape(shape)


def _closed(content: Any) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=4).dump(content)
    return out.getvalue()


def _opened(data: bytes) -> Any:
    fine, content = pickle.loads(data)  # noqa: S301 - our own, from this process or its parent
    if fine:
        return content
    raise content


def _object(key: int, name: str) -> Any:
    import gc

    return next((each for each in gc.get_objects() if id(each) == key and type(each).__name__ == name), None)


def _leave_workers(kind: Any) -> None:
    """In a child: the loader processes are the parent's, whatever becomes of our copy of the loader."""
    plain = kind._shutdown_workers

    def _shutdown_workers(iterator: Any) -> None:
        workers = getattr(iterator, "_workers", None)
        if workers and workers[0]._parent_pid == os.getpid():
            plain(iterator)

    kind._shutdown_workers = _shutdown_workers
    kind.__del__ = _shutdown_workers


class _Lines:
    """JSON lines from a child."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.data = b""
        self.late = False

    def read(self, deadline: float) -> Optional[Dict[str, Any]]:
        """The next one; None at the end, or when it is too late."""
        while b"\n" not in self.data:
            left = deadline - time.monotonic()
            ready = select.select([self.link], [], [], max(0.0, left))[0]
            self.late = not ready
            more = self.link.recv(1 << 16) if ready else b""
            if not more:
                return None
            self.data += more
        line, _, self.data = self.data.partition(b"\n")
        value = json.loads(line)
        return value if isinstance(value, dict) else None


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = link.recv(size - len(data))
        if not more:
            os._exit(1)
        data += more
    return data


def _end(child: int) -> None:
    """End a child of ours and take its status."""
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        os.waitpid(child, 0)
    except ChildProcessError:
        pass


def _rest_threads() -> None:
    """Have OpenMP give its threads up: a child that inherits a pool without its threads waits for them for ever."""
    torch = sys.modules["torch"]
    for path in glob.glob(os.path.join(os.path.dirname(str(torch.__file__)), "lib", "libgomp*")):
        try:
            ctypes.CDLL(path).omp_pause_resource_all(PAUSE_HARD)
        except (OSError, AttributeError):
            pass
