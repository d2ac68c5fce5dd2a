"""Check *processes*: every interpreter of the job is known, spoke without gaps, and the record has an end.

Silence is a finding: a Python child without a hello (G4), a frame that never arrived (G4), a process that goes on after
its connection closed (G7), a supervisor that stopped writing (G7). So are two voices from one process (G11), and parts
of the guard that could not be loaded (G6). How processes ended, and who ended them, is for check *kills*.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.ranks import member_of
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState

ISOLATING_FLAGS = frozenset("IES")
"""`python -I`, `-E` and `-S` (also combined, such as `-Is`) keep our boot file from running."""

PARTS_LIMIT = 64


MAY_CHANGE = frozenset(("WORLD_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"))
"""Variables that follow from how many ranks and processors an attempt has."""


class Processes:
    """See the module."""

    name = "processes"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._heartbeat_ns = int(context.policy.heartbeat_seconds * 1e9)
        self._greeted = 0
        self._broken = 0
        self._blind: list[str] = []
        self._last: Evidence | None = None
        self._beating = False
        """Whether the supervisor is at work: before it, measuring takes its time; after it, sealing does."""
        self._ended = False
        self._stopped_at: dict[int, int] = {}
        self._open: dict[int, int | None] = {}
        """Pid of every connected process → its number."""
        self._restarts = _Restarts()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        late = self._last is not None and evidence.at - self._last.at > 2 * self._heartbeat_ns
        if self._last is not None and late and self._beating:
            yield from self._silence(self._last, evidence)
        self._last = evidence
        self._beating = (self._beating or evidence.kind == "ledger") and evidence.kind != "end"
        handler = getattr(self, f"_see_{evidence.kind}", None)
        if handler is not None:
            yield from handler(evidence)

    def _see_process(self, evidence: Evidence) -> Iterator[Finding]:
        self._greeted += 1
        if evidence.body.get("of_the_job") is not True:
            yield self._finding(
                evidence,
                f"process {evidence.pid} of account {evidence.uid} reported as part of the job but does not descend "
                "from it",
                techniques=("G4", "G11"),
            )

        if evidence.pid is not None:
            first = self._open.setdefault(evidence.pid, evidence.process)
            if first != evidence.process:
                yield self._finding(
                    evidence,
                    f"process {evidence.pid} opened a second connection to the guard while its first, number {first}, "
                    "was open: frames of its own making can come by it (or a second interpreter was started inside it)",
                    techniques=("G4", "G11"),
                    expected="one connection of one interpreter",
                )
        for text, record, expected, found in self._restarts.see(evidence):
            yield self._finding(record, text, techniques=("F10", "A10"), expected=expected, found=found)

    def _see_exit(self, evidence: Evidence) -> Iterator[Finding]:
        if evidence.pid is not None and self._open.get(evidence.pid) == evidence.process:
            del self._open[evidence.pid]
        yield from ()

    def _see_unheard(self, evidence: Evidence) -> Iterator[Finding]:
        said = "after saying goodbye" if evidence.body.get("said_bye") is True else "without a word"
        yield self._finding(
            evidence,
            f"process {evidence.pid} closed its connection to the guard {said} and went on for "
            f"{evidence.body.get('seconds')} s, using {evidence.body.get('cpu_seconds')} s of processor time: what it "
            "did then is not known (code that closes every open file does this too)",
            techniques=("G7", "G4"),
            expected="a connection as long as the process lives",
        )

    def _see_boot(self, evidence: Evidence) -> Iterator[Finding]:
        failed = evidence.body.get("failed")
        for part, reason in list(failed.items())[:PARTS_LIMIT] if isinstance(failed, dict) else ():
            message = (
                f"process {evidence.pid}: part {str(part)[:60]} of the guard could not be loaded: {str(reason)[:300]}"
            )
            self._blind.append(message)
            yield self._finding(evidence, message, outcome="not_checked", techniques=("G6", "G7"))

    def _see_measurement(self, evidence: Evidence) -> Iterator[Finding]:
        attempt = evidence.body.get("attempt")
        self._restarts.measured.add(attempt if isinstance(attempt, int) else 0)
        yield from ()

    def _see_unmeasured(self, evidence: Evidence) -> Iterator[Finding]:
        yield from self._see_measurement(evidence)  # said by check environment

    def _see_silent(self, evidence: Evidence) -> Iterator[Finding]:
        command = _words(evidence.body.get("cmdline"))
        yield self._finding(
            evidence,
            f"Python process {evidence.pid} of the job never reported to the guard: {command or 'command unknown'}",
            techniques=("G4", "G7"),
            expected="a hello from every interpreter of the job",
            found="none",
        )

    def _see_spawn(self, evidence: Evidence) -> Iterator[Finding]:
        reason = _unguarded(evidence.body)
        if reason is not None:
            place = evidence.body.get("place")
            yield self._finding(
                evidence,
                f"process {evidence.pid} started a Python interpreter that the guard cannot enter ({reason}): "
                f"{_words(evidence.body.get('args'))}",
                techniques=("G4", "G7"),
                path=place if isinstance(place, str) else None,
            )

    def _see_gap(self, evidence: Evidence) -> Iterator[Finding]:
        lost = evidence.body.get("lost")
        if isinstance(lost, int):
            message = f"{lost} records could not be stored: {evidence.body.get('reason')}"
        else:
            expected, found = evidence.body.get("expected_seq"), evidence.body.get("found_seq")
            message = f"process {evidence.pid}: frames {expected} to {found} (exclusive) never arrived"
        self._blind.append(message)
        yield self._finding(evidence, message, outcome="not_checked")

    def _see_malformed(self, evidence: Evidence) -> Iterator[Finding]:
        yield self._finding(
            evidence,
            f"process {evidence.pid} sent a message that is not a frame",
            techniques=("G4", "G7"),
        )

    def _see_refused(self, evidence: Evidence) -> Iterator[Finding]:
        yield self._finding(evidence, f"a connection was refused: {evidence.body.get('reason')}", techniques=("G4",))

    def _see_note(self, evidence: Evidence) -> Iterator[Finding]:
        fault = evidence.body.get("fault")
        if isinstance(fault, str):
            self._blind.append(f"process {evidence.pid}: a check failed inside the guard ({fault[:120]})")
        yield from ()

    def _see_bye(self, evidence: Evidence) -> Iterator[Finding]:
        dropped = evidence.body.get("dropped")
        if isinstance(dropped, int) and dropped > 0:
            self._blind.append(f"process {evidence.pid}: {dropped} frames were dropped while nobody read them")
        yield from ()

    def _see_end(self, evidence: Evidence) -> Iterator[Finding]:
        self._ended = True
        not_started = evidence.body.get("not_started")
        if isinstance(not_started, str):
            self._blind.append(f"the command was not started: {not_started}")
        yield from ()

    def end(self) -> Iterator[Finding | LinkState]:
        if not self._ended and self._last is not None:
            yield self._finding(
                self._last,
                "the record stops without an end: the supervisor or its host went away, and what the command did "
                "afterwards is not known",
                techniques=("G7", "G4"),
                expected="an end record",
                found=f"record {self._last.n} ({self._last.kind}) is the last",
            )
        for attempt, record in self._restarts.unmeasured():
            message = f"the job was started again (attempt {attempt}) and not measured again before it went on"
            self._blind.append(message)
            yield self._finding(record, message, outcome="not_checked", techniques=("F10",))
        if not self._greeted and not self._blind:
            self._blind.append("no interpreter of the job reported to the guard")
        yield LinkState(link=self.name, held=self._greeted, broken=self._broken, blind=tuple(self._blind))

    def _silence(self, before: Evidence, after: Evidence) -> Iterator[Finding]:
        seconds = (after.at - before.at) / 1e9
        yield self._finding(
            after,
            f"nothing was recorded for {seconds:.0f} s: the supervisor was stopped or the machine slept",
            techniques=("G4", "G7"),
            expected=f"a heartbeat every {self._heartbeat_ns / 1e9:.0f} s",
            found=f"{seconds:.0f} s of silence before record {after.n}",
        )

    def _finding(self, evidence: Evidence, message: str, *, outcome: Any = "suspicious", **fields: Any) -> Finding:
        self._broken += outcome != "not_checked"
        return finding_from(self.name, outcome, message, evidence, run=self._run, **fields)


@dataclass(slots=True)
class _Restarts:
    """Attempts of a job that its launcher started again, from the processes of its ranks."""

    first: dict[tuple[int | None, int], tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Launcher, rank → the first attempt it was seen in, and its variables then, as the kernel has them."""
    attempts: dict[int, Evidence] = field(default_factory=dict)
    """Attempt → the first process of it."""
    measured: set[int] = field(default_factory=set)

    def see(self, evidence: Evidence) -> Iterator[tuple[str, Evidence, str | None, str | None]]:
        """What is wrong with the process of a rank: sentence, record, expected, found."""
        member = member_of(evidence)
        if member.rank is None:
            return
        self.attempts.setdefault(member.attempt, evidence)
        variables = evidence.body.get("environment")
        if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
            return
        attempt, before = self.first.setdefault((member.ppid, member.rank), (member.attempt, variables))
        if attempt == member.attempt:
            return
        changed = [n for n in sorted({*before, *variables} - MAY_CHANGE) if before.get(n) != variables.get(n)]
        if not changed:
            return
        self.first[member.ppid, member.rank] = (member.attempt, variables)
        name = changed[0]
        more = f" and {len(changed) - 1} more variables" if len(changed) > 1 else ""
        text = f"rank {member.rank} was started again (attempt {member.attempt}) with another {name}{more} than before"
        yield text, evidence, (before.get(name) or "")[:80] or None, (variables.get(name) or "")[:80] or None

    def unmeasured(self) -> Iterator[tuple[int, Evidence]]:
        """Attempts that nobody measured, of a run whose first one was."""
        if 0 in self.measured:
            yield from ((n, record) for n, record in sorted(self.attempts.items()) if n not in self.measured)


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; `signal 77` for a number without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _unguarded(body: dict[str, Any]) -> str | None:
    """Why the guard cannot enter the interpreter this record says is being started; None where it can."""
    args = body.get("args")
    if not isinstance(args, list) or not args or not all(isinstance(word, str) for word in args):
        return None
    program = str(body.get("program") or args[0]).rsplit("/", 1)[-1]
    if not program.startswith(("python", "pypy")):
        return None
    for word in args[1:]:
        if not word.startswith("-") or word in ("-c", "-m", "-"):
            break
        if not word.startswith("--") and ISOLATING_FLAGS & set(word[1:]):
            return f"option {word}"
    return "an environment without the guard's start-up path" if body.get("guarded_env") is False else None


def _words(value: object) -> str:
    return " ".join(str(word) for word in value)[:300] if isinstance(value, list) else ""
