"""How a process of the job ended, and whether memory ran out: facts of the kernel that need no privilege.

Only a parent is told its child's exit status. For the other processes of a job the kernel shows it to their own account
while they are being torn down (/proc/PID/stat, field exit_code), and since Linux 6.15 to whoever holds a pidfd, after
the parent has collected it. Out-of-memory kills are counted per control group and for the whole host.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

_PF_EXITING = 0x4
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
CGROUPS = Path("/sys/fs/cgroup")
GROUP_LIMIT = 64
KERNEL_LOG_LINES, NAMED_LIMIT = 4096, 64
_OUT_OF_MEMORY = re.compile(rb"[Oo]ut of memory[^:]*: Kill(?:ed)? process (\d{1,9})")
COLLECTED_SECONDS = 0.02
"""How long we wait for a parent to collect a process that is already gone from /proc."""


def open_pidfd(pid: int) -> Optional[int]:
    """A pidfd, or None on a kernel without them or at the limit of descriptors."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def ending(pid: int, start_ticks: Optional[int], pidfd: Optional[int]) -> Optional[Dict[str, Any]]:
    """{"status": n | None, "signal": n | None} of a process that has ended or is ending.

    None: it lives on (it may have replaced its program), or the kernel does not tell.
    """
    fields = _stat(pid)
    if fields and (start_ticks is None or int(fields[19]) == start_ticks):
        leaving = fields[0] in (b"Z", b"X") or int(fields[6]) & _PF_EXITING
        return _decoded(int(fields[49])) if leaving and len(fields) > 49 else None
    deadline = time.monotonic() + COLLECTED_SECONDS
    while pidfd is not None:
        told = _told(pidfd)
        if told is not None or time.monotonic() > deadline:
            return told
        time.sleep(0.002)
    return None


def _told(pidfd: int) -> Optional[Dict[str, Any]]:
    buffer = bytearray(64)
    struct.pack_into("=Q", buffer, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer, True)
    except OSError:
        return None
    if not struct.unpack_from("=Q", buffer, 0)[0] & _PIDFD_INFO_EXIT:
        return None
    return _decoded(int(struct.unpack_from("=i", buffer, 60)[0]))


def _decoded(status: int) -> Dict[str, Any]:
    """A wait status (wait(2)) as exit status or signal."""
    number = status & 0x7F
    return {"status": None, "signal": number} if number else {"status": status >> 8 & 0xFF, "signal": None}


def _stat(pid: int) -> List[bytes]:
    """Fields of /proc/PID/stat from the state on: 0 state, 6 flags, 19 start ticks, 49 exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


class Memory:
    """Counts out-of-memory kills of the control groups the job uses, and of the host, since each was first seen."""

    def __init__(self, root: Path = CGROUPS, kernel_log: str = "/dev/kmsg") -> None:
        self._root = root
        self._host = _counter(Path("/proc/vmstat"), b"oom_kill")
        self._groups: Dict[str, Tuple[Path, int]] = {}
        self._kernel_log = _open_kernel_log(kernel_log)
        self._named: List[int] = []

    def watch(self, pid: int) -> None:
        """Count from now for the control group of `pid`."""
        for name, path in _groups(pid, self._root):
            if name not in self._groups and len(self._groups) < GROUP_LIMIT:
                count = _counter(path, b"oom_kill")
                if count is not None:
                    self._groups[name] = (path, count)

    def killed(self) -> Dict[str, Any]:
        """{"group": kills in the job's control groups, "host": kills on the host, "named": pids in the kernel's log}.

        None where it cannot be read; the kernel's log usually cannot without privileges.
        """
        counts = [(_counter(path, b"oom_kill"), before) for path, before in self._groups.values()]
        found = [now - before for now, before in counts if now is not None]
        host = _counter(Path("/proc/vmstat"), b"oom_kill")
        return {
            "group": sum(found) if found else None,
            "host": host - self._host if host is not None and self._host is not None else None,
            "named": self._read_kernel_log(),
        }

    def _read_kernel_log(self) -> Optional[List[int]]:
        """Processes that the kernel says it ended for want of memory, since we began; the last NAMED_LIMIT."""
        if self._kernel_log is None:
            return None
        for _ in range(KERNEL_LOG_LINES):
            try:
                line = os.read(self._kernel_log, 8192)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:  # EPIPE: lines were overwritten before we read them
                    break
                continue
            if not line:
                break
            found = _OUT_OF_MEMORY.search(line)
            if found is not None:
                self._named = [*self._named, int(found.group(1))][-NAMED_LIMIT:]
        return list(self._named)


def _open_kernel_log(path: str) -> Optional[int]:
    """The kernel's log from now on, without waiting; None where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.lseek(descriptor, 0, os.SEEK_END)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _groups(pid: int, root: Path) -> List[Tuple[str, Path]]:
    """(name, file with the counter) of the memory control groups of a process, version 2 and 1."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            found += [(line, base / path.lstrip("/") / "memory.events") for base in (root, root / "unified")]
        elif "memory" in controllers.split(","):
            found.append((line, root / "memory" / path.lstrip("/") / "memory.oom_control"))
    return found


def _counter(path: Path, name: bytes) -> Optional[int]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None
