"""Check *kills*: who ended what, from the kill ledger, and whether it was theirs to end (F8, B8, G7).

For every signal that one process of the job sends to another, the ledger names both (docs/checks/kills.md). Honest by
kinship: a process may signal itself and what descends from it (launchers, agents, loaders, `timeout`, shells), also
through a shell or a tool such as /bin/kill that it started. A rank ended by anything else is a finding.

For every guarded process that a signal ended it says by whom: a process of the job, the kernel for want of memory, the
kernel for a fault of the process itself, or somebody outside the job, whom this ledger does not see. Only the first is
ever an accusation, and its subject is a process and an account. How often such ends happen by nature is stated beside.
"""

from __future__ import annotations

import math
import re
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, Literal

from msgspec.structs import replace

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.processes import signal_name
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Subject

BASE_RATE_PER_GPU_DAY = 419 / (54 * 16_384)
"""Interruptions nobody intended: 419 in 54 days on 16,384 GPUs (Llama 3, section 3.3.4)."""

HARMLESS = frozenset({0, 10, 12, 17, 18, 23, 28}) | frozenset(range(32, 65))
"""SIGUSR1/2, SIGCHLD, SIGCONT, SIGURG, SIGWINCH and real-time signals: messages, not ends."""

FAULTS = frozenset({4, 5, 7, 8, 11, 31})
"""SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS: the kernel raises them for what the process itself did."""

SIGKILL = 9

SCHEDULERS = {
    "slurmstepd": "Slurm",
    "slurmd": "Slurm",
    "srun": "Slurm",
    "containerd-shim": "the container engine",
    "containerd-shim-runc-v2": "the container engine",
    "dockerd": "the container engine",
    "conmon": "the container engine",
    "runc": "the container engine",
    "crun": "the container engine",
    "tini": "the container's init",
    "dumb-init": "the container's init",
    "docker-init": "the container's init",
    "kubelet": "Kubernetes",
    "systemd": "systemd",
    "pbs_mom": "PBS",
    "sge_shepherd": "Grid Engine",
    "sbatchd": "LSF",
    "condor_starter": "HTCondor",
    "raylet": "Ray",
}
"""Programs that end jobs because they are told to, or because time is up."""

INTERRUPTION_SECONDS = 60
"""Ends of processes closer together than this are one interruption."""

UNEXPLAINED, CHANCE = 3, 1e-3
"""This many ends by unknown senders, this unlikely by nature, are a finding of their own."""

PEER_LOST = re.compile(
    r"connection (closed|reset) by (remote )?peer|remote process exited|broken pipe"
    r"|peer.{0,20}(disconnected|unreachable)|socket.{0,20}(closed|timed? ?out)"
    r"|NCCL.{0,40}(remote|unhandled system) error",
    re.IGNORECASE,
)
"""What a rank says when another one, or its node or network, has gone."""

TOOLS = frozenset(
    {"kill", "pkill", "killall", "killall5", "skill", "fuser", "timeout", "env", "nohup", "setsid", "nice", "xargs"}
    | {"sh", "dash", "bash", "ash", "zsh", "ksh", "busybox", "toybox", "coreutils"}
)
"""Programs that act for whoever started them; the chain of parents is followed through these and no others."""

RAISERS = frozenset({"sudo", "su", "doas", "pkexec", "ping", "fusermount", "fusermount3", "newgrp", "nvidia-modprobe"})
"""Set-user-ID programs that no_new_privs leaves without their rights."""

PLACES_KEPT = 64
NOTES_LIMIT = 50

Kin = Literal["itself", "descendant", "parent", "other"]


@dataclass(slots=True)
class _Process:
    """What the record says of one guarded process."""

    number: int | None
    pid: int
    rank: int | None
    parent: int | None
    start_ticks: int | None
    cmdline: str
    kills: deque[tuple[int, int, str]] = field(default_factory=lambda: deque(maxlen=PLACES_KEPT))
    """(target, signal, place) of its own os.kill calls."""
    lookup: tuple[str, str] | None = None
    """(function, place) of its last look-up through ctypes."""
    spawned: deque[tuple[list[str], str]] = field(default_factory=lambda: deque(maxlen=PLACES_KEPT))
    """(arguments, place) of programs it started."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """One harmful signal that reached a process."""

    signal: int
    kin: Kin
    sender: str
    """The sender in words."""
    started: int
    """When its target began (start ticks): a pid is given again, to a process that nobody signalled."""


class Kills:
    """See the module."""

    name = "kills"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._policy = context.policy
        self._state: str | None = None
        self._raised_barred = False
        self._own: set[int] = set()
        self._supervisor: int | None = None
        self._child: int | None = None
        self._processes: dict[int, _Process] = {}
        self._sent: dict[int, list[_Sent]] = {}
        self._told: set[tuple[Any, ...]] = set()
        self._reached: int | None = None
        """The step that some rank finished last: a signal carries none, and what was saved before it is as it was."""
        self._gone: dict[int, int] = {}
        self._memory = {"group": 0, "host": 0}
        self._world = 1
        self._first: int | None = None
        self._last = 0
        self._held = self._broken = self._interruptions = self._unexplained = 0
        self._interrupted: dict[str, int] = {}
        """Kind of interruption → when the last one was."""
        self._errors: dict[int, dict[str, Any]] = {}
        """pid → the exception it said it ended with."""
        self._failed: list[str] = []
        """Ranks that ended badly, in order, in words."""
        self._node = False
        self._outside: dict[int, list[tuple[int, str, bool]]] = {}
        """Target → (signal, sender in words, whether the kernel itself) that the node's ledger saw."""
        self._pending: list[tuple[Evidence, int, int, str]] = []
        """Ends whose sender the node's ledger may still name: (record, pid, signal, subject)."""
        self._notes: list[str] = []
        self._explained: list[str] = []
        self._required = False
        self._forwarded: Evidence | None = None
        self._stopped = False
        """The guard ended the job itself."""

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        self._first = evidence.at if self._first is None else self._first
        self._last = evidence.at
        if evidence.kind == "step":
            self._reached = evidence.step
        inside = evidence.kind in ("kill", "foreign", "spawn", "bye")
        handler = getattr(self, f"_see_{evidence.kind}", None)
        if handler is not None and (evidence.source == "process") == inside:
            yield from handler(evidence)

    # -- who is who ------------------------------------------------------------------------------------------------

    def _see_ledger(self, evidence: Evidence) -> Iterator[Finding]:
        body = evidence.body
        self._own |= {pid for pid in (body.get("keeper"), body.get("next")) if isinstance(pid, int)}
        if body.get("state") == "keeper lost":
            self._note("the ledger's keeper was ended; the supervisor answered in its place")
            return
        self._state = str(body.get("state"))
        self._supervisor, self._child = _number(body.get("supervisor")), _number(body.get("child"))
        self._raised_barred = body.get("no_new_privs") is True
        if self._state == "off":
            self._note("the kill ledger is off (policy: kills = off): only Python's own os.kill is seen")
        elif self._state != "on":
            self._note(f"no kill ledger here: {body.get('reason')}; only Python's own os.kill is seen")
            if body.get("deny") is True:
                self._required = True
                self._note(
                    "deny-signals was asked for and could not be enforced: signals between strangers went through"
                )
        yield from ()

    def _see_process(self, evidence: Evidence) -> Iterator[Finding]:
        if evidence.pid is None:
            return
        hello = evidence.body.get("hello")
        env = hello.get("env") if isinstance(hello, dict) else None
        world = env.get("WORLD_SIZE") if isinstance(env, dict) else None
        if isinstance(world, str) and world.isdigit() and len(world) < 8:
            self._world = max(self._world, int(world))
        started = _number(evidence.body.get("start_ticks"))
        self._processes[evidence.pid] = _Process(
            number=evidence.process,
            pid=evidence.pid,
            rank=evidence.rank,
            parent=_number(evidence.body.get("ppid")),
            start_ticks=started,
            cmdline=_words(evidence.body.get("cmdline")),
        )
        # A process may be signalled, and gone, before its hello is read. What an earlier owner of the pid was sent is
        # forgotten.
        sent = self._sent.get(evidence.pid, [])
        self._sent[evidence.pid] = [each for each in sent if started in (None, each.started)]
        self._gone.pop(evidence.pid, None)
        yield from ()

    def _see_kill(self, evidence: Evidence) -> Iterator[Finding]:
        target, number, place = (evidence.body.get(name) for name in ("pid", "signal", "place"))
        process = self._by_number(evidence)
        if process is None or not isinstance(target, int) or not isinstance(number, int):
            return
        process.kills.append((target, number, place if isinstance(place, str) else ""))
        if self._state != "on" and number not in HARMLESS and target in self._processes:
            yield from self._judge(evidence, "kill", number, self._known(process.pid), self._known(target))

    def _see_foreign(self, evidence: Evidence) -> Iterator[Finding]:
        name, place = evidence.body.get("name"), evidence.body.get("place")
        process = self._by_number(evidence)
        if process is not None and isinstance(name, str) and isinstance(place, str):
            process.lookup = (name[:40], place)
        yield from ()

    def _see_spawn(self, evidence: Evidence) -> Iterator[Finding]:
        arguments, place = evidence.body.get("args"), evidence.body.get("place")
        process = self._by_number(evidence)
        if process is None or not isinstance(arguments, list):
            return
        words = [str(word) for word in arguments]
        process.spawned.append((words, place if isinstance(place, str) else ""))
        program = _base(words[0].split(" ")[0]) if words else ""
        if self._raised_barred and program in RAISERS:
            self._note(
                f"process {evidence.pid} started {program}, which cannot raise its rights under the ledger's "
                "no_new_privs; if it fails, set kills = off in the policy"
            )
        yield from ()

    # -- signals ---------------------------------------------------------------------------------------------------

    def _see_signalled(self, evidence: Evidence) -> Iterator[Finding]:
        body = evidence.body
        call, number, sender, targets = (body.get(name) for name in ("call", "signal", "sender", "targets"))
        if (
            not isinstance(sender, dict)
            or not isinstance(sender.get("pid"), int)
            or not isinstance(targets, list)
            or not isinstance(call, str)
        ):
            yield self._finding(evidence, "not_checked", "a ledger entry is not as its specification says")
            return
        if body.get("lost"):
            self._note(f"{body['lost']} ledger entries were lost while nobody read them")
        if call in ("ptrace", "process_vm_writev", "prlimit64"):
            number = None
        elif not isinstance(number, int) or number in HARMLESS:
            self._held += 1
            return
        for target in targets:
            if isinstance(target, dict) and isinstance(target.get("pid"), int):
                yield from self._judge(evidence, call, number, sender, target)
        if body.get("target") == -1:
            message = f"{self._who(sender)} sent {signal_name(number or 0)} to every process it may signal"
            yield from self._accuse(evidence, "violated", message, sender, number, -1, ("F8",))

    def _judge(
        self, evidence: Evidence, call: str, number: int | None, sender: dict[str, Any], target: dict[str, Any]
    ) -> Iterator[Finding]:
        """One sender, one target."""
        pid = target["pid"]
        kin = self._kin(sender, target)
        refused = evidence.body.get("denied") is True
        started = _number(target.get("start_ticks"))
        if number is not None and started is not None and not refused:
            self._sent.setdefault(pid, []).append(_Sent(number, kin, self._who(sender), started))
        guarded = self._guarded(target)
        if kin in ("itself", "descendant") or not (guarded or pid == self._child or pid in self._guard_pids()):
            self._held += 1
            return
        key = (sender.get("pid"), sender.get("start_ticks"), pid, call, number)
        if key in self._told or len(self._told) > 10_000:
            return
        self._told.add(key)
        message = f"{self._who(sender)} {_did(call, number)} {self._whom(target)}"
        if refused:
            message += "; it was refused and not delivered (--enforce deny-signals)"
        if pid in self._guard_pids():
            message += ", a process of the guard"
            yield from self._accuse(evidence, "suspicious", message, sender, number, pid, ("G7", "F8"))
        elif number is None:
            techniques = ("F8",) if call == "prlimit64" else ("B8", "F8")
            yield from self._accuse(evidence, "suspicious", message, sender, number, pid, techniques)
        else:
            outcome = self._weight(kin, sender, guarded)
            if kin == "parent":
                message += ", its own parent (a watchdog does this; approve it if it is one)"
            yield from self._accuse(evidence, outcome, message, sender, number, pid, ("F8",))

    def _weight(self, kin: Kin, sender: dict[str, Any], guarded: _Process | None) -> Literal["violated", "suspicious"]:
        """Proved when a rank or the command was hit by a stranger; open within the helpers of one rank."""
        if kin == "parent":
            return "suspicious"
        own = self._processes.get(sender.get("pid", -1))
        helper = guarded is not None and guarded.pid != self._child and guarded.rank is None
        same_rank = own is not None and guarded is not None and own.rank is not None and own.rank == guarded.rank
        return "suspicious" if helper or same_rank else "violated"

    def _accuse(
        self,
        evidence: Evidence,
        outcome: Literal["violated", "suspicious"],
        message: str,
        sender: dict[str, Any],
        number: int | None,
        target: int,
        techniques: tuple[str, ...],
    ) -> Iterator[Finding]:
        place, how = self._place(sender, number, target)
        if place is not None and self._policy.approves(self.name, place):
            self._explained.append(place)
            return
        own = self._processes.get(target)
        finding = finding_from(
            self.name,
            outcome,
            message + (f"; {how} {place}" if place else ""),
            evidence,
            run=self._run,
            techniques=techniques,
            path=place,
            step=self._reached,
            expected="signals to a process of the job only from itself, its launcher or what started it",
            found=_account(sender),
        )
        rank = own.rank if own is not None else None
        self._broken += 1
        yield replace(finding, subject=replace(finding.subject, rank=rank))

    def _kin(self, sender: dict[str, Any], target: dict[str, Any]) -> Kin:
        """How the target is related to the sender, following tools and shells up to who started them."""
        if sender.get("pid") == target.get("pid"):
            return "itself"
        above = self._above(target)
        line = _line(sender)
        for pid, name in [(sender.get("pid"), _base(sender.get("exe") or sender.get("comm"))), *line]:
            if pid == self._supervisor:
                break
            if pid in above or pid == target.get("pid"):
                return "descendant"
            if pid in self._processes or name not in TOOLS:
                break
        return "parent" if target.get("pid") in {pid for pid, _ in line} else "other"

    def _above(self, target: dict[str, Any]) -> set[int]:
        """Parents of the target, now and when it said hello; those end, and it is then given to the supervisor."""
        above = {pid for pid, _ in _line(target)}
        current = self._processes.get(target["pid"])
        while current is not None and current.parent is not None and current.parent not in above:
            above.add(current.parent)
            current = self._processes.get(current.parent)
        return above - {self._supervisor}

    def _place(self, sender: dict[str, Any], number: int | None, target: int) -> tuple[str | None, str]:
        """The line that sent it, as well as it is known, and in which words."""
        own = self._processes.get(sender.get("pid", -1))
        if own is not None:
            for pid, sent, place in reversed(own.kills):
                if sent == number and place and pid in (target, 0, *_groups(pid, target)):
                    return place, "called at"
            if own.lookup is not None:
                return own.lookup[1], f"the C library's {own.lookup[0]} was looked up at"
            return _script(sender), "its script is"
        chain = [(sender.get("pid"), sender.get("cmdline") or [])]
        chain += [(entry[0], entry[3]) for entry in _entries(sender)]
        for (_, words), (above, _) in pairwise(chain):
            starter = self._processes.get(above) if isinstance(above, int) else None
            for arguments, place in reversed(starter.spawned if starter is not None else ()):
                if place and (arguments[:4] == list(words)[:4] or arguments[0] == (words or [""])[-1]):
                    return place, "started at"
            if starter is not None:
                break
        return _script(sender), "its script is"

    # -- ends ------------------------------------------------------------------------------------------------------

    def _see_signal(self, evidence: Evidence) -> Iterator[Finding]:
        self._forwarded = evidence
        yield from ()

    def _see_enforced(self, evidence: Evidence) -> Iterator[Finding]:
        self._stopped = True
        yield from ()

    def _see_bye(self, evidence: Evidence) -> Iterator[Finding]:
        error = evidence.body.get("error")
        if isinstance(error, dict) and evidence.pid is not None and len(self._errors) < 4096:
            self._errors[evidence.pid] = error
        yield from ()

    def _see_exit(self, evidence: Evidence) -> Iterator[Finding]:
        ended = evidence.body.get("ended")
        pid = evidence.pid
        if pid is None or pid == self._child:
            return
        if not isinstance(ended, dict):  # it said goodbye and the kernel does not tell its status yet
            if evidence.rank is not None and pid in self._errors:
                self._gone[pid] = evidence.at
                self._left(evidence, f"process {pid}, rank {evidence.rank}", None)
            return
        number = ended.get("signal")
        self._gone[pid] = evidence.at
        rank = f", rank {evidence.rank}" if evidence.rank is not None else ""
        subject = f"process {pid}{rank}"
        if not isinstance(number, int):
            self._held += 1
            if evidence.rank is not None and ended.get("status") not in (0, None):
                self._left(evidence, subject, ended["status"])
            return
        process = self._processes.get(pid)
        cause, kind = self._cause(pid, number, evidence)
        if kind == "open" and process is not None and process.parent in self._gone:
            cause, kind = f"by {signal_name(number)} after its parent had ended", "known"
        if kind == "kin":
            self._held += 1
            if evidence.rank is not None and self._failed and number in (signal.SIGTERM, SIGKILL):
                self._note(f"{subject} was ended {cause} after {self._failed[0]} had failed")
            return
        self._fail(evidence, subject)
        if kind == "open" and self._node:
            self._pending.append((evidence, pid, number, subject))
            return
        yield from self._open_end(evidence, number, subject, cause, kind)

    def _open_end(self, evidence: Evidence, number: int, subject: str, cause: str, kind: str) -> Iterator[Finding]:
        self._note(f"{subject} was ended {cause}")
        if kind == "open" and number == SIGKILL:
            self._unexplained += self._is_new("unexplained", evidence.at)
            yield self._finding(evidence, "not_checked", f"{subject} was ended {cause}")

    def _left(self, evidence: Evidence, subject: str, status: object) -> None:
        """A rank left by itself with an error: its own doing, or the consequence of another's end."""
        error = self._errors.get(evidence.pid or -1, {})
        text = str(error.get("text"))[:160]
        told = f": {error.get('type')} at {error.get('place')}: {text}" if error else ""
        how = "" if status is None else f" with status {status}"
        message = f"{subject} ended by itself{how}{told[:400]}"
        if error and PEER_LOST.search(text) is not None:
            message += (
                f"; it lost a peer after {self._failed[0]} had failed"
                if self._failed
                else "; it lost a peer outside this host: a node or its network went away"
            )
        self._fail(evidence, subject)
        self._interruptions += self._is_new("all", evidence.at)
        self._note(message)

    def _fail(self, evidence: Evidence, subject: str) -> None:
        if evidence.rank is not None and len(self._failed) < 64:
            self._failed.append(subject)

    def _is_new(self, kind: str, at: int) -> bool:
        """Whether an end belongs to no interruption so far: the ranks of a job end together."""
        last = self._interrupted.get(kind)
        self._interrupted[kind] = at
        return last is None or at - last > INTERRUPTION_SECONDS * 1_000_000_000

    # -- the node's ledger -----------------------------------------------------------------------------------------

    def _see_node(self, evidence: Evidence) -> Iterator[Finding]:
        self._node = evidence.body.get("state") == "on"
        yield from ()

    def _see_outside(self, evidence: Evidence) -> Iterator[Finding]:
        """A signal to a process of the job, as the kernel's trace on this node tells it."""
        body = evidence.body
        target, number, sender = body.get("target"), body.get("signal"), body.get("sender")
        if not isinstance(target, int) or not isinstance(number, int) or not isinstance(sender, dict):
            yield self._finding(
                evidence, "not_checked", "an entry of the node's ledger is not as its specification says"
            )
            return
        if number in HARMLESS or not (target in self._processes or target == self._child):
            return
        by = sender.get("pid")
        told = any(sent.signal == number for sent in self._sent.get(target, ()))
        if by in self._guard_pids() or by == target or (told and self._state == "on"):
            return  # passed on by us, by itself, or known from the job's own ledger
        kernel = body.get("kernel") is True
        who = "the kernel" if kernel else self._who(sender) + _login(sender)
        self._outside.setdefault(target, []).append((number, who, kernel))
        if kernel or by in self._processes:
            return
        scheduler = SCHEDULERS.get(_base(sender.get("exe") or sender.get("comm")))
        message = f"{who}, outside the job, sent {signal_name(number)} to {self._whom({'pid': target})}"
        if scheduler is not None:
            self._note(f"{message}: {scheduler} ended it")
            return
        yield from self._accuse(evidence, "suspicious", message, sender, number, target, ("F8",))

    def _settle(self) -> Iterator[Finding]:
        """Ends that waited for the node's ledger."""
        for evidence, pid, number, subject in self._pending:
            seen = [(who, kernel) for sent, who, kernel in self._outside.get(pid, ()) if sent == number]
            name = signal_name(number)
            if seen:
                who, kernel = seen[-1]
                cause = (
                    f"by {name}, raised by the kernel" if kernel else f"by {name}, sent from outside the job by {who}"
                )
                yield from self._open_end(evidence, number, subject, cause, "known")
            else:
                cause = f"by {name}; the node's ledger was on and saw no sender"
                yield from self._open_end(evidence, number, subject, cause, "open")
        self._pending = []

    def _see_end(self, evidence: Evidence) -> Iterator[Finding]:
        number = evidence.body.get("signal")
        if isinstance(number, int):
            pid = self._child if self._child is not None else -1
            cause, kind = self._cause(pid, number, evidence)
            self._required = True
            seen = [who for sent, who, _ in self._outside.get(pid, ()) if sent == number]
            if kind == "open" and seen:
                cause = f"by {signal_name(number)}, sent from outside the job by {seen[-1]}"
            self._note(f"the command was ended {cause}")
        yield from ()

    def _cause(self, pid: int, number: int, evidence: Evidence) -> tuple[str, Literal["kin", "known", "open"]]:
        """By what a process ended, in words; kin: by itself or its own; open: by whom is not known."""
        name = signal_name(number)
        memory = self._out_of_memory(evidence)
        sent = next((s for s in reversed(self._sent.get(pid, [])) if s.signal == number), None)
        if sent is not None and sent.kin in ("itself", "descendant"):
            return f"by {name}, sent by {'itself' if sent.kin == 'itself' else sent.sender}", "kin"
        if self._stopped and number in (signal.SIGTERM, SIGKILL):
            return f"by {name}, sent by the guard (--enforce stop)", "known"
        forwarded = self._forwarded
        if pid == self._child and forwarded is not None and forwarded.body.get("signal") == number:
            return f"by {name}, sent to the supervisor by {_forwarder(forwarded.body)}", "known"
        self._interruptions += self._is_new("all", evidence.at)
        if sent is not None:
            return f"by {name}, sent by {sent.sender}", "known"
        if number in FAULTS:
            return f"by {name}: a crash, raised by the kernel for what the process itself did", "known"
        if number == SIGKILL and self._is_named(pid, evidence):
            return f"by {name}: the kernel's log says that it ended this process because memory ran out", "known"
        if number == SIGKILL and memory is not None:
            return f"by {name}: {memory}", "known"
        if self._state == "on":
            return (
                f"by {name}, whose sender is outside the job or is the kernel; this ledger does not see those",
                "open",
            )
        return f"by {name}; who sent it is not known: there is no ledger in this job", "open"

    def _is_named(self, pid: int, evidence: Evidence) -> bool:
        told = evidence.body.get("out_of_memory")
        named = told.get("named") if isinstance(told, dict) else None
        return isinstance(named, list) and pid in named[:1000]

    def _out_of_memory(self, evidence: Evidence) -> str | None:
        """What the counters say happened since they were last looked at."""
        told = evidence.body.get("out_of_memory")
        if not isinstance(told, dict):
            return None
        new = {name: _number(told.get(name)) or 0 for name in self._memory}
        before, self._memory = self._memory, new
        if new["group"] > before["group"]:
            return "the kernel ended it because the job's control group was out of memory"
        if new["host"] > before["host"]:
            return "the kernel ended a process at that time because the host was out of memory"
        return None

    # -- the balance -----------------------------------------------------------------------------------------------

    def end(self) -> Iterator[Finding | LinkState]:
        yield from self._settle()
        if self._state is None:
            self._note("this record has no kill ledger")
        if self._interruptions:
            self._note(self._rate(self._interruptions, "interruption(s)"))
        if self._unexplained >= UNEXPLAINED and _at_least(self._unexplained, self._expected()) < CHANCE:
            self._broken += 1
            yield Finding(
                check=self.name,
                outcome="suspicious",
                techniques=("F8",),
                subject=Subject(run=self._run),
                message=self._rate(self._unexplained, "ends by SIGKILL whose sender is not known"),
            )
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(self._notes),
            explained=tuple(dict.fromkeys(self._explained)),
            required=self._required,
        )

    def _expected(self) -> float:
        """Interruptions that nature brings in this run."""
        first = self._last if self._first is None else self._first
        return BASE_RATE_PER_GPU_DAY * self._world * (self._last - first) / 86_400e9

    def _rate(self, count: int, what: str) -> str:
        """Interruptions beside what nature brings, and what that is worth."""
        expected = self._expected()
        days = expected / BASE_RATE_PER_GPU_DAY
        chance = _at_least(count, expected)
        worth = "within what nature brings"
        if chance < 0.05 and count == 1:
            worth = "rare, but one event shows nothing"
        elif chance < 0.05 and expected:
            worth = f"{count / expected:.2g} times the natural rate: suspicious, not proof"
        return (
            f"{count} {what} in {days:.2g} device-days; by nature {expected:.1g} are expected "
            f"(419 in 54 days on 16,384 GPUs), so this many or more by chance: {chance:.1g}; {worth}"
        )

    # -- words -----------------------------------------------------------------------------------------------------

    def _who(self, sender: dict[str, Any]) -> str:
        pid = sender.get("pid")
        own = self._processes.get(pid) if isinstance(pid, int) else None
        rank = f", rank {own.rank}" if own is not None and own.rank is not None else ""
        return (
            f"process {pid}{rank} of account {_account(sender)} ({_words(sender.get('cmdline')) or 'command unknown'})"
        )

    def _whom(self, target: dict[str, Any]) -> str:
        own = self._processes.get(target["pid"])
        if own is not None and own.rank is not None:
            return f"process {target['pid']}, rank {own.rank} of the job"
        return f"process {target['pid']}" + (", the command itself" if target["pid"] == self._child else " of the job")

    def _guarded(self, target: dict[str, Any]) -> _Process | None:
        own = self._processes.get(target["pid"])
        ticks = target.get("start_ticks")
        return own if own is not None and (ticks is None or own.start_ticks in (None, ticks)) else None

    def _guard_pids(self) -> set[int]:
        return self._own | ({self._supervisor} if self._supervisor is not None else set())

    def _known(self, pid: int) -> dict[str, Any]:
        """Facts of a guarded process as the ledger would give them, from its hello."""
        own = self._processes[pid]
        return {"pid": pid, "start_ticks": own.start_ticks, "cmdline": [own.cmdline], "exe": "python", "ancestry": []}

    def _by_number(self, evidence: Evidence) -> _Process | None:
        return self._processes.get(evidence.pid) if evidence.pid is not None else None

    def _note(self, text: str) -> None:
        if text not in self._notes and len(self._notes) < NOTES_LIMIT:
            self._notes.append(text)

    def _finding(self, evidence: Evidence, outcome: Any, message: str) -> Finding:
        return finding_from(self.name, outcome, message, evidence, run=self._run)


def _did(call: str, number: int | None) -> str:
    if call == "ptrace":
        return "attached to, or wrote through ptrace into,"
    if call == "process_vm_writev":
        return "wrote into the memory of"
    if call == "prlimit64":
        return "set a resource limit of"
    return f"sent {signal_name(number or 0)} to"


def _account(sender: dict[str, Any]) -> str:
    uid, euid = sender.get("uid"), sender.get("euid")
    return f"{uid}" + (f" acting as {euid}" if euid not in (None, uid) else "")


def _forwarder(body: dict[str, Any]) -> str:
    sender = body.get("sender")
    words = _words(sender.get("cmdline")) if isinstance(sender, dict) else ""
    if body.get("from_pid") == 0:
        return "a process that is not visible from here (the container engine or the scheduler outside this container)"
    exe = sender.get("exe") if isinstance(sender, dict) else None
    scheduler = SCHEDULERS.get(_base(exe or words.split(" ")[0].rstrip(":")))
    who = f"process {body.get('from_pid')} of account {body.get('from_uid')}" + (f" ({words})" if words else "")
    return f"{scheduler}, {who}" if scheduler is not None else who


def _login(sender: dict[str, Any]) -> str:
    """The audit account and session of a sender, where the kernel keeps them."""
    parts = [f"{label} {sender[key]}" for key, label in (("loginuid", "logged in as"), ("session", "session"))
             if isinstance(sender.get(key), int) and sender[key] < 4294967295]  # fmt: skip
    return f" ({', '.join(parts)})" if parts else ""


def _entries(facts: dict[str, Any]) -> list[list[Any]]:
    chain = facts.get("ancestry")
    return [e for e in chain if isinstance(e, list) and len(e) == 4] if isinstance(chain, list) else []


def _line(facts: dict[str, Any]) -> list[tuple[int, str]]:
    return [(entry[0], str(entry[2])) for entry in _entries(facts) if isinstance(entry[0], int)]


def _groups(given: int, target: int) -> tuple[int, ...]:
    return (target,) if given < 0 else ()


def _script(sender: dict[str, Any]) -> str | None:
    """The file a sender runs, from its command line: the first word that is not an option; None for `-c` and `-m`."""
    words = sender.get("cmdline")
    if not isinstance(words, list):
        return None
    for word in words[1:]:
        if not isinstance(word, str) or word in ("-c", "-m"):
            return None
        if not word.startswith("-"):
            name = _base(sender.get("exe") or "")
            is_script = name.startswith(("python", "pypy")) or word.endswith((".py", ".sh"))
            return str(PurePosixPath(str(sender.get("cwd") or ""), word)) if is_script else None
    return None


def _at_least(count: int, expected: float) -> float:
    """Chance of `count` or more events where `expected` are expected, independent of each other (Poisson)."""
    below = (
        sum(math.exp(-expected + k * math.log(expected) - math.lgamma(k + 1)) for k in range(count)) if expected else 1
    )
    if expected and below > 1 - 1e-9:  # far tail: the first term carries it
        return math.exp(count * math.log(expected) - math.lgamma(count + 1))
    return max(0.0, 1 - below)


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _base(path: object) -> str:
    return PurePosixPath(str(path)).name


def _words(value: object) -> str:
    return " ".join(str(word) for word in value)[:200].replace("\n", " ") if isinstance(value, list) else ""
