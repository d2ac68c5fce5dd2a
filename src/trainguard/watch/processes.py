"""Link *processes*, outer half: the job's process tree as the kernel shows it.

Every Python interpreter of the job must say hello. This file finds those that do not: it walks /proc from the
command down, four times a second, without privileges. What lives shorter than that is caught by the other half
(the `spawn` records of guarded parents, watch/children.py).
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainguard.measure.variables import relevant

_PR_SET_CHILD_SUBREAPER = 36
_PYTHON = re.compile(r"(python|pypy)[0-9.]*(t|d)?$")
PROCESS_LIMIT = 65_536


def become_subreaper() -> bool:
    """Have orphans of the job reparented to us instead of init, so the tree stays whole. False where refused."""
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def facts(pid: int) -> dict[str, Any]:
    """What the kernel says of a process: executable, command line, parent, start time, audit account and session.

    Values that cannot be read are None: the process may be gone, or not ours.
    """
    return {
        "exe": _link(pid, "exe"),
        "cmdline": [part.decode(errors="replace") for part in _read(pid, "cmdline").split(b"\0")[:64] if part],
        "ppid": parent(pid),
        "start_ticks": start_ticks_of(pid),
        "loginuid": _number(pid, "loginuid"),
        "session": _number(pid, "sessionid"),
    }


def environment(pid: int) -> dict[str, str]:
    """The variables that matter, as the kernel has them from the start of the process; empty where not readable."""
    pairs = (part.decode("utf-8", "surrogateescape").partition("=") for part in _read(pid, "environ").split(b"\0"))
    return relevant({name: value for name, _, value in pairs if name})


def parent(pid: int) -> int | None:
    """Parent pid, or None when the process is gone."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def descends_from(pid: int, ancestor: int) -> bool:
    """Whether `ancestor` is on the chain of parents of `pid`, now."""
    seen = 0
    current: int | None = pid
    while current not in (None, 0) and seen < 256:
        if current == ancestor:
            return True
        current, seen = parent(current), seen + 1
    return False


@dataclass(slots=True)
class _Seen:
    since: float
    cmdline: list[str]
    looks: int = 1
    reported: bool = False


@dataclass(slots=True)
class Tree:
    """Remembers which processes belong to the job, which of them are Python, and which said hello.

    Each look lists /proc once and reads `stat` only of pids that are new, so a look costs about a millisecond.
    Who belongs stays: a process whose parent ends is given to us, the subreaper, not to init.
    """

    grace_seconds: float
    """How long an interpreter may run before its silence counts."""
    apart: set[int] = field(default_factory=lambda: {os.getpid()})
    """Pids below us that are ours and no part of the job."""
    _greeted: set[tuple[int, int | None]] = field(default_factory=set)
    _seen: dict[tuple[int, int | None], _Seen] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    _members: set[int] = field(default_factory=set)

    def greeted(self, pid: int) -> None:
        """`pid` said hello; pids recur, so its start time goes with it."""
        self._greeted.add((pid, start_ticks_of(pid)))

    def forget(self, pid: int) -> None:
        """`pid` runs another program now: what it said before was said by the one before."""
        self._greeted.discard((pid, start_ticks_of(pid)))

    def look(self, root: int, connected: set[int]) -> list[dict[str, Any]]:
        """One look at the tree below and including `root`: the silent ones that became certain since the last."""
        now = time.monotonic()
        present: set[tuple[int, int | None]] = set()
        certain = []
        for pid in self._job(root):
            identity = (pid, start_ticks_of(pid))
            present.add(identity)
            if pid in connected or identity in self._greeted or not _is_python(pid):
                self._seen.pop(identity, None)
                continue
            seen = self._seen.setdefault(identity, _Seen(now, facts(pid)["cmdline"]))
            seen.looks += 1
            if not seen.reported and now - seen.since > self.grace_seconds:
                seen.reported = True
                certain.append({"pid": pid, **facts(pid)})
        certain.extend(self._vanished(present))
        return certain

    def members(self, root: int) -> list[int]:
        """Pids of the job that live now, `root` among them; ended ones that nobody has collected are left out."""
        return [
            pid for pid in self._job(root) if _read(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])
        ]

    def _job(self, root: int) -> list[int]:
        """Pids of the job now: `root`, what descends from it, and orphans that were given to us."""
        listed = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._known &= listed
        self._members = (self._members & listed) - self.apart
        self._members.add(root)
        own = os.getpid()
        for pid in sorted(listed - self._known)[:PROCESS_LIMIT]:
            if pid not in self.apart and (parent(pid) in self._members or parent(pid) == own):
                self._members.add(pid)
        self._known = listed
        return sorted(self._members)

    def _vanished(self, present: set[tuple[int, int | None]]) -> list[dict[str, Any]]:
        """Interpreters that ended without a hello. One look may catch a fork between fork and exec: two count."""
        gone = [identity for identity in self._seen if identity not in present]
        silent = []
        for identity in gone:
            seen = self._seen.pop(identity)
            if seen.looks > 2 and not seen.reported and identity not in self._greeted:
                silent.append({"pid": identity[0], "exe": None, "cmdline": seen.cmdline, "ended": True})
        return silent


Image = tuple[str | None, bytes]
"""What a process runs: its program and its command line."""


@dataclass(slots=True)
class _Lost:
    """A guarded process whose connection closed while it lived."""

    number: int
    said_bye: bool
    since: float
    cpu_seconds: float
    image: Image
    looks: int = 0


@dataclass(slots=True)
class Unheard:
    """Processes that go on after they stopped talking to us: the other half of silence.

    A connection ends with its process, with a new program (exec; its hello follows), or because somebody inside
    closed it. A process that said goodbye is given time to come apart; one that goes on computing has only said so.
    """

    grace_seconds: float = 10.0
    bye_cpu_seconds: float = 60.0
    """Processor time after a goodbye from which on it was none: coming apart takes a few seconds."""
    _lost: dict[tuple[int, int], _Lost] = field(default_factory=dict)

    def add(self, pid: int, start_ticks: int | None, image: Image, *, number: int, said_bye: bool) -> None:
        """The connection of `pid`, which ran `image` when it said hello, closed."""
        if start_ticks is not None and start_ticks_of(pid) == start_ticks:
            lost = _Lost(number, said_bye, time.monotonic(), cpu_seconds(pid) or 0.0, image)
            self._lost[(pid, start_ticks)] = lost

    def look(self, connected: set[int]) -> tuple[list[dict[str, Any]], list[int]]:
        """(what became certain since the last look, pids that run another program now)."""
        certain, changed = [], []
        for (pid, start_ticks), lost in list(self._lost.items()):
            lives = start_ticks_of(pid) == start_ticks and not _gone(pid)
            image = image_of(pid) if lives else lost.image
            seconds = time.monotonic() - lost.since
            used = (cpu_seconds(pid) or lost.cpu_seconds) - lost.cpu_seconds
            if pid in connected or image != lost.image:
                del self._lost[(pid, start_ticks)]
                changed += [] if pid in connected else [pid]
                continue
            enough = used >= self.bye_cpu_seconds if lost.said_bye else seconds >= self.grace_seconds
            short = not lives and not lost.said_bye and lost.looks >= SHORT_LOOKS
            lost.looks += 1
            if (lives and enough) or short:
                body = {"pid": pid, "of": lost.number, "said_bye": lost.said_bye, "seconds": round(seconds, 1)}
                certain.append(body | {"cpu_seconds": round(used, 1), "lives": lives})
            if not lives or enough:
                del self._lost[(pid, start_ticks)]
        return certain, changed


SHORT_LOOKS = 8
"""Looks, four a second, after which a process that ended without a connection had gone on without one."""


def cpu_seconds(pid: int) -> float | None:
    """Processor time a process has used so far; None when it is gone."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else None


def image_of(pid: int) -> Image:
    """What a process runs: its program and command line; a new one after exec."""
    return _link(pid, "exe"), _read(pid, "cmdline")


def _gone(pid: int) -> bool:
    return _read(pid, "stat").rpartition(b")")[2].split()[:1] in ([], [b"Z"], [b"X"])


def _is_python(pid: int) -> bool:
    executable = _link(pid, "exe")
    return (
        executable is not None and _PYTHON.search(os.path.basename(executable.removesuffix(" (deleted)"))) is not None
    )


def start_ticks_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the host did: with its pid it names it; None when it is gone."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else None


def _number(pid: int, name: str) -> int | None:
    text = _read(pid, name).strip()
    return int(text) if text.isdigit() else None


def _link(pid: int, name: str) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/{name}").readlink())
    except OSError:
        return None


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read(65536)
    except OSError:
        return b""
