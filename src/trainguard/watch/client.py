"""The process's end of the evidence socket. Runs inside the training process; never blocks it, never raises.

Frames go out over a Unix SOCK_SEQPACKET socket, one JSON object a message:

    process → supervisor   {"k": kind, "q": seq, "s": step or absent, "b": body}     first: k = "hello"
    supervisor → process   the welcome, once: {"key": hex, "links": …, "process": n, …}  (see Settings)

Who we are (pid, uid) is what the kernel tells the supervisor. A frame that cannot be sent at once waits in a short
queue; past its bound it is dropped, and the gap in `q` is what the supervisor sees.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any, Dict, List, Optional

_encode = json.JSONEncoder(separators=(",", ":"), default=str, check_circular=False).encode

FRAME_LIMIT_BYTES = 160 * 1024
"""Below the kernel's default socket buffer (net.core.wmem_default, 212,992 bytes)."""

QUEUE_LIMIT_BYTES = 4 << 20
WELCOME_SECONDS = 5.0
GOODBYE_SECONDS = 10.0
"""How long a leaving process waits for a supervisor that is slow to read: without its goodbye it looks cut off."""


class Client:
    """One connection of one process. After a fork the child opens its own at its first frame."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid: Optional[int] = None
        self.seq = 0
        self.settings: Dict[str, Any] = {}
        self.socket: Optional[socket.socket] = None
        self.queue: List[bytes] = []
        self.queued_bytes = 0
        self.dropped = 0
        self.faults: Dict[str, int] = {}
        """Place of an exception inside guard code → times it happened; reported, never raised."""
        self.forked_from: Optional[int] = None
        self._lock = threading.RLock()
        self._owner: Optional[int] = None
        """Thread that is inside `open` or `send`: what it sets off there itself (audit events) is not sent."""

    # -- connection -------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Connect and say hello. Returns whether the supervisor answered; on False the guard stays asleep."""
        self._owner = threading.get_ident()
        try:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            link.settimeout(WELCOME_SECONDS)
            try:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                link.connect(self.path)
                self.pid = os.getpid()
                self.seq = 0
                link.send(self._frame("hello", hello_body(self.forked_from), None))
                self.settings = json.loads(link.recv(65536).decode())
            except BaseException:
                link.close()
                raise
            link.setblocking(False)
            self.socket = link
            return True
        except Exception:
            self.socket = None
            self.pid = os.getpid()
            return False
        finally:
            self._owner = None

    def after_fork(self) -> None:
        """In a forked child: forget the parent's connection without closing it for the parent."""
        if self.socket is not None:
            try:
                self.socket.close()
            except OSError:
                pass
        self.socket = None
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._owner = None
        self.queue = []
        self.queued_bytes = 0
        self.forked_from = self.pid
        self.open()

    @property
    def alive(self) -> bool:
        """Whether frames still reach a supervisor."""
        return self.socket is not None

    # -- sending ----------------------------------------------------------------------------------------------

    def send(self, kind: str, body: Any, step: Optional[int] = None) -> None:
        """Queue one frame and push out what fits. `body`: a JSON value. Never blocks, never raises."""
        me = threading.get_ident()
        if self.socket is None or self._owner == me:
            return
        with self._lock:
            self._owner = me
            try:
                self._send(kind, body, step)
            except Exception as error:
                self.fault("client.send", error)
            finally:
                self._owner = None

    def _send(self, kind: str, body: Any, step: Optional[int]) -> None:
        data = self._frame(kind, body, step)
        if len(data) > FRAME_LIMIT_BYTES:
            data = self._frame("note", {"oversize": kind, "bytes": len(data)}, step, seq=self.seq - 1)
        if self.queued_bytes + len(data) > QUEUE_LIMIT_BYTES:
            self.dropped += 1
            return
        self.queue.append(data)
        self.queued_bytes += len(data)
        self._push()

    def fault(self, place: str, error: BaseException) -> None:
        """Count an exception of our own; the count goes out with `bye` and with the next note."""
        key = "%s: %s" % (place, type(error).__name__)
        first = key not in self.faults
        self.faults[key] = self.faults.get(key, 0) + 1
        if first:
            self.send("note", {"fault": key, "text": str(error)[:500]})

    def close(self) -> None:
        """Say goodbye; the process is leaving in an orderly way."""
        body = {"dropped": self.dropped, "faults": self.faults}
        try:
            error = _uncaught()
            if error is not None:
                body["error"] = error
        except Exception as fault:
            self.fault("client.close", fault)
        self.send("bye", body)
        if self.socket is not None:
            try:
                if self.queue:
                    self.socket.settimeout(GOODBYE_SECONDS)
                    self._push()
                self.socket.close()
            except OSError:
                pass
            self.socket = None

    def _frame(self, kind: str, body: Any, step: Optional[int], seq: Optional[int] = None) -> bytes:
        frame = {"k": kind, "q": self.seq if seq is None else seq, "b": body}
        if step is not None:
            frame["s"] = step
        if seq is None:
            self.seq += 1
        return _encode(frame).encode()

    def _push(self) -> None:
        while self.queue and self.socket is not None:
            try:
                self.socket.send(self.queue[0], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.socket.close()
                self.socket = None
                self.queue = []
                self.queued_bytes = 0
                return
            self.queued_bytes -= len(self.queue.pop(0))


def hello_body(forked_from: Optional[int]) -> Dict[str, Any]:
    """What a process says of itself. Claims, all of it: the supervisor stores it beside what the kernel attests."""
    names = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_MAX_RESTARTS",
        "TORCHELASTIC_RUN_ID",
    )
    flags = sys.flags
    return {
        "executable": sys.executable,
        "argv": list(getattr(sys, "orig_argv", []) or [])[:256],
        "cwd": _cwd(),
        "version": sys.version.split()[0],
        "implementation": sys.implementation.name,
        "ppid": os.getppid(),
        "forked_from": forked_from,
        "flags": {
            name: int(getattr(flags, name))
            for name in dir(flags)
            if name[0] != "_" and isinstance(getattr(flags, name), int)
        },
        "env": {name: os.environ[name] for name in names if name in os.environ},
        "monotonic_ns": time.monotonic_ns(),
    }


def _uncaught() -> Optional[Dict[str, Any]]:
    """The exception that ends this interpreter, as the interpreter itself keeps it; None for an orderly end."""
    kind = getattr(sys, "last_type", None)
    if kind is None or getattr(sys, "ps1", None) is not None:
        return None
    value, trace = getattr(sys, "last_value", None), getattr(sys, "last_traceback", None)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "%s:%d" % (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else None
    return {"type": kind.__name__, "text": str(value)[:300], "place": place}


def _cwd() -> Optional[str]:
    try:
        return os.getcwd()
    except OSError:
        return None
