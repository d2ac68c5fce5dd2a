"""The parent process of a guarded command: it starts it, listens, attests, and survives it.

    command ── inherits stdin, stdout, stderr, the process group, limits; gets its signals; keeps its exit status
       │  every Python interpreter in it connects here (client.py) and sends frames
       ▼
    supervisor ── adds pid, uid (SO_PEERCRED), process number, time ── recorder (spool, chain, seal, log)

Rules it keeps: the command never waits for us, and nothing here ends it, unless the policy says `stop`. If we die, the
sockets break and training goes on unrecorded; the record then has no end, which is itself a finding. Nothing is judged
here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import secrets
import select
import selectors
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainguard.errors import Misuse, Unavailable
from trainguard.evidence import Evidence
from trainguard.watch import endings, ledger, node, outputs, outside, processes, reached, stalls

BOOT = Path(__file__).parent / "boot"
"""The folder with our sitecustomize.py, first on PYTHONPATH of the command."""

CONNECTION_LIMIT = 8192
FRAME_LIMIT_BYTES = 256 * 1024
TICK_SECONDS = 0.25
DRAIN_SECONDS = 2.0
NODE_SECONDS = 0.1
"""How long the end of a process waits for what the node's ledger has to say of it."""

HELLO_GRACE_SECONDS = 8.0
"""A Python interpreter of the job older than this must have said hello; start-up on a loaded machine takes 1-3 s."""
UNHEARD_GRACE_SECONDS = 10.0
"""A process that closed its connection and lives this much longer without a new program went on unheard."""

FORWARDED = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
    signal.SIGALRM,
    signal.SIGWINCH,
}
"""Signals a scheduler, a shell or a person sends to the job's process; passed on to the command."""

RESERVED = frozenset(
    (
        "start",
        "measurement",
        "unmeasured",
        "ledger",
        "process",
        "silent",
        "unheard",
        "text",
        "live",
        "heartbeat",
        "signal",
        "signalled",
        "enforced",
        "node",
        "outside",
        "stall",
        "pace",
        "exit",
        "gap",
        "malformed",
        "refused",
        "saved",
        "seal",
        "opened",
        "point_sealed",
        "point_unsealed",
        "end",
    )
)
"""Kinds of records that only the supervisor makes; a frame that claims one is malformed."""

_SENT_BY_KERNEL = 0x80  # SI_KERNEL: from the terminal, so the command's process group has it already


class Recorder(Protocol):
    """Where records go. Never raises for a full disk; see archive.RunWriter."""

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> Evidence | None: ...

    def seal(self, *, final: bool = False) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every guarded process is told in the welcome."""

    links: str = "governed"
    budget_percent: float = 1.0
    credit_seconds: float = 1.0
    always_steps: int = 20
    tensors: int = 4
    elements: int = 32
    kills: str = "ledger"
    """ledger: name the sender of every signal in the job (docs/checks/kills.md); off: put no filter on it."""
    commits: bool = False
    """Whether every step is committed to, so that it can be replayed (watch/commits.py)."""
    commit_percent: float = 0.4
    """Share of a step's time beyond which a step commits less."""
    points: str = ""
    """Folder for replay points (watch/points.py); empty for none."""
    points_percent: float = 0.5
    points_mb: float = 512.0
    points_every: int = 0
    replay: dict[str, Any] | None = None
    """Plan of a replay (watch/warp.py); None in every real run."""
    probe: dict[str, Any] | None = None
    """Plan of a scale probe (watch/probe.py); None in every real run."""
    gate: dict[str, Any] | None = None
    """{"mode": "log" | "stop", "path": socket}: who vets model files before they are read (watch/loads.py)."""
    outside_first_seconds: float = 20.0
    """Time from a process's first step to the first look at its code from outside (docs/checks/live.md)."""
    outside_seconds: float = 600.0
    """Time between such looks; 0: none."""
    pycache: str = ""
    """Folder of the private bytecode cache (mode 0700)."""
    key: str = field(default_factory=lambda: secrets.token_hex(32))
    """Secret of this run from which sample positions are drawn; never written to the record before the end."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the command ended: exactly one of the two is not None."""

    status: int | None
    signal: int | None
    wall_ns: int
    cpu_ns: int


@dataclass(slots=True)
class _Peer:
    """One connected process."""

    number: int
    pid: int
    uid: int
    link: socket.socket
    hello: dict[str, Any] | None = None
    next_seq: int = 0
    said_bye: bool = False
    rank: int | None = None
    start_ticks: int | None = None
    pidfd: int | None = None
    image: processes.Image = (None, b"")


@dataclass(slots=True)
class _Stopping:
    """The job is to end."""

    why: dict[str, Any]
    """For the record."""
    deadline: float | None = None
    """When SIGKILL follows; None before anything was sent."""
    sent: set[tuple[int, int]] = field(default_factory=set)
    """(pid, signal) sent so far."""


class Supervisor:
    """Runs one command under watch. Use once: `Supervisor(...).run(command)`."""

    def __init__(
        self,
        recorder: Recorder,
        settings: Settings,
        *,
        heartbeat_seconds: float = 10.0,
        segment_seconds: float = 2.0,
        hang_seconds: float = 300.0,
        deny: Sequence[str] | None = None,
        stop_grace_seconds: float = 10.0,
    ) -> None:
        self.recorder = recorder
        self.settings = settings
        self._heartbeat_seconds = heartbeat_seconds
        self._segment_seconds = segment_seconds
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        self._numbers = 0
        self._records = 0
        self._tree = processes.Tree(grace_seconds=HELLO_GRACE_SECONDS)
        self._unheard = processes.Unheard(grace_seconds=UNHEARD_GRACE_SECONDS)
        self._ledger = ledger.Ledger(deny)
        self._memory = endings.Memory()
        self._outputs = outputs.Outputs(Path.cwd())
        self._reached = reached.Reached()
        self._stalls = stalls.Stalls(self._add, hang_seconds=hang_seconds)
        self._outside = outside.Outside(
            lambda *told: self._told.put(told),
            first_seconds=settings.outside_first_seconds,
            every_seconds=settings.outside_seconds,
        )
        self._told: queue.SimpleQueue[tuple[str, dict[str, Any], int, int]] = queue.SimpleQueue()
        self._child: int | None = None
        self._ended: tuple[int | None, int | None] | None = None
        self._stop = threading.Event()
        self._stop_grace_seconds = stop_grace_seconds
        self._stopping: _Stopping | None = None
        self._node: socket.socket | None = None
        self._pids: set[int] = set()
        """Connected processes."""

    # -- the whole run --------------------------------------------------------------------------------------------

    def run(self, command: Sequence[str], env: Mapping[str, str], *, mask: Iterable[int] = ()) -> Ended:
        """Start `command` and watch it to its end. Raises Misuse when it cannot be started.

        mask: signals blocked in the command. The caller has FORWARDED blocked in every thread (`blocked_signals`).
        """
        folder = tempfile.mkdtemp(prefix="trainguard-")
        listener = self._listen(str(Path(folder) / "s"))
        processes.become_subreaper()
        began, cpu = time.monotonic_ns(), _children_cpu_ns()
        try:
            self._ask_node(env)
            self._child = self._begin(command, self._environment(env, str(Path(folder) / "s")), mask)
            threading.Thread(target=self._forward_signals, name="signals", daemon=True).start()
            self._outside.start()
            if self._outputs.open():
                self._selector.register(self._outputs, selectors.EVENT_READ, outputs.Outputs.read)
            self._loop(self._child)
        finally:
            self._stop.set()
            self._outside.stop()
            listener.close()
            self._stalls.close()
            if self._node is not None:
                self._node.close()
            self._selector.close()
            self._outputs.close()
            self._ledger.close()
            shutil.rmtree(folder, ignore_errors=True)
        status, number = self._ended if self._ended is not None else (None, signal.SIGKILL)
        ended = Ended(status, number, time.monotonic_ns() - began, _children_cpu_ns() - cpu)
        self._add(
            "end",
            {"status": status, "signal": number, "wall_ns": ended.wall_ns, "cpu_ns": ended.cpu_ns}
            | {"pid": self._child, "key": self.settings.key, "out_of_memory": self._memory.killed()},
        )
        return ended

    def _begin(self, command: Sequence[str], env: Mapping[str, str], mask: Iterable[int]) -> int:
        """Start the command, under the kill ledger where there can be one, and record whether there is."""
        self._memory.watch(os.getpid())
        if self.settings.kills == "off":
            child = _start(command, env, mask)
            self._add("ledger", {"state": "off", "child": child, "supervisor": os.getpid()})
            return child
        child = self._ledger.start(lambda: _start(command, env, mask))
        if self._ledger.ours is not None:
            self._selector.register(self._ledger.ours, selectors.EVENT_READ, lambda _link: self._take_signals())
        self._keep_keeper()
        state = "on" if self._ledger.reason is None else "unavailable"
        body = {"state": state, "reason": self._ledger.reason, "no_new_privs": self._ledger.no_new_privs}
        body["deny"] = self._ledger.deny is not None
        self._add("ledger", body | {"keeper": self._ledger.keeper, "child": child, "supervisor": os.getpid()})
        return child

    def _ask_node(self, env: Mapping[str, str]) -> None:
        """Hear of senders outside the job, where this machine has a node's ledger (watch/node.py)."""
        self._node = node.ask(env.get("TRAINGUARD_NODE", node.SOCKET))
        if self._node is not None:
            self._selector.register(self._node, selectors.EVENT_READ, lambda _link: self._take_outside())
            self._add("node", {"state": "on"})

    def _take_outside(self) -> None:
        """Signals to processes of this job that the node's ledger saw."""
        if self._node is None:
            return
        try:
            for event in node.told(self._node):
                target = event["target"]
                if target == self._child or target in self._pids:
                    self._add("outside", event, pid=event["sender"].get("pid"), uid=event["sender"].get("uid"))
        except (EOFError, AttributeError):
            self._selector.unregister(self._node)
            self._node.close()
            self._node = None
            self._add("node", {"state": "gone"})

    def _keep_keeper(self) -> None:
        """The keeper and the reader are our children but no part of the job."""
        helpers = (self._ledger.keeper, self._outside.pid)
        self._tree.apart = {os.getpid(), *(pid for pid in helpers if pid is not None)}

    def _take_signals(self) -> None:
        """What the kill ledger was told. A Python sender's own account of the line was sent before: read it first."""
        for told in self._ledger.messages():
            sender = told.get("sender")
            who = sender if isinstance(sender, dict) else {}
            peer = next((peer for peer in self._peers.values() if peer.pid == who.get("pid")), None)
            if peer is not None:
                self._hear(peer)  # and no more: its end, if this ended it, belongs behind what is recorded here
            number, rank = (peer.number, peer.rank) if peer is not None else (None, None)
            self._add("signalled", told, pid=who.get("pid"), uid=who.get("uid"), process=number, rank=rank)

    def stop(self, why: dict[str, Any]) -> None:
        """End the job: SIGTERM to the command, then to what is left of it, SIGKILL after the grace. Thread-safe."""
        if self._stopping is None:
            self._stopping = _Stopping(why)

    @property
    def stopped(self) -> bool:
        """Whether the job was ended by `stop`."""
        return self._stopping is not None and self._stopping.deadline is not None

    def _end_job(self, child: int) -> bool:
        """One look at a job that is being stopped; whether some of it lives on."""
        stopping = self._stopping
        if stopping is None or (stopping.deadline is None and self._ended is not None):
            return False
        now = time.monotonic()
        if stopping.deadline is None:
            stopping.deadline = now + self._stop_grace_seconds
            self._add("enforced", {"mode": "stop", **stopping.why}, step=self._reached.at(time.time_ns()))
        left = [pid for pid in self._tree.members(child) if pid != child or self._ended is None]
        number = signal.SIGTERM if now < stopping.deadline else signal.SIGKILL
        for pid in left if self._ended is not None or number == signal.SIGKILL else [child]:
            if (pid, number) not in stopping.sent:
                stopping.sent.add((pid, number))
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        return bool(left) and now < stopping.deadline + DRAIN_SECONDS

    @property
    def child(self) -> int | None:
        """Pid of the command while it runs."""
        return self._child if self._ended is None else None

    def _listen(self, path: str) -> socket.socket:
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(path)
            listener.listen(256)
        except OSError as error:
            raise Unavailable(f"{path}: evidence socket cannot be made: {error.strerror}") from error
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        return listener

    def _environment(self, env: Mapping[str, str], path: str) -> dict[str, str]:
        """The command's environment: as given, with our boot folder first and bytecode in a private place."""
        guarded = dict(env)
        inherited = env.get("PYTHONPATH")
        guarded["PYTHONPATH"] = f"{BOOT}{os.pathsep}{inherited}" if inherited else str(BOOT)
        guarded["TRAINGUARD_SOCKET"] = path
        if self.settings.pycache:
            guarded["PYTHONPYCACHEPREFIX"] = self.settings.pycache
        return guarded

    # -- the loop -------------------------------------------------------------------------------------------------

    def _loop(self, child: int) -> None:
        """Listen until the command has ended and what it sent before has been read."""
        next_seal = next_heartbeat = next_look = time.monotonic()
        deadline = None
        stopping = False
        while deadline is None or stopping or (self._peers and time.monotonic() < deadline):
            events = self._selector.select(TICK_SECONDS if deadline is None else 0.02)
            for key, _ in events:
                key.data(key.fileobj)
            now = time.monotonic()
            stopping = self._end_job(child)
            if now >= next_look:
                self._look(child)
                self._saved()
                next_look = now + TICK_SECONDS
            if deadline is None and self._reap(child):
                deadline = time.monotonic() + DRAIN_SECONDS
            if deadline is not None and not events and not stopping:
                break
            if now >= next_heartbeat:
                self._add("heartbeat", {"processes": len(self._peers), "records": self._records})
                next_heartbeat = now + self._heartbeat_seconds
            if now >= next_seal:
                self.recorder.seal()
                next_seal = now + self._segment_seconds
        self._take_signals()
        if self._ended is not None and self._ended[1] is not None:
            self._wait_for_node()
        self._outputs.read()
        self._saved(settle_seconds=0.0)
        for peer in list(self._peers.values()):
            self._drop(peer)

    def _saved(self, settle_seconds: float = outputs.SETTLE_SECONDS) -> None:
        """Record model files that were saved, with the last step any rank had made when they were written."""
        for path in self._outputs.settled(settle_seconds):
            self._add("saved", {"path": str(path)}, step=self._reached.at(_written(path)))
            self._outside.saved()

    def _look(self, child: int) -> None:
        """Find Python processes of the job that never said hello."""
        self._looked()
        connected = {peer.pid for peer in self._peers.values()}
        unheard, changed = self._unheard.look(connected)
        for body in unheard:
            self._add("unheard", body, pid=body["pid"], process=body["of"])
        for pid in changed:
            self._tree.forget(pid)
        for silent in self._tree.look(child, connected):
            self._add("silent", silent, pid=silent["pid"])

    def _looked(self) -> None:
        """Record what was seen from outside; the reader at work is no part of the job."""
        self._keep_keeper()
        while not self._told.empty():
            kind, body, pid, number = self._told.get()
            peer = next((peer for peer in self._peers.values() if peer.number == number), None)
            if peer is not None:
                self._read(peer)
            if peer is None or peer.said_bye or peer.link.fileno() not in self._peers:
                continue  # it was leaving: an interpreter that takes itself apart looks like one that was taken apart
            self._add(kind, body, pid=pid, process=number, rank=peer.rank, step=self._reached.at(time.time_ns()))

    def _reap(self, child: int) -> bool:
        """Collect ended children (orphans come to us as subreaper); True once the command itself has ended."""
        while self._ended is None:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                break
            if info is None:
                break
            exited = info.si_code == os.CLD_EXITED
            if info.si_pid == self._ledger.keeper and not (exited and info.si_status == 0 and _over(child)):
                self._lose_keeper(info.si_status)
            if info.si_pid == child:
                self._ended = (info.si_status, None) if exited else (None, info.si_status)
        return self._ended is not None

    def _lose_keeper(self, status: int) -> None:
        """The keeper ended. While the job lives somebody ended it: we answer ourselves and start another."""
        gone = self._ledger.keeper
        self._ledger.start_keeper()
        self._keep_keeper()
        self._add("ledger", {"state": "keeper lost", "keeper": gone, "status": status, "next": self._ledger.keeper})

    def _forward_signals(self) -> None:
        """Pass on what is sent to us. What the terminal sends reaches the command without our help."""
        while not self._stop.is_set():
            info = signal.sigtimedwait(FORWARDED, 0.2)
            if info is None or info.si_code == _SENT_BY_KERNEL or self._child is None:
                continue
            sender = processes.facts(info.si_pid)
            body = {"signal": info.si_signo, "from_pid": info.si_pid, "from_uid": info.si_uid, "sender": sender}
            self._add("signal", body)
            try:
                if self._ended is None:
                    os.kill(self._child, info.si_signo)
            except ProcessLookupError:
                pass

    # -- connections ----------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except OSError:
            return
        pid, uid, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if len(self._peers) >= CONNECTION_LIMIT:
            self._add("refused", {"reason": f"more than {CONNECTION_LIMIT} connections"}, pid=pid, uid=uid)
            link.close()
            return
        link.setblocking(False)
        peer = _Peer(self._numbers, pid, uid, link, pidfd=endings.open_pidfd(pid))
        self._numbers += 1
        self._peers[link.fileno()] = peer
        self._tree.greeted(pid)
        self._pids.add(pid)
        self._selector.register(link, selectors.EVENT_READ, lambda _link: self._read(peer))

    def _read(self, peer: _Peer) -> None:
        """Take every message that waits on one connection, and its end."""
        if not self._hear(peer):
            self._drop(peer)

    def _hear(self, peer: _Peer) -> bool:
        """Take every message that waits on one connection; False once its other end is closed."""
        for _ in range(256):
            try:
                data = peer.link.recv(FRAME_LIMIT_BYTES)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                continue  # it left without reading what we asked; told once, before what it said, its goodbye included
            except OSError:
                return False
            if not data:
                return False
            self._take(peer, data)
        return True

    def _take(self, peer: _Peer, data: bytes) -> None:
        """One frame: attest, number, record."""
        try:
            frame = json.loads(data)
            kind, seq, body, step = frame["k"], frame["q"], frame["b"], frame.get("s")
            fits = isinstance(kind, str) and isinstance(seq, int) and isinstance(body, dict) and kind.isidentifier()
            fits = fits and (step is None or isinstance(step, int)) and kind not in RESERVED
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            self._add("malformed", {"process": peer.number, "bytes": len(data)}, pid=peer.pid, uid=peer.uid)
            return
        if seq != peer.next_seq:
            gap = {"expected_seq": peer.next_seq, "found_seq": seq}
            self._add("gap", gap, process=peer.number, pid=peer.pid, rank=peer.rank)
        peer.next_seq = seq + 1
        if kind == "hello":
            self._greet(peer, body)
            return
        peer.said_bye = peer.said_bye or kind == "bye"
        if kind in ("step", "steps") and step is not None:
            self._reached.stepped(peer.number, kind, step, body)
        if kind == "step" and step is not None:
            self._outside.stepped(peer.pid)
        self._add(
            kind,
            body,
            source="process",
            process=peer.number,
            pid=peer.pid,
            uid=peer.uid,
            rank=peer.rank,
            seq=seq,
            step=step,
        )
        if kind in ("step", "steps") and step is not None:
            self._stalls.stepped(peer.number, peer.pid, peer.rank, step, body, peer.link.send)

    def _greet(self, peer: _Peer, hello: dict[str, Any]) -> None:
        """Record who connected, claims beside facts, and answer with the welcome."""
        if peer.hello is not None:
            self._add("malformed", {"process": peer.number, "reason": "second hello"}, pid=peer.pid)
            return
        for other in list(self._peers.values()):
            if other is not peer and other.pid == peer.pid:
                self._read(other)  # a connection that exec closed is read to its end before the next one counts
        peer.hello = hello
        peer.rank = _rank(hello)
        facts = processes.facts(peer.pid)
        peer.start_ticks, peer.image = facts["start_ticks"], processes.image_of(peer.pid)
        self._memory.watch(peer.pid)
        self._outside.met(peer.pid, peer.number, peer.start_ticks, hello)
        body = {"hello": hello, **facts, "of_the_job": processes.descends_from(peer.pid, os.getpid())}
        if peer.rank is not None and hello.get("forked_from") is None:
            body["environment"] = processes.environment(peer.pid)
        self._add("process", body, process=peer.number, pid=peer.pid, uid=peer.uid, rank=peer.rank)
        welcome = {name: getattr(self.settings, name) for name in Settings.__dataclass_fields__}
        try:
            more = {"process": peer.number, "ledger": self._ledger.listener is not None}
            peer.link.send(json.dumps(welcome | more).encode())
        except OSError:
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        if self._peers.pop(peer.link.fileno(), None) is None:
            return
        self._selector.unregister(peer.link)
        self._outside.lost(peer.pid)
        peer.link.close()
        self._stalls.gone(peer.number)
        self._take_signals()  # what ended it was told before it ended
        body: dict[str, Any] = {"said_bye": peer.said_bye, "frames": peer.next_seq, "greeted": peer.hello is not None}
        ended = body["ended"] = endings.ending(peer.pid, peer.start_ticks, peer.pidfd)
        if ended is None and peer.hello is not None:
            self._unheard.add(peer.pid, peer.start_ticks, peer.image, number=peer.number, said_bye=peer.said_bye)
        if peer.pidfd is not None:
            os.close(peer.pidfd)
        if ended is not None and ended["signal"] is not None:
            body["out_of_memory"] = self._memory.killed()
            self._wait_for_node()
        self._pids.discard(peer.pid)
        self._add("exit", body, process=peer.number, pid=peer.pid, uid=peer.uid, rank=peer.rank)

    def _wait_for_node(self) -> None:
        """The node's ledger tells of a signal a moment after it was sent: hear it before its target is forgotten."""
        if self._node is not None:
            select.select([self._node], [], [], NODE_SECONDS)
        self._take_outside()

    def _add(self, kind: str, body: dict[str, Any], **fields: Any) -> None:
        self.recorder.add(kind, body, **fields)
        self._records += 1


@contextlib.contextmanager
def blocked_signals() -> Iterator[set[int]]:
    """Block FORWARDED here and in threads started within: they wait for `_forward_signals`. Yields the old mask."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        yield {int(number) for number in previous}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start(command: Sequence[str], env: Mapping[str, str], mask: Iterable[int]) -> int:
    """The command's pid. It gets `mask`, and the default for the signals Python itself ignores."""
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]
    try:
        return os.posix_spawnp(command[0], list(command), dict(env), setsigmask=list(mask), setsigdef=ignored)
    except FileNotFoundError as error:
        raise Misuse(f"{command[0]}: no such command", next_step="check its spelling and PATH") from error
    except PermissionError as error:
        raise Misuse(f"{command[0]}: not executable", next_step="name an interpreter, such as: python FILE") from error
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOEXEC:
            raise Misuse(
                f"{command[0]}: not a program: expected a binary or a script that begins with '#!'",
                next_step=f"name its interpreter, such as: sh {command[0]}",
            ) from error
        raise Unavailable(f"{command[0]}: cannot be started: {error}") from error


def _written(path: Path) -> int:
    """When the file's content was last changed, ns; now where it is gone again."""
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return time.time_ns()


def _over(child: int) -> bool:
    """Whether the command has ended. Its filter goes a moment before it can be waited for, and the keeper with it."""
    deadline = time.monotonic() + 1.0
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _rank(hello: Mapping[str, Any]) -> int | None:
    env = hello.get("env")
    text = env.get("RANK") if isinstance(env, dict) else None
    return int(text) if isinstance(text, str) and text.isdigit() and len(text) < 8 else None


def _children_cpu_ns() -> int:
    usage = os.times()
    return int((usage.children_user + usage.children_system) * 1e9)
