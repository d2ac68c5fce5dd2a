"""Kill ledger, answering half: names who sends a signal, and lets it through unless it was told to refuse strangers.

The kernel stops a process of the job inside `kill` and its relatives and asks whoever holds the ledger's listener
(watch/ledger.py puts the filter on). This file takes the question, reads from /proc who asks and whom it means, hands
that on, and answers CONTINUE; under `--enforce deny-signals` EPERM to signals between strangers (`refuses`). It runs in
two places: as a process of its own, the keeper, and as a thread of the supervisor that steps in when the keeper does
not answer.

Why a process of its own: when the last holder of a listener goes away, the kernel answers ENOSYS, and `kill` would stop
working in a job whose supervisor died. The keeper shares nothing with the supervisor but a socket it never waits for,
ignores what terminals and schedulers send, and ends when no process carries the filter any more (POLLHUP).

    python -I -S keeper.py [DENY]   listener = fd 3, socket to the supervisor (SOCK_SEQPACKET, JSON messages) = fd 4;
                                    DENY: JSON list of programs that may signal strangers; without it all may

Standard library only. Calls and structures: linux/seccomp.h, seccomp_unotify(2).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Sequence, Tuple

NOTIF_RECV = 0xC0502100
NOTIF_SEND = 0xC0182101
NOTIF_SET_FLAGS = 0x40082104
FLAG_SYNC_WAKE_UP = 1
FLAG_CONTINUE = 1

ARCH_X86_64, ARCH_I386 = 0xC000003E, 0x40000003
ARCH_AARCH64, ARCH_ARM = 0xC00000B7, 0x40000028
X32_BIT = 0x40000000

CALLS: Dict[int, Dict[str, Tuple[int, ...]]] = {
    ARCH_X86_64: {
        "kill": (62, X32_BIT | 62),
        "tkill": (200, X32_BIT | 200),
        "tgkill": (234, X32_BIT | 234),
        "rt_sigqueueinfo": (129, X32_BIT | 524),
        "rt_tgsigqueueinfo": (297, X32_BIT | 536),
        "pidfd_send_signal": (424, X32_BIT | 424),
        "ptrace": (101, X32_BIT | 521),
        "process_vm_writev": (311, X32_BIT | 540),
        "prlimit64": (302, X32_BIT | 302),
    },
    ARCH_I386: {
        "kill": (37,),
        "tkill": (238,),
        "tgkill": (270,),
        "rt_sigqueueinfo": (178,),
        "rt_tgsigqueueinfo": (335,),
        "pidfd_send_signal": (424,),
        "ptrace": (26,),
        "process_vm_writev": (348,),
        "prlimit64": (340,),
    },
    ARCH_AARCH64: {
        "kill": (129,),
        "tkill": (130,),
        "tgkill": (131,),
        "rt_sigqueueinfo": (138,),
        "rt_tgsigqueueinfo": (240,),
        "pidfd_send_signal": (424,),
        "ptrace": (117,),
        "process_vm_writev": (271,),
        "prlimit64": (261,),
    },
    ARCH_ARM: {
        "kill": (37,),
        "tkill": (238,),
        "tgkill": (268,),
        "rt_sigqueueinfo": (178,),
        "rt_tgsigqueueinfo": (363,),
        "pidfd_send_signal": (424,),
        "ptrace": (26,),
        "process_vm_writev": (377,),
        "prlimit64": (369,),
    },
}
"""Architecture (AUDIT_ARCH_…) → system call → its numbers there. A 64-bit process can make the 32-bit calls too."""

SIGNAL_ARGUMENT = {
    "kill": 1,
    "tkill": 1,
    "tgkill": 2,
    "rt_sigqueueinfo": 1,
    "rt_tgsigqueueinfo": 2,
    "pidfd_send_signal": 1,
}
"""Which argument is the signal number."""

_NAMES = {arch: {nr: call for call, nrs in calls.items() for nr in nrs} for arch, calls in CALLS.items()}

ANCESTRY_LIMIT = 32
GROUP_LIMIT = 256
WORD_LIMIT, WORDS_LIMIT = 240, 24
REPEAT_SECONDS = 1.0
KEY_LIMIT = 1024


# -- one question ------------------------------------------------------------------------------------------------------


def receive(listener: int) -> Optional[Tuple[int, int, str, Tuple[int, ...]]]:
    """The next question: (id, thread id of the asker, call, its six arguments). Blocks; None when it was withdrawn."""
    buffer = bytearray(80)
    try:
        fcntl.ioctl(listener, NOTIF_RECV, buffer, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    number, tid, _flags, nr, arch = struct.unpack_from("=QIIiI", buffer)
    arguments = struct.unpack_from("=6Q", buffer, 32)
    return number, tid, _NAMES.get(arch, {}).get(nr & 0xFFFFFFFF, "call %d" % nr), arguments


def let_through(listener: int, number: int) -> None:
    """Answer: carry out the call as if nobody had asked. A withdrawn question is not an error."""
    try:
        fcntl.ioctl(listener, NOTIF_SEND, struct.pack("=QqiI", number, 0, 0, FLAG_CONTINUE))
    except OSError:
        pass


def refuse(listener: int, number: int) -> None:
    """Answer: the call fails with EPERM, and nothing is sent."""
    try:
        fcntl.ioctl(listener, NOTIF_SEND, struct.pack("=QqiI", number, 0, -errno.EPERM, 0))
    except OSError:
        pass


def wake_quickly(listener: int) -> None:
    """Ask the kernel to switch to the keeper on the asker's processor; older kernels do not know it."""
    try:
        fcntl.ioctl(listener, NOTIF_SET_FLAGS, FLAG_SYNC_WAKE_UP)
    except OSError:
        pass


def answer(listener: int, book: "Book") -> None:
    """Take one question, book it, let it through: in that order, and let through whatever fails."""
    question = receive(listener)
    if question is None:
        return
    number, tid, call, arguments = question
    refused = False
    try:
        refused = book.enter(tid, call, arguments)
    except Exception:
        book.faults += 1
    finally:
        (refuse if refused else let_through)(listener, number)


# -- who and whom ------------------------------------------------------------------------------------------------------


class Book:
    """Writes one message a question to `hand_on`; the same sender, call, target and signal again is only counted.

    Message: {"call", "signal" | None, "sender": facts, "targets": [facts], "target": as given, "calls": n,
    "lost": messages that could not be handed on, "faults": n, "denied": true where it was refused}. `calls` is how
    many calls the message stands for: the first is told at once, further equal ones are counted and told once a
    second.
    """

    def __init__(
        self, hand_on: Callable[[Dict[str, Any]], bool], supervisor: int, deny: Optional[Sequence[str]] = None
    ) -> None:
        self.hand_on = hand_on
        self.deny = None if deny is None else frozenset(deny)
        """Programs that may signal strangers; None lets everything through."""
        self.supervisor = supervisor
        """Its pid: where ancestry ends."""
        self.lost = 0
        self.faults = 0
        self.orphaned = False
        """Nobody reads any more: stop gathering facts."""
        self.held: Dict[Tuple[Any, ...], List[Any]] = {}
        self.lock = threading.Lock()

    def enter(self, tid: int, call: str, arguments: Tuple[int, ...]) -> bool:
        """Book one call; whether it is to be refused."""
        if self.orphaned and self.deny is None:
            return False
        sender = thread_group(tid)
        number = _signed(arguments[SIGNAL_ARGUMENT[call]]) if call in SIGNAL_ARGUMENT else None
        key = (sender, call, arguments[:3])
        now = time.monotonic()
        with self.lock:
            known = self.held.get(key)
            if known is not None and now - known[0] < REPEAT_SECONDS:
                known[1] += 1
                return bool(known[2].get("denied"))
        if len(self.held) >= KEY_LIMIT:
            self.flush(now + REPEAT_SECONDS)
        message: Dict[str, Any] = {
            "call": call,
            "signal": number,
            "sender": facts(sender, self.supervisor),
            "calls": 1,
        }
        message["sender"]["tid"] = tid
        target, pids = targets(sender, call, arguments)
        message["target"] = target
        message["targets"] = [facts(pid, self.supervisor) for pid in pids]
        denied = self.deny is not None and refuses(message, self.supervisor, self.deny)
        if denied:
            message["denied"] = True
        if known is not None:
            message["calls"] += known[1]
        self.held[key] = [now, 0, message]
        self.send(message)
        return denied

    def flush(self, now: float) -> None:
        """Send what was counted, and forget what is older than a second."""
        for key, (since, _, _) in list(self.held.items()):
            if now - since < REPEAT_SECONDS:
                continue
            with self.lock:
                known = self.held.pop(key, None)
            if known is not None and known[1]:
                self.send({**known[2], "calls": known[1]})

    def send(self, message: Dict[str, Any]) -> None:
        """Hand on, or count as lost."""
        if self.hand_on({**message, "lost": self.lost, "faults": self.faults}):
            self.lost = 0
        else:
            self.lost += 1


HARMLESS = frozenset((0, 10, 12, 17, 18, 23, 28)) | frozenset(range(32, 65))
"""SIGUSR1/2, SIGCHLD, SIGCONT, SIGURG, SIGWINCH and real-time signals: messages, not ends."""

TOOLS = frozenset(
    {"kill", "pkill", "killall", "killall5", "skill", "fuser", "timeout", "env", "nohup", "setsid", "nice", "xargs"}
    | {"sh", "dash", "bash", "ash", "zsh", "ksh", "busybox", "toybox", "coreutils"}
)
"""Programs that act for whoever started them (the judge's list, appraise/kills.py)."""


def refuses(message: Dict[str, Any], supervisor: int, allowed: FrozenSet[str]) -> bool:
    """Whether a signal is between strangers: to a process of the job, from none of those that may end it.

    Those are the target itself, the processes above it (its parent, its launcher), tools that one of them started, and
    programs of `allowed`. Signals to processes outside the job are not ours to refuse.
    """
    if message["call"] not in SIGNAL_ARGUMENT or message["signal"] in HARMLESS:
        return False
    if message["target"] == -1:
        return True
    acting = [message["sender"]["pid"]]
    names = [os.path.basename(message["sender"]["exe"] or message["sender"]["comm"] or "")]
    for pid, _, name, _ in message["sender"]["ancestry"]:
        if names[-1] not in TOOLS or pid == supervisor:
            break
        acting.append(pid)
        names.append(name)
    if any(name in allowed for name in names):
        return False
    for target in message["targets"]:
        above = [entry[0] for entry in target["ancestry"]]
        of_the_job = supervisor in above or target["pid"] == supervisor
        if of_the_job and not any(pid == target["pid"] or pid in above for pid in acting):
            return True
    return False


def targets(sender: int, call: str, arguments: Tuple[int, ...]) -> Tuple[int, List[int]]:
    """The target as the call gives it, and the pids it means; a process group's members, at most GROUP_LIMIT."""
    if call == "pidfd_send_signal":
        pid = _pid_of_pidfd(sender, _signed(arguments[0]))
        return pid, [pid] if pid > 0 else []
    if call == "ptrace":
        given = _signed(arguments[1])
    else:
        given = _signed(arguments[0])
    if call == "tkill" or call == "ptrace":
        return given, [thread_group(given)]
    if given > 0:
        return given, [given]
    if call != "kill":
        return given, []
    group = -given if given < -1 else _field(sender, 4)
    return given, _members(group) if given != -1 else []


def thread_group(tid: int) -> int:
    """The process a thread belongs to; the thread itself where that cannot be read."""
    for line in _read("/proc/%d/status" % tid).splitlines():
        if line.startswith(b"Tgid:"):
            return int(line.split()[1])
    return tid


def facts(pid: int, top: int) -> Dict[str, Any]:
    """What the kernel says of a process now; None for what cannot be read (it is gone, or not ours)."""
    status = _status(pid)
    uids = status.get("Uid", "").split()
    return {
        "pid": pid,
        "uid": int(uids[0]) if uids else None,
        "euid": int(uids[1]) if len(uids) > 1 else None,
        "comm": status.get("Name"),
        "exe": _link("/proc/%d/exe" % pid),
        "cwd": _link("/proc/%d/cwd" % pid),
        "cmdline": _cmdline(pid),
        "start_ticks": _field(pid, 21),
        "loginuid": _number("/proc/%d/loginuid" % pid),
        "session": _number("/proc/%d/sessionid" % pid),
        "ancestry": ancestry(pid, top),
    }


def ancestry(pid: int, top: int) -> List[List[Any]]:
    """[pid, start ticks, program name, first words of the command line] of every parent, nearest first, up to `top`."""
    chain: List[List[Any]] = []
    current = _field(pid, 3)
    while current and current > 1 and len(chain) < ANCESTRY_LIMIT:
        name = os.path.basename(_link("/proc/%d/exe" % current) or "") or _comm(current)
        chain.append([current, _field(current, 21), name, _cmdline(current)[:6]])
        current = _field(current, 3) if current != top else None
    return chain


def _members(group: Optional[int]) -> List[int]:
    found: List[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit() and _field(int(name), 4) == group:
            found.append(int(name))
            if len(found) >= GROUP_LIMIT:
                break
    return found


def _pid_of_pidfd(pid: int, descriptor: int) -> int:
    for line in _read("/proc/%d/fdinfo/%d" % (pid, descriptor)).splitlines():
        if line.startswith(b"Pid:"):
            return int(line.split()[1])
    return 0


def _field(pid: int, index: int) -> Optional[int]:
    """Field `index` (from 0) of /proc/PID/stat: 3 parent, 4 process group, 21 start ticks."""
    fields = _read("/proc/%d/stat" % pid).rpartition(b")")[2].split()
    return int(fields[index - 2]) if len(fields) > index - 2 else None


def _status(pid: int) -> Dict[str, str]:
    lines = _read("/proc/%d/status" % pid).decode(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _cmdline(pid: int) -> List[str]:
    words = _read("/proc/%d/cmdline" % pid).split(b"\0")[:WORDS_LIMIT]
    return [word.decode(errors="replace")[:WORD_LIMIT] for word in words if word]


def _comm(pid: int) -> str:
    return _read("/proc/%d/comm" % pid).decode(errors="replace").strip()


def _number(path: str) -> Optional[int]:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _link(path: str) -> Optional[str]:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(16384)
    except OSError:
        return b""


def _signed(value: int) -> int:
    """A register as the C int the kernel takes it for."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


# -- the process -------------------------------------------------------------------------------------------------------


def keep(listener: int, channel: socket.socket, deny: Optional[Sequence[str]] = None) -> None:
    """Answer until no process carries the filter any more, whether or not anybody reads `channel`.

    A thread waits inside the receiving call, so that a question counts as taken the moment it is asked: until then any
    signal with a handler would cut the asker's `kill` short (EINTR). Here we wait for the end of the job.
    """

    def hand_on(message: Dict[str, Any]) -> bool:
        try:
            channel.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            book.orphaned = error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
            return False
        return True

    def serve() -> None:
        while True:
            try:
                answer(listener, book)
            except OSError:
                return

    book = Book(hand_on, os.getppid(), deny)
    threading.Thread(target=serve, daemon=True).start()
    poll = select.poll()
    poll.register(listener, 0)  # errors and hang-up are always told
    while not poll.poll(500):
        book.flush(time.monotonic())
    book.flush(float("inf"))


def main() -> None:
    """The keeper process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    except OSError:
        pass
    keep(3, socket.socket(fileno=4), json.loads(sys.argv[1]) if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    main()
