"""The node's ledger: every signal that anybody on this machine sends, told by the kernel's own trace. Needs root.

The kill ledger of a run (ledger.py) sees senders inside the job. This one sees the others: it opens an instance of
its own in tracefs, so that nobody's tracing is disturbed, and switches on one event, `signal:signal_generate`. A run
connects to a socket and is told the signals to processes of its own account; root is told all.

    Trace(instance folder)     the kernel's lines, as events
    Desk(socket path)          who asks, and what each may know
    ask(socket path)           the run's side

Events: {"signal", "target", "target_comm", "kernel": raised by the kernel itself, "sender": facts, "at": ns,
"target_uid"}. A sender's facts are read from /proc a moment after it sent: of one that has ended at once only pid and
name are left.

Not told: signals without an effect on processes' lives (keeper.HARMLESS). Format of the event: Linux
include/trace/events/signal.h.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from . import keeper

TRACING = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
SOCKET = "/run/trainguard/node"
"""Where the node's ledger listens; the variable TRAINGUARD_NODE names another place."""

CLIENT_LIMIT = 256
LINE_LIMIT = 1 << 16

_LINE = re.compile(
    rb"^\s*(?P<comm>.{1,16})-(?P<sender>\d{1,9})\s+(?:\([\s\d-]+\)\s+)?\[\d+\]\s+\S+\s+\d+\.\d+: signal_generate: "
    rb"sig=(?P<signal>\d{1,3}) errno=-?\d+ code=(?P<code>-?\d{1,10}) "
    rb"comm=(?P<target_comm>.{0,16}) pid=(?P<target>\d{1,9}) grp=\d+ res=(?P<result>\d+)\s*$"
)
"""Names are their owners' choice, 15 bytes at most: too short to hold what must follow them, and matched greedily."""

_DELIVERED = (0,)


class Unsupported(Exception):
    """There can be no node's ledger here; the message says what is missing."""


def find_tracing(given: Optional[Path] = None) -> Path:
    """The folder of tracefs. Raises Unsupported with what is missing."""
    if os.geteuid() != 0:
        raise Unsupported("the kernel's trace of signals needs root")
    folders = (given,) if given is not None else TRACING
    for folder in folders:
        if (folder / "events" / "signal" / "signal_generate").is_dir():
            return folder
    mounted = [str(folder) for folder in folders]
    raise Unsupported(f"no tracefs with the event signal:signal_generate at {' or '.join(mounted)}")


class Trace:
    """One instance of tracefs with one event on; `close` takes it away again."""

    def __init__(self, tracing: Path) -> None:
        self.folder = tracing / "instances" / f"trainguard-{os.getpid()}-{secrets.token_hex(3)}"
        try:
            self.folder.mkdir()
            with contextlib.suppress(OSError):
                (self.folder / "buffer_size_kb").write_text("256")
            with contextlib.suppress(OSError):
                (self.folder / "buffer_percent").write_text("0")  # wake the reader at the first event
            (self.folder / "events" / "signal" / "signal_generate" / "enable").write_text("1")
            self._pipe = os.open(self.folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._remove()
            raise Unsupported(f"{self.folder}: {error.strerror}") from error
        self._rest = b""
        self.lost = 0
        """Events the kernel says it overwrote before they were read."""

    def fileno(self) -> int:
        """For select."""
        return self._pipe

    def events(self) -> List[Dict[str, Any]]:
        """What was told since the last call."""
        found: List[Dict[str, Any]] = []
        while True:
            try:
                data = os.read(self._pipe, LINE_LIMIT)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EINTR):
                    raise
                break
            if not data:
                break
            lines = (self._rest + data).split(b"\n")
            self._rest = lines.pop()[-LINE_LIMIT:]
            for line in lines:
                lost = re.search(rb"LOST (\d+) EVENTS", line)
                self.lost += int(lost.group(1)) if lost is not None else 0
                event = parse(line)
                if event is not None:
                    found.append(event)
        return found

    def close(self) -> None:
        """Switch the event off and remove the instance."""
        os.close(self._pipe)
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            (self.folder / "events" / "signal" / "signal_generate" / "enable").write_text("0")
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def parse(line: bytes) -> Optional[Dict[str, Any]]:
    """One line of the trace as an event with bare facts; None for other lines and for signals that end nothing."""
    match = _LINE.match(line)
    if match is None:
        return None
    number = int(match.group("signal"))
    if number in keeper.HARMLESS or int(match.group("result")) not in _DELIVERED:
        return None
    return {
        "signal": number,
        "target": int(match.group("target")),
        "target_comm": match.group("target_comm").decode(errors="replace"),
        "kernel": int(match.group("code")) > 0,  # SI_KERNEL, and faults of the process itself
        "sender": {"pid": int(match.group("sender")), "comm": match.group("comm").decode(errors="replace")},
    }


def with_facts(event: Dict[str, Any]) -> Dict[str, Any]:
    """The event with what /proc says of its sender now, when it was read, and the account of the target."""
    told = event["sender"]
    pid = keeper.thread_group(told["pid"])
    facts = keeper.facts(pid, 1)
    sender = {**facts, "comm": facts["comm"] or told["comm"]} if facts["uid"] is not None else {**told, "uid": None}
    return {**event, "sender": sender, "at": time.time_ns(), "target_uid": _uid(event["target"])}


def _uid(pid: int) -> Optional[int]:
    try:
        return os.stat("/proc/%d" % pid).st_uid
    except OSError:
        return None


# -- the desk ----------------------------------------------------------------------------------------------------------


class Desk:
    """A socket where runs ask. Each is told signals to its own account; root is told all."""

    def __init__(self, path: str) -> None:
        self.path = path
        folder = os.path.dirname(path)
        os.makedirs(folder, mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.bind(path)
        os.chmod(path, 0o666)  # noqa: S103  whoever comes is told what concerns its own account; the kernel says who it is
        self.socket.listen(64)
        self.socket.setblocking(False)
        self.clients: List[Tuple[socket.socket, int]] = []

    def fileno(self) -> int:
        """For select."""
        return self.socket.fileno()

    def accept(self) -> None:
        """Take one that waits."""
        try:
            link, _ = self.socket.accept()
        except OSError:
            return
        if len(self.clients) >= CLIENT_LIMIT:
            link.close()
            return
        link.setblocking(False)
        self.clients.append((link, peer_uid(link)))

    def tell(self, event: Dict[str, Any]) -> None:
        """Hand an event to all who may know it; one that does not read is left out."""
        data = json.dumps(event).encode()
        for link, uid in list(self.clients):
            if uid not in (0, event["target_uid"]):
                continue
            try:
                link.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                continue
            except OSError:
                self.clients.remove((link, uid))
                link.close()

    def close(self) -> None:
        """Stop listening and take the socket away."""
        for link, _ in self.clients:
            link.close()
        self.socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def peer_uid(link: socket.socket) -> int:
    """The account at the other end, by the kernel."""
    return int(struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])


def serve(trace: Trace, desk: Desk, stop_fd: int) -> Iterator[Optional[Dict[str, Any]]]:
    """Every event, once it was told at the desk, until `stop_fd` becomes readable; None when a while went by."""
    poll = select.poll()
    for descriptor in (trace.fileno(), desk.fileno(), stop_fd):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(250)}
        if desk.fileno() in ready:
            desk.accept()
        for event in trace.events():
            known = with_facts(event)
            desk.tell(known)
            yield known
        if stop_fd in ready:
            return
        yield None


# -- the run's side ----------------------------------------------------------------------------------------------------


def ask(path: str) -> Optional[socket.socket]:
    """A connection to the node's ledger of this machine; None where there is none, or where it is not root's."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.settimeout(1.0)
        link.connect(path)
        if peer_uid(link) != 0:
            raise OSError(errno.EPERM, "not root's")
    except OSError:
        link.close()
        return None
    link.setblocking(False)
    return link


def told(link: socket.socket) -> Iterator[Dict[str, Any]]:
    """What waits on the connection. Ends when nothing does; raises EOFError when the ledger has gone."""
    while True:
        try:
            data = link.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        with contextlib.suppress(ValueError):
            event = json.loads(data)
            if isinstance(event, dict) and isinstance(event.get("target"), int):
                yield event
