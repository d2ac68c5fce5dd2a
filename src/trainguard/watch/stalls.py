"""Link *stalls*, outer half: where the time of a training thread goes, as the kernel shows it.

A thread of the supervisor looks at the training thread of every process that makes optimizer steps, about 20 times a
second, in /proc/PID/task/TID: `syscall` (what it waits in, with arguments) and `schedstat` (how long it ran, and how
long it was ready to run and had no processor). So a sleep is known by its system call, not by a stopwatch, and time
that others took is told apart from time that was spent waiting. The job is not stopped, signalled or traced.

Which line of Python waits only the process can say: it is asked (watch/frames.py), seldom, and the answer counts for
the sleep it was asked about while the thread has not run since (`slices`).

Records (spec/evidence.md, "Stalls"): `stall` for each question, `pace` every ten seconds and at the end of a process.
Own cost: the pauses grow until it stays under SHARE of one processor.

Needs the right to read that file of one's own descendants: Linux, no Yama scope above 1; else the link is blind.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SHARE = 0.002
"""Of one processor."""

CREDIT_NS = 20_000_000
"""May be used beyond the share, once, so that short runs are looked at closely."""

PERIOD_SECONDS = 0.05
PACE_SECONDS = 10.0
SLOW_FACTOR, SLOW_NS = 1.5, 30_000_000
"""A step is slow once it takes half as long again as the median, and 30 ms more."""

TOGETHER_NS = 260_000_000
"""Steps that are not checked are told of together, four times a second (watch/engine.py)."""

SLOW_ASKS = 5
"""Questions about one slow step."""

BURST, TOKENS_PER_SECOND = 40.0, 2.0
"""Questions to one process."""

BASE_SECONDS = (2.0, 30.0)
"""Pause between questions at no occasion: in the first minute, and later."""

HANG_ASKS = 3
"""Hangs reported of one run."""

_SLEEPS = {
    "x86_64": {35: "nanosleep", 230: "clock_nanosleep", 34: "pause", 128: "rt_sigtimedwait", 130: "rt_sigsuspend"},
    "aarch64": {101: "nanosleep", 115: "clock_nanosleep", 137: "rt_sigtimedwait", 133: "rt_sigsuspend"},
}
"""Calls that do nothing but wait."""

_POLLS: dict[str, dict[int, tuple[str, int]]] = {
    "x86_64": {23: ("select", 0), 270: ("pselect6", 0), 7: ("poll", 1), 271: ("ppoll", 1)},
    "aarch64": {72: ("pselect6", 0), 73: ("ppoll", 1)},
}
"""Calls that wait for descriptors, and the argument that says for how many; for none they are sleeps."""

_EPOLLS = {
    "x86_64": {232: "epoll_wait", 281: "epoll_pwait", 441: "epoll_pwait2"},
    "aarch64": {22: "epoll_pwait", 441: "epoll_pwait2"},
}
_FUTEX = {"x86_64": 202, "aarch64": 98}
_NAMES = {
    "x86_64": {
        0: "read",
        1: "write",
        17: "pread64",
        42: "connect",
        43: "accept",
        44: "sendto",
        45: "recvfrom",
        47: "recvmsg",
        46: "sendmsg",
        61: "wait4",
        72: "fcntl",
        73: "flock",
        74: "fsync",
        75: "fdatasync",
        24: "sched_yield",
        16: "ioctl",
        247: "waitid",
        257: "openat",
    },
    "aarch64": {
        63: "read",
        64: "write",
        67: "pread64",
        203: "connect",
        202: "accept",
        206: "sendto",
        207: "recvfrom",
        211: "sendmsg",
        212: "recvmsg",
        260: "wait4",
        25: "fcntl",
        32: "flock",
        82: "fsync",
        83: "fdatasync",
        124: "sched_yield",
        29: "ioctl",
        95: "waitid",
        56: "openat",
    },
}
"""Names for the record; a number without one is shown as a number."""

Kind = Literal["running", "asleep", "timed", "waits"]
"""asleep: a call that does nothing but wait; timed: a wait for a lock with a limit; waits: any other call."""


def call_of(text: str, pid: int, machine: str) -> tuple[Kind, str]:
    """What a line of /proc/PID/task/TID/syscall says: the kind of wait, and the call's name."""
    words = text.split()
    if not words or words[0] == "running":
        return "running", "running"
    number = int(words[0])
    if number < 0 or len(words) < 7:
        return "waits", "fault"  # waits in the kernel outside a call: for memory or a page of a file
    arguments = [int(word, 16) for word in words[1:7]]
    sleep = _SLEEPS.get(machine, {}).get(number)
    if sleep is not None:
        return "asleep", sleep
    poll = _POLLS.get(machine, {}).get(number)
    if poll is not None:
        return ("asleep" if arguments[poll[1]] & 0xFFFFFFFF == 0 else "waits"), poll[0]
    epoll = _EPOLLS.get(machine, {}).get(number)
    if epoll is not None:
        return ("asleep" if _watches_nothing(pid, arguments[0]) else "waits"), epoll
    if number == _FUTEX.get(machine):
        waits = arguments[1] & 0x7F in (0, 9)  # FUTEX_WAIT, FUTEX_WAIT_BITSET
        return ("timed" if waits and arguments[3] else "waits"), "futex"
    return "waits", _NAMES.get(machine, {}).get(number, f"call {number}")


def _watches_nothing(pid: int, descriptor: int) -> bool:
    """Whether an epoll descriptor of another process has nothing to wait for."""
    try:
        return b"tfd:" not in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_bytes()
    except OSError:
        return False


@dataclass(slots=True)
class _Open:
    """A question that was asked, while the thread is still where it was."""

    ask: int
    why: str
    call: str
    slices: int
    samples: int
    elapsed_ns: int
    cpu_ns: int
    queue_ns: int
    step: int


@dataclass(slots=True)
class _Counts:
    """Looks at one thread, by what it did."""

    samples: int = 0
    running: int = 0
    asleep: dict[str, int] = field(default_factory=dict)
    timed: int = 0
    waits: int = 0

    def add(self, other: _Counts) -> None:
        """Add what `other` counted."""
        self.samples += other.samples
        self.running += other.running
        self.timed += other.timed
        self.waits += other.waits
        for call, count in other.asleep.items():
            self.asleep[call] = self.asleep.get(call, 0) + count


@dataclass(slots=True)
class _Watched:
    """One process that makes steps."""

    number: int
    pid: int
    rank: int | None
    tid: int
    send: Callable[[bytes], Any]
    syscall: int
    schedstat: int
    since_ns: int
    window_ns: int
    step: int = 0
    stepped_ns: int = 0
    fresh: bool = True
    walls: deque[int] = field(default_factory=lambda: deque(maxlen=64))
    median_ns: int = 0
    slack_ns: int = 0
    """How long steps may wait to be told of together."""
    at_step: tuple[int, int] = (0, 0)
    """Time on and time waiting for a processor, at the first look after the last step."""
    last: tuple[int, int, int] = (0, 0, 0)
    """On a processor, waiting for one, times it was given one; as last read."""
    at_window: tuple[int, int] = (0, 0)
    throttled: tuple[int, int] = (0, 0)
    pending: _Counts = field(default_factory=_Counts)
    """Looks since the last step: no part of training unless another step follows."""
    counts: _Counts = field(default_factory=_Counts)
    window_step: int = 0
    """The last step when this window began."""
    open: _Open | None = None
    tokens: float = BURST
    refilled_ns: int = 0
    slow_asks: int = 0
    slow_ns: int = 0
    base_ns: int = 0
    timed_slices: int = -1
    hung: bool = False


class Stalls:
    """Looks at training threads in a thread of its own. `add(kind, body, **fields)` records; thread-safe."""

    def __init__(self, add: Callable[..., None], *, hang_seconds: float = 300.0) -> None:
        self._add = add
        self._hang_ns = int(hang_seconds * 1e9)
        self._machine = platform.machine()
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._random = random.SystemRandom()
        self._asks = 0
        self._hangs = 0
        self._blind: set[str] = set()
        self.own_ns = 0
        """CPU time of our thread so far."""
        self.looks = 0

    # -- from the supervisor's loop ------------------------------------------------------------------------------

    def stepped(
        self, number: int, pid: int, rank: int | None, step: int, body: dict[str, Any], send: Callable[[bytes], Any]
    ) -> None:
        """A process made a step, or some that it tells of together; its first one says which thread makes them."""
        now = time.monotonic_ns()
        told = body.get("stalls")
        watched = self._watched.get(number)
        if isinstance(told, dict):
            tid = _thread_of(told, pid)
            if watched is None or watched.tid != tid:
                self.gone(number)
                watched = self._begin(number, pid, rank, tid, send, now)
        if watched is None:
            return
        if watched.stepped_ns and step > watched.step:
            watched.walls.append((now - watched.stepped_ns) // (step - watched.step))
        watched.slack_ns = TOGETHER_NS if "rows" in body else 0
        watched.step, watched.stepped_ns, watched.fresh = step, now, True

    def gone(self, number: int) -> None:
        """A process ended, or its steps come from another thread now."""
        with self._lock:
            watched = self._watched.pop(number, None)
            if watched is None:
                return
            self._close(watched)
            self._pace(watched, time.monotonic_ns(), after=True)
            os.close(watched.syscall)
            os.close(watched.schedstat)

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)
        for number in list(self._watched):
            self.gone(number)

    def _begin(
        self, number: int, pid: int, rank: int | None, tid: int, send: Callable[[bytes], Any], now: int
    ) -> _Watched | None:
        folder = f"/proc/{pid}/task/{tid}"
        if self._machine not in _SLEEPS:
            self._tell_blind(f"no system call numbers for {self._machine}", number, pid, rank)
            return None
        opened: list[int] = []
        try:
            for name in ("syscall", "schedstat"):
                opened.append(os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC))
            os.pread(opened[0], 256, 0)
            first = _schedstat(opened[1])
        except OSError as error:
            for descriptor in opened:
                os.close(descriptor)
            self._tell_blind(f"{folder}: {error.strerror}", number, pid, rank)
            return None
        watched = _Watched(number, pid, rank, tid, send, opened[0], opened[1], now, now, refilled_ns=now, base_ns=now)
        watched.last, watched.at_step, watched.at_window = first, first[:2], first[:2]
        watched.throttled = throttled(pid)
        with self._lock:
            self._watched[number] = watched
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="stalls", daemon=True)
            self._thread.start()
        return watched

    def _tell_blind(self, reason: str, number: int, pid: int, rank: int | None) -> None:
        if reason not in self._blind and len(self._blind) < 64:
            self._blind.add(reason)
            self._add("pace", {"blind": reason}, process=number, pid=pid, rank=rank)

    # -- our thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        began, pause = time.monotonic_ns(), PERIOD_SECONDS
        while not self._stop.is_set():
            time.sleep(pause * self._random.uniform(0.8, 1.2))  # half the price of waiting for the event
            for watched in list(self._watched.values()):
                with self._lock:
                    if watched.number in self._watched:
                        self._look(watched)
            self.own_ns = time.thread_time_ns()
            over = self.own_ns - 0.9 * SHARE * (time.monotonic_ns() - began) - CREDIT_NS
            pause = PERIOD_SECONDS if over <= 0 else min(2.0, PERIOD_SECONDS + over / 1e9 / SHARE / 4)

    def _look(self, watched: _Watched) -> None:
        """One look at one thread."""
        try:
            text = os.pread(watched.syscall, 256, 0).decode("ascii", "replace")
            cpu, queue, slices = watched.last = _schedstat(watched.schedstat)
            kind, call = call_of(text, watched.pid, self._machine)
        except (OSError, ValueError):
            return
        self.looks += 1
        now = time.monotonic_ns()
        if watched.fresh:
            self._turn(watched, cpu, queue)
        self._count(watched, kind, call)
        known = watched.open
        if known is not None and (known.slices, known.call) == (slices, call):
            known.samples += 1
            known.elapsed_ns, known.cpu_ns, known.queue_ns = self._spent(watched, now)
        else:
            self._close(watched)
            why = self._occasion(watched, kind, slices, now)
            if why is not None:
                self._ask(watched, why, call, slices, now)
        if now - watched.window_ns > PACE_SECONDS * 1e9:
            self._close(watched)
            self._pace(watched, now)
        if now - watched.stepped_ns > self._hang_ns and not watched.hung:
            self._hang(now)

    def _turn(self, watched: _Watched, cpu: int, queue: int) -> None:
        """The first look after a step."""
        watched.fresh = watched.hung = False
        watched.counts.add(watched.pending)
        watched.pending = _Counts()
        watched.at_step = (cpu, queue)
        watched.slow_asks = 0
        walls = list(watched.walls)
        watched.median_ns = int(statistics.median(walls)) if len(walls) >= 8 else 0

    def _count(self, watched: _Watched, kind: Kind, call: str) -> None:
        counts = watched.pending
        counts.samples += 1
        if kind == "running":
            counts.running += 1
        elif kind == "asleep":
            counts.asleep[call] = counts.asleep.get(call, 0) + 1
        elif kind == "timed":
            counts.timed += 1
        else:
            counts.waits += 1

    def _spent(self, watched: _Watched, now: int) -> tuple[int, int, int]:
        """Since the last step: time, time on a processor, time ready to run without one."""
        cpu, queue, _ = watched.last
        return now - watched.stepped_ns, cpu - watched.at_step[0], queue - watched.at_step[1]

    # -- questions -------------------------------------------------------------------------------------------------

    def _occasion(self, watched: _Watched, kind: Kind, slices: int, now: int) -> str | None:
        """Why to ask now; None for no reason."""
        again, watched.timed_slices = watched.timed_slices == slices, slices if kind == "timed" else -1
        if kind == "asleep":
            return "asleep"
        if kind == "timed" and again:
            return "timed"
        median = watched.median_ns
        elapsed = now - watched.stepped_ns - watched.slack_ns
        if median and elapsed > max(SLOW_FACTOR * median, median + SLOW_NS) and watched.slow_asks < SLOW_ASKS:
            watched.slow_asks += 1
            return "slow"
        if now >= watched.base_ns:
            pause = BASE_SECONDS[now - watched.since_ns > 60e9]
            watched.base_ns = now + int(pause * self._random.uniform(0.5, 1.5) * 1e9)
            return "base"
        return None

    def _ask(
        self, watched: _Watched, why: str, call: str, slices: int, now: int, extra: dict[str, Any] | None = None
    ) -> None:
        watched.tokens = min(BURST, watched.tokens + TOKENS_PER_SECOND * (now - watched.refilled_ns) / 1e9)
        watched.refilled_ns = now
        if watched.tokens < 1:
            return
        watched.tokens -= 1
        self._asks += 1
        try:
            watched.send(json.dumps({"ask": self._asks, "slices": slices}).encode())
        except OSError:
            return
        watched.open = _Open(self._asks, why, call, slices, 1, *self._spent(watched, now), watched.step)
        if extra is not None:
            self._close(watched, extra)

    def _close(self, watched: _Watched, extra: dict[str, Any] | None = None) -> None:
        """The thread has gone on: record what was asked and for how long it stood there."""
        known, watched.open = watched.open, None
        if known is None:
            return
        body = {
            "ask": known.ask,
            "why": known.why,
            "call": known.call,
            "samples": known.samples,
            "elapsed_ns": known.elapsed_ns,
            "cpu_ns": known.cpu_ns,
            "queue_ns": known.queue_ns,
            "median_ns": watched.median_ns,
        }
        self._record("stall", body | (extra or {}), watched, step=known.step)

    def _hang(self, now: int) -> None:
        """A thread made no step for long: ask all of them where they are."""
        everyone = list(self._watched.values())
        for watched in everyone:
            watched.hung = True
        if self._hangs >= HANG_ASKS:
            return
        self._hangs += 1
        for watched in everyone:
            try:
                text = os.pread(watched.syscall, 256, 0).decode("ascii", "replace")
                watched.last = _schedstat(watched.schedstat)
                kind, call = call_of(text, watched.pid, self._machine)
            except (OSError, ValueError):
                continue
            self._close(watched)
            extra = {"hang": self._hangs, "of": len(everyone), "kind": kind, "state": _state(watched.pid, watched.tid)}
            watched.tokens = max(watched.tokens, 1.0)
            self._ask(watched, "hang", call, watched.last[2], now, extra)

    # -- balance ---------------------------------------------------------------------------------------------------

    def _pace(self, watched: _Watched, now: int, *, after: bool = False) -> None:
        """Record what the looks of this window showed, and begin the next."""
        cpu, queue, _ = watched.last
        stopped = throttled(watched.pid)
        counts = watched.counts
        body: dict[str, Any] = {
            "window_ns": now - watched.window_ns,
            "steps": watched.step - watched.window_step,
            "samples": counts.samples,
            "running": counts.running,
            "asleep": counts.asleep,
            "timed": counts.timed,
            "waits": counts.waits,
            "cpu_ns": cpu - watched.at_window[0],
            "queue_ns": queue - watched.at_window[1],
            "throttled": stopped[0] - watched.throttled[0],
            "throttled_ns": stopped[1] - watched.throttled[1],
            "cpus": _cpus(watched.pid),
            "nice": _nice(watched.pid),
        }
        if after:
            body["after"] = watched.pending.samples
        self._record("pace", body, watched, step=watched.step)
        watched.window_ns, watched.at_window, watched.counts = now, (cpu, queue), _Counts()
        watched.window_step = watched.step
        watched.throttled = stopped

    def _record(self, kind: str, body: dict[str, Any], watched: _Watched, *, step: int) -> None:
        self._add(kind, body, process=watched.number, pid=watched.pid, rank=watched.rank, step=step)


def _thread_of(told: dict[str, Any], pid: int) -> int:
    """The thread that makes the steps, in our own numbers; the main thread where the process lives in another world."""
    tid, own = told.get("tid"), told.get("pid")
    return tid if isinstance(tid, int) and own == pid and 0 < tid < 1 << 31 else pid


def _schedstat(descriptor: int) -> tuple[int, int, int]:
    words = os.pread(descriptor, 128, 0).split()
    return int(words[0]), int(words[1]), int(words[2])


def throttled(pid: int, root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """How often, and for how many nanoseconds, the control group of a process was held back by its CPU quota.

    (0, 0) where there is no quota, or it cannot be read. Counts of a parent group are not added.
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return 0, 0
    best = (0, 0)
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        bases = (root / "cpu", root / "cpu,cpuacct") if controllers else (root, root / "unified")
        for base in bases:
            best = max(best, _throttled(base / path.lstrip("/") / "cpu.stat"), key=lambda pair: pair[1])
    return best


def _throttled(path: Path) -> tuple[int, int]:
    try:
        pairs = dict(line.split()[:2] for line in path.read_text().splitlines() if len(line.split()) == 2)
        times = int(pairs.get("nr_throttled", 0))
        return times, int(pairs.get("throttled_time", 0)) or 1000 * int(pairs.get("throttled_usec", 0))
    except (OSError, ValueError):
        return 0, 0


def _cpus(pid: int) -> int | None:
    try:
        return len(os.sched_getaffinity(pid))
    except OSError:
        return None


def _nice(pid: int) -> int | None:
    try:
        return os.getpriority(os.PRIO_PROCESS, pid)
    except OSError:
        return None


def _state(pid: int, tid: int) -> str:
    """R runs, S waits, D waits for a device, T stopped by a signal, Z ended; "?" where it cannot be read."""
    try:
        return Path(f"/proc/{pid}/task/{tid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "?"
