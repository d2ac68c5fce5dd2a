"""Looks at guarded processes from outside: their machine instructions (text.py) and their Python code (reader.py).

One thread of the supervisor with one process at work at a time, at the lowest priority. The first look at a process
comes some seconds after its first optimizer step (or, where none is reported, once it has used that much processor
time), the next when a checkpoint was saved or after `every_seconds`, and never sooner than keeps its cost below SHARE
of wall time. Nothing in the process is asked, paused or written.

    looker = Outside(tell, settings); looker.met(pid, number, …); looker.stepped(pid); looker.saved(); looker.lost(pid)
    tell(kind, body, pid, number)        from this thread; the caller queues it
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainguard.watch import code, processes, text

READER = Path(__file__).parent / "reader.py"
SHARE = 0.01
"""Most of a core's time that looking may take, per process looked at."""

READING_CPU_SECONDS = 10.0
"""Processor time of one reading, after which the rest waits for the next."""

READING_LIMIT_SECONDS = 300.0
OUTPUT_LIMIT_BYTES = 32 << 20
BETWEEN_SAVES_SECONDS = 60.0
MUTE_CPU_SECONDS = 30.0
"""A process that reports no step is looked at once it has used this much."""

LINES_LIMIT_BYTES = 100_000

Tell = Callable[[str, dict[str, Any], int, int], None]


@dataclass(slots=True)
class _Watched:
    """One process."""

    number: int
    start_ticks: int | None
    hello: dict[str, Any]
    due: float | None = None
    looked: float | None = None
    cursor: str = ""
    hidden: bool = False


class Outside:
    """See the module."""

    def __init__(self, tell: Tell, *, first_seconds: float, every_seconds: float) -> None:
        self._tell = tell
        self._first, self._every = first_seconds, every_seconds
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; does nothing where `every_seconds` is 0."""
        if self._every > 0:
            self._thread = threading.Thread(target=self._work, name="outside", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End, with the reading that is going on."""
        self._stop.set()
        with self._lock:
            if self._child is not None:
                self._child.kill()
        if self._thread is not None:
            self._thread.join(5.0)

    def met(self, pid: int, number: int, start_ticks: int | None, hello: dict[str, Any]) -> None:
        """A process said hello."""
        with self._lock:
            self._watched[pid] = _Watched(number, start_ticks, hello)

    def stepped(self, pid: int) -> None:
        """A process reported an optimizer step."""
        known = self._watched.get(pid)
        if known is not None and known.due is None:
            known.due = time.monotonic() + self._first

    def saved(self) -> None:
        """A checkpoint was saved: look at everybody soon."""
        now = time.monotonic()
        with self._lock:
            for known in self._watched.values():
                if known.looked is not None and now - known.looked > BETWEEN_SAVES_SECONDS:
                    known.due = now

    def lost(self, pid: int) -> None:
        """A process closed its connection; it is looked at only as long as it is connected."""
        with self._lock:
            self._watched.pop(pid, None)

    def _work(self) -> None:
        while not self._stop.wait(min(1.0, self._first or 0.1)):
            pid = self._next()
            if pid is not None:
                self._look(pid)

    def _next(self) -> int | None:
        now = time.monotonic()
        with self._lock:
            for pid, known in self._watched.items():
                forked = known.hello.get("forked_from") is not None
                if known.due is None and not forked and (processes.cpu_seconds(pid) or 0) > MUTE_CPU_SECONDS:
                    known.due = now
            due = [(known.due, pid) for pid, known in self._watched.items() if known.due is not None]
        first = min(due, default=None)
        return first[1] if first is not None and first[0] <= now else None

    def _look(self, pid: int) -> None:
        known = self._watched.get(pid)
        if known is None:
            return
        began = time.thread_time()
        if processes.start_ticks_of(pid) == known.start_ticks:
            self._tell("text", text.look(pid), pid, known.number)
        spent = time.thread_time() - began
        if not known.hidden:
            body = self._read(pid, known)
            known.hidden = "error" in body
            spent += body.get("cpu_seconds", 0.0) if isinstance(body.get("cpu_seconds"), float) else 0.0
            if not self._stop.is_set() and pid in self._watched:
                self._tell("live", body, pid, known.number)
        known.looked = time.monotonic()
        known.due = known.looked + max(self._every, spent / SHARE)

    def _read(self, pid: int, known: _Watched) -> dict[str, Any]:
        """One reading by the reader, in the interpreter that the process itself runs."""
        flags = known.hello.get("flags")
        options = {
            "pid": pid,
            "prefixes": list(code.CRITICAL),
            "guard": str(READER.parent),
            "optimize": flags.get("optimize", 0) if isinstance(flags, dict) else 0,
            "cpu_seconds": READING_CPU_SECONDS,
            "everything": known.looked is not None,
            "after": known.cursor,
        }
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)  # here: Yama lets an ancestor, no sibling
            try:
                program = str(Path(f"/proc/{pid}/exe").readlink())
                body = json.loads(self._run(program, json.dumps(options | {"memory": memory}).encode(), memory))
            finally:
                os.close(memory)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        if not isinstance(body, dict):
            return {"error": "the reader's answer is no object"}
        known.cursor = str(body.get("cursor", ""))
        return body

    def _run(self, program: str, options: bytes, memory: int) -> bytes:
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
        command = [program, "-I", "-S", "-B", str(READER)]
        with self._lock:
            if self._stop.is_set():
                raise OSError("stopped")
            child = self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=kept,
                cwd="/",
                start_new_session=True,
                pass_fds=(memory,),
            )
        try:
            os.setpriority(os.PRIO_PROCESS, child.pid, 19)
        except OSError:
            pass
        try:
            out, _ = child.communicate(options, timeout=READING_LIMIT_SECONDS)
        finally:
            child.kill()
            child.wait()
            with self._lock:
                self._child = None
        if not out or len(out) > OUTPUT_LIMIT_BYTES:
            raise OSError(f"the reader ended with status {child.returncode} and {len(out)} bytes")
        return out

    @property
    def pid(self) -> int | None:
        """The reader at work: our child, but no part of the job."""
        child = self._child
        return child.pid if child is not None else None
