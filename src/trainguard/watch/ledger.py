"""Kill ledger: who in the job sends which signal to whom, SIGKILL included, without privileges.

A seccomp filter over the command and all it ever starts makes the kernel ask us before `kill` and its relatives
(keeper.CALLS); the keeper (watch/keeper.py) names the sender from /proc and lets every call through. Only where `deny`
is given are signals between strangers refused, with EPERM (docs/checks/enforcement.md).

How the filter gets on without touching the command: a seccomp filter belongs to a thread. One thread of the supervisor
puts it on, starts the command with the same `posix_spawnp` as without a ledger, and ends; the command inherits it.
So argv, environment, descriptors, signal mask, exit status and start errors are what they were.

Without CAP_SYS_ADMIN the kernel wants `no_new_privs` first: set-user-ID programs (sudo, fusermount) then run in the job
without their extra rights. It is set only where it is needed, and recorded (docs/adr/0005-kill-ledger.md).

Not asked about: signal 0 and signals that do nothing by default or serve a language runtime (QUIET); reading ptrace
calls; prlimit on oneself. Not seen: senders outside the job, the kernel itself, cgroup.kill, F_SETOWN.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import select
import socket
import struct
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from . import keeper

KEEPER = os.path.abspath(keeper.__file__)
MACHINES = {
    "x86_64": (317, (keeper.ARCH_X86_64, keeper.ARCH_I386)),
    "aarch64": (277, (keeper.ARCH_AARCH64, keeper.ARCH_ARM)),
}
"""Machine → number of the seccomp call there, architectures its processes can call by."""

QUIET = (0, 17, 23, 28, 32, 33)
"""Existence check, SIGCHLD, SIGURG (Go's preemption, thousands a second), SIGWINCH, and the two of the C library."""

PTRACE_TOLD = (4, 5, 6, 13, 15, 16, 0x4205, 0x4206)
"""ptrace requests that attach or write: POKETEXT, POKEDATA, POKEUSER, SETREGS, SETFPREGS, ATTACH, SETREGSET, SEIZE."""

ANSWER_SECONDS = 0.25
"""A question that waits longer than twice this is answered by the supervisor itself."""

KEEPER_LIMIT = 5
"""Keepers started for one run; past it only the supervisor answers."""

_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16
_NO_NEW_PRIVS = 38
_SPEC_ALLOW, _NEW_LISTENER, _WAIT_KILLABLE = 1 << 2, 1 << 3, 1 << 5

Instruction = Tuple[int, int, int, int]


class Unsupported(Exception):
    """The ledger cannot be had here; the message says why."""


# -- the filter --------------------------------------------------------------------------------------------------------


def program(architectures: Tuple[int, ...]) -> List[Instruction]:
    """The filter as (code, jump if true, jump if false, constant) instructions; see seccomp(2), bpf."""
    code: List[Instruction] = [(_LOAD, 0, 0, _ARCH)]
    for arch in architectures:
        block: List[Instruction] = [(_LOAD, 0, 0, _NR)]
        for call, numbers in keeper.CALLS[arch].items():
            rule = _rule(call)
            for number in numbers:
                block += [(_EQUAL, 0, len(rule), number), *rule]
        block.append((_RETURN, 0, 0, _ALLOW))
        code += [(_EQUAL, 0, len(block), arch), *block]  # jumps are bytes: a test holds every block below 256
    return [*code, (_RETURN, 0, 0, _ALLOW)]


def _rule(call: str) -> List[Instruction]:
    """What follows a matching call number; always returns."""
    tell: List[Instruction] = [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
    if call in keeper.SIGNAL_ARGUMENT:
        return [_argument(keeper.SIGNAL_ARGUMENT[call]), *_jumps(QUIET, past=1), *tell]
    if call == "ptrace":
        return [_argument(0), *_jumps(PTRACE_TOLD, past=1), *reversed(tell)]
    if call == "prlimit64":  # told when it sets a limit (a new one is given) of another process (not 0)
        given = [_argument(2), (_EQUAL, 0, 2, 0), _argument(2, high=True), (_EQUAL, 1, 0, 0)]
        return [_argument(0), (_EQUAL, len(given) + 1, 0, 0), *given, *tell]
    return tell[:1]


def _argument(index: int, *, high: bool = False) -> Instruction:
    return (_LOAD, 0, 0, _ARGS + 8 * index + 4 * high)


def _jumps(values: Tuple[int, ...], *, past: int) -> List[Instruction]:
    """Compare with each of `values`; on a match jump `past` instructions beyond the last comparison."""
    return [(_EQUAL, len(values) - 1 - i + past, 0, value) for i, value in enumerate(values)]


def install() -> Tuple[int, bool]:
    """Put the filter on this thread alone. The listener's descriptor, and whether no_new_privs had to be set.

    Raises Unsupported. Only what this thread starts from now on is under the filter.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise Unsupported(f"no system call numbers for {sys.platform} on {machine}")
    if _kernel() < (5, 9):
        raise Unsupported(f"kernel {platform.release()}: expected 5.9 or newer")
    call, architectures = MACHINES[machine]
    with contextlib.suppress(OSError):
        return _seccomp(call, architectures), False
    if ctypes.CDLL(None, use_errno=True).prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise Unsupported("the kernel refuses no_new_privs")
    try:
        return _seccomp(call, architectures), True
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Unsupported("another program already listens to the calls of this process tree") from error
        raise Unsupported(f"the kernel or the container refuses the filter: {os.strerror(error.errno or 0)}") from error


def _seccomp(call: int, architectures: Tuple[int, ...]) -> int:
    instructions = b"".join(struct.pack("=HBBI", *one) for one in program(architectures))
    text = ctypes.create_string_buffer(instructions, len(instructions))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(instructions) // 8, ctypes.addressof(text)))
    flags = _SPEC_ALLOW | _NEW_LISTENER
    library = ctypes.CDLL(None, use_errno=True)
    for flag in (_WAIT_KILLABLE, 0):  # since Linux 5.19: a sender, once asked about, is not woken by other signals
        listener = int(library.syscall(call, 1, flags | flag, ctypes.byref(header)))
        if listener >= 0:
            return listener
        if ctypes.get_errno() != errno.EINVAL:
            break
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def _kernel() -> Tuple[int, ...]:
    parts = platform.release().split(".")[:2]
    try:
        return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
    except ValueError:
        return (0,)


# -- the ledger --------------------------------------------------------------------------------------------------------


class Ledger:
    """One run's ledger. `start(spawn)` starts the command under it; `messages()` are keeper.Book's, as they come."""

    def __init__(self, deny: Optional[Sequence[str]] = None) -> None:
        self.deny = deny
        """Programs that may signal strangers, where others may not; None denies nothing."""
        self.listener: Optional[int] = None
        self.reason: Optional[str] = None
        """Why there is no ledger; None where there is one."""
        self.no_new_privs = False
        self.keeper: Optional[int] = None
        """Pid of the keeper; no part of the job."""
        self.keepers = 0
        self.ours: Optional[socket.socket] = None
        self._theirs: Optional[socket.socket] = None
        self._stop = threading.Event()
        self._stand_in: Optional[threading.Thread] = None

    def start(self, spawn: Callable[[], int]) -> int:
        """`spawn()` under the filter, or plain where there can be none; its result, and what it raises."""
        result: List[Any] = []

        def work() -> None:
            try:
                self.listener, self.no_new_privs = install()
            except Exception as error:
                self.reason = str(error) or type(error).__name__
                return
            try:
                result.append(spawn())
            except Exception as error:
                result.append(error)

        thread = threading.Thread(target=work, name="start")
        thread.start()
        thread.join()
        if self.listener is None:
            return spawn()
        if isinstance(result[0], Exception):
            self.close()
            raise result[0]
        self._listen()
        return int(result[0])

    def _listen(self) -> None:
        if self.listener is None:
            return
        keeper.wake_quickly(self.listener)
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.start_keeper()
        self._stand_in = threading.Thread(target=self._stand_by, args=(self.listener,), name="ledger", daemon=True)
        self._stand_in.start()

    def start_keeper(self) -> None:
        """Start a keeper; called again when one ended before the job did."""
        self.keeper = None
        if self.listener is None or self._theirs is None or self.keepers >= KEEPER_LIMIT:
            return
        self.keepers += 1
        with contextlib.suppress(OSError):
            self.keeper = _spawn_keeper(self.listener, self._theirs.fileno(), self.deny)

    def messages(self) -> Iterator[Dict[str, Any]]:
        """What was told since the last call."""
        while self.ours is not None:
            try:
                data = self.ours.recv(1 << 20)
            except OSError:
                return
            if not data:
                return
            with contextlib.suppress(ValueError):
                message = json.loads(data)
                if isinstance(message, dict):
                    yield message

    def close(self) -> None:
        """Leave. The keeper stays for as long as a process of the job lives."""
        self._stop.set()
        if self._stand_in is not None:
            self._stand_in.join(1.0)
        if self.listener is not None and (self.keeper is not None or self.ours is None):
            os.close(self.listener)  # without a keeper we hold it to our own end: closing it would break `kill`
        self.listener = None
        for end in (self.ours, self._theirs):
            if end is not None:
                end.close()
        self.ours = None

    def _stand_by(self, listener: int) -> None:
        """Answer what the keeper leaves unanswered: it may be stopped, starting, or gone."""
        book = keeper.Book(self._hand_on, os.getpid(), self.deny)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        waited = False
        while not self._stop.wait(ANSWER_SECONDS if self.keeper is not None else 0.01):
            waiting = any(event & select.POLLIN for _, event in poll.poll(0))
            if waiting and (waited or self.keeper is None):
                with contextlib.suppress(OSError):
                    keeper.answer(listener, book)
                self._wake_keeper()
            waited = waiting
            book.flush(time.monotonic())

    def _wake_keeper(self) -> None:
        """A keeper that somebody stopped goes on."""
        with contextlib.suppress(OSError):
            if self.keeper is not None and _state(self.keeper) == "T":
                os.kill(self.keeper, 18)

    def _hand_on(self, message: Dict[str, Any]) -> bool:
        try:
            if self._theirs is not None:
                self._theirs.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True


def _spawn_keeper(listener: int, channel: int, deny: Optional[Sequence[str]]) -> int:
    """Start keeper.py with the listener as 3 and the socket as 4, in a session of its own, holding nothing else."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (listener, channel)]
    actions = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    actions += [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]  # type: ignore[list-item]
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    words = [sys.executable, "-I", "-S", KEEPER, *([json.dumps(list(deny))] if deny is not None else [])]
    try:
        return os.posix_spawn(sys.executable, words, kept, file_actions=actions, setsid=True)
    finally:
        for fd in high:
            os.close(fd)


def _state(pid: int) -> str:
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return file.read(4096).rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "?"
