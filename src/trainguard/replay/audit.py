"""An audit: draw segments, replay them in clean processes, compare, and say what may be concluded (spec/replay.md).

 1. What the run committed to is read from the log's proved records.
 2. A nonce is drawn and bound to the log's tree head, which holds the whole run; it decides the segments.
 3. The verifier proves itself: with a fault planted on the clean side it must fail this very run.
 4. Every segment is a task with an id by content; what is done is kept, so an audit that was killed goes on.
 5. A difference seen after a warp is only believed when a replay from the first step shows it too, and only when two
    such replays agree with each other. Else the warp, or the command, is what cannot be relied on, and that is said.
 6. The outcome is signed into the log. Verdicts are drawn from there (appraise/replay.py).

Nothing here says violated because something could not be done: what is missing, altered or of another build ends as
*not replayed* with its reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainguard.archive import LogLeaves, RunReader
from trainguard.digest import canonical_json, file_sha256, sha256_hex, write_durably
from trainguard.envelope import load_or_create_key, sign_statement, statement
from trainguard.errors import MalformedEvidence, Misuse, TrainguardError, Unavailable, VerificationError
from trainguard.finding import Citation, Finding, Subject
from trainguard.home import Home
from trainguard.lockfile import Lock, Measurement, parse_lock, parse_measurement
from trainguard.log import Log
from trainguard.replay import bisect, compare, plan, points, told
from trainguard.replay.committed import Account, Committed, Point, Step, committed
from trainguard.replay.compare import Difference
from trainguard.replay.environment import Refused, Rule, Wanted, wanted
from trainguard.replay.executors import chosen
from trainguard.replay.executors.local import LocalExecutor
from trainguard.replay.explain import Cause, Search
from trainguard.replay.files import first_altered, kept_files
from trainguard.replay.keys import held_key
from trainguard.replay.launch import alone, of_one_rank, with_python
from trainguard.replay.measured import really_newer
from trainguard.replay.opened import opened_findings, unapproved_findings
from trainguard.replay.plan import Draw
from trainguard.replay.ranks import Odd, odd_ranks
from trainguard.replay.rerun import Ready, Rerun
from trainguard.replay.tasks import Desk, Executor, NotPerformed, Task, explored, settings
from trainguard.replay.tolerance import Reading, matching, parted
from trainguard.replay.tolerant import OtherBuild, Tolerant

PREDICATE = "audit/v1"
SELFTEST_STEPS = 3
STATE_LIMIT_BYTES = 16 << 20
SHORTEST_WARP = 5
"""A point within the first steps saves nothing: replay begins at the first step."""

REMEMBERED_STEPS = 4
"""Steps before the one to be explained that a replay should have made itself (watch/acts.py)."""

EXPLAIN_SECONDS = 300.0
"""For trials of causes, unless the auditor says otherwise."""

PATIENCE_SECONDS = 300.0
SMALLER = (
    ". The run had {} ranks: code that waits for so many does nothing in a run with fewer, so a clean small test run "
    "proves nothing about this one"
)

Progress = Callable[[str], None]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one segment."""

    segment: int
    first: int
    last: int
    outcome: str
    """equal, differs, departs (beyond the tolerance for another build: not proved), or not replayed."""
    way: str
    """`warp` from the sealed point, or `start` from the first step."""
    compared: int = 0
    """Steps of the segment that were compared and equal."""
    seconds: float = 0.0
    difference: Difference | None = None
    after: int | None = None
    """Last step before the difference that was committed to; the act lies after it."""
    odd: Odd | None = None
    """Ranks that did otherwise than the others, where that can be told."""
    confirmed: bool = False
    """Whether two replays from the first step agreed with each other and not with the run."""
    reading: Reading | None = None
    """How far apart, where the replay ran on another build and was compared by tolerance."""
    reason: str | None = None
    """Why it was not replayed, or what the warp could not do."""
    told: tuple[Finding, ...] = ()
    """What the run told of itself otherwise than two clean replays of the whole command (told.py)."""
    cause: Cause | None = None
    """Of a confirmed difference; None where it was not looked for."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One audit, as it is stored and as its statement cites it."""

    run: str
    plan: plan.Plan
    drawn: str
    """The auditor's own random number, hex."""
    head: dict[str, Any]
    """Size and root of the tree head the nonce is bound to."""
    environment: dict[str, Any]
    selftest: dict[str, Any]
    results: tuple[Result, ...]
    findings: tuple[Finding, ...]
    steps: int
    replayed_steps: int
    began_ns: int
    ended_ns: int
    draws: tuple[Draw, ...] = ()
    """Of an audit that followed the run: every segment as it was decided on."""
    calibration: str | None = None
    """Blob of the calibration that tolerance was judged by, where it was."""
    blob: str | None = None
    leaf: int | None = None

    @property
    def exit_status(self) -> int:
        """0 every drawn segment is equal, 1 one differs for certain, 3 something could not be replayed."""
        if any(finding.outcome == "violated" for finding in self.findings):
            return 1
        equal = all(result.outcome == "equal" for result in self.results)
        sure = equal and self.results and self.selftest.get("passed") is True
        return 0 if sure and not self.findings else 3


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to audit."""

    budget: float = 0.01
    confidence: float | None = None
    tampered: float = 0.05
    only: tuple[int, ...] | None = None
    python: str | None = None
    """Another interpreter to replay with, or words or an image that lead to one (environment.wanted); None takes the
    run's own."""
    executor: str = "local"
    """Where (executors.NAMES)."""
    worker: tuple[str, ...] = ()
    """Words that start a Python with trainguard where tasks are performed; empty takes ours."""
    settings: tuple[tuple[str, str], ...] = ()
    """What the executor is told, by its own names."""
    limit_seconds: float = 3600.0
    """Time for one replay."""
    in_turn: bool = False
    """Replay the ranks of a job one after another, with one process at a time (turns.py)."""
    bisect: bool = False
    """Look for the first segment that differs, instead of drawing segments."""
    explain_seconds: float = EXPLAIN_SECONDS
    """Time for trials of causes, once a difference is confirmed; 0 for none."""
    follow: bool = False
    """Draw and replay while the run goes on (follow.py)."""


class Auditor:
    """One audit of one run. Use once: `Auditor(home, run, options).run()`."""

    def __init__(self, home: Home, run: str, options: Options, *, progress: Progress = lambda _text: None) -> None:
        self._home = home
        self._run = run
        self._options = options
        self._progress = progress
        self._began = time.time_ns()
        self._wanted = wanted(options.python)
        self._executor = executor_of(options, self._wanted)
        self._apart = bool(options.python is not None or options.executor != "local" or options.worker)
        """Whether the environment has to be measured: it is, or may be, another one than the run's."""

    def run(self) -> Report:
        """Audit and log the outcome. Raises TrainguardError where it cannot even begin."""
        head, self._committed = self._read()
        self._command = self._words()
        folder, state = self._open(head)
        try:
            return self._audited(folder, state)
        finally:
            os.close(self._lock)

    def _set_up(self, folder: Path) -> None:
        """Everything that replays need."""
        self._folder = folder
        self._desk = Desk(folder / "tasks", self._executor, self._home.store_blob)
        self._held_against = self._rule() if self._apart else None
        self._numeric: dict[str, str] = {}
        self._tolerant = Tolerant(
            self._home, self._run, self._committed, folder / "states",
            task=lambda segment: self._first_task([segment]), rerun=self._rerun,
            unfinished=lambda found, last: _unfinished(found, last, self._ranks), store=self._home.store_blob,
        )  # fmt: skip

    def _audited(self, folder: Path, state: dict[str, Any]) -> Report:
        self._set_up(folder)
        drawn = plan.draw(
            self._committed,
            state["nonce"],
            budget=self._options.budget,
            confidence=self._options.confidence,
            tampered=self._options.tampered,
            only=tuple(range(len(plan.segments(self._committed)))) if self._options.bisect else self._chosen(),
        )
        changed = self._changed()
        if changed is not None:
            results = tuple(_not_replayed(drawn.segments[n], changed) for n in drawn.chosen)
            selftest: dict[str, Any] = {"passed": None, "reason": changed}
        else:
            groups = [] if self._options.bisect else plan.neighbours(drawn)
            self._desk.expect([self._selftest_task(), *(self._first_task(group) for group in groups)])
            selftest = self._kept("selftest", self._selftest)
            self._match(selftest)
            results = self._replay_all(drawn, selftest)
        return self._concluded(self._report(drawn, state, selftest, results))

    def _concluded(self, report: Report) -> Report:
        """The report, logged and kept."""
        report = self._log(report)
        write_durably(self._folder / "report.json", msgspec.json.encode(report))
        return report

    # -- 1 and 2: what there is, and what is drawn -------------------------------------------------------------------

    def _read(self) -> tuple[dict[str, Any], Committed]:
        leaves = LogLeaves(self._home)
        reader = RunReader(self._home, self._run, leaves=leaves)
        if reader.begin is None:
            raise Misuse(f"run {self._run}: the log holds no statement of it")
        if not self._options.follow and reader.running:
            raise Misuse(
                f"run {self._run} is still going on; what is replayed is drawn after its end",
                next_step=f"audit it while it goes on: trainguard audit {self._run} --follow",
            )
        self._reader = reader
        found = committed(self._run, reader.records(), reader.begin, held=held_key(self._home, self._run))
        walls = {number: step.wall_ns for number, step in found.steps.items()}
        self._files = kept_files(reader.records(), self._home.blob, walls)
        return {"size": leaves.head.size, "root": leaves.head.root.hex()}, found

    def _words(self) -> list[str]:
        """The command to replay, with the interpreter the auditor wants."""
        words = self._committed.start.get("command")
        if self._options.in_turn and len(self._committed.everyone) < 2:
            raise Misuse(f"run {self._run}: --ranks-in-turn expects a job of several ranks, found one process")
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise MalformedEvidence(f"run {self._run}: its statement names no command")
        try:
            words = with_python(words, self._wanted.python)
        except Unavailable as error:
            raise Unavailable(f"run {self._run}: {error}") from error
        if self._options.in_turn:
            of_one_rank(words)  # Unavailable, before anything is drawn
        return alone(words) if len(self._committed.everyone) > 1 else words

    def _segments(self) -> tuple[plan.Segment, ...]:
        """Everything that can be drawn."""
        return plan.segments(self._committed)

    def _chosen(self) -> tuple[int, ...] | None:
        """Segments named by the auditor. Raises Misuse for one there is not."""
        only = self._options.only
        count = len(plan.segments(self._committed))
        if only == ():
            return tuple(range(count))
        if only is not None and not all(0 <= number < count for number in only):
            raise Misuse(f"--segments: expected numbers from 0 to {count - 1}, found {', '.join(map(str, only))}")
        return only

    def _open(self, head: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Folder and draw of this audit: those of one that was cut short, with the same options, or new ones."""
        parent = self._home.root / "audits" / self._run
        options = sha256_hex(msgspec.json.encode(self._options))
        for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
            state = _state(folder / "draw.json")
            if state is None or state.get("options") != options or (folder / "report.json").exists():
                continue
            if self._claim(folder):
                return folder, state
        drawn = secrets.token_hex(32)
        nonce = plan.make_nonce(self._run, head["root"], head["size"], drawn)
        state = {"options": options, "drawn": drawn, "nonce": nonce, "head": dict(head)}
        folder = parent / nonce[:16]
        try:
            (folder / "tasks").mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise Unavailable(f"{folder}: cannot be made: {error.strerror}") from error
        self._claim(folder)
        write_durably(folder / "draw.json", canonical_json(state))
        return folder, state

    def _claim(self, folder: Path) -> bool:
        """Whether this audit is ours alone to go on with; another process that is at it lets go when it ends."""
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True

    def _rule(self) -> Rule:
        """What every environment that replays is held against."""
        approved = self._approved()
        return Rule(approved, self._own_prefix(approved), self._committed.start, self._home.blob)

    def _approved(self) -> Lock | None:
        """The run's lock, where it had one."""
        lock = self._committed.start.get("lock")
        return parse_lock(self._home.blob(lock), where="lock") if isinstance(lock, str) else None

    def _own_prefix(self, approved: Lock | None) -> str | None:
        """Where the run's own environment lay: as measured when it began, else as in the lock."""
        found = self._measured()
        if found is not None:
            return found.interpreter.prefix if found.interpreter is not None else None
        return approved.measurement.interpreter.prefix if approved and approved.measurement.interpreter else None

    def _measured(self) -> Measurement | None:
        """What the run's own environment was when it began; None where nobody measured it."""
        for record in self._reader.records():
            if record.kind == "measurement" and record.source == "supervisor":
                with contextlib.suppress(TrainguardError):
                    return parse_measurement(self._home.blob(str(record.body.get("blob"))), where="measurement")
            if record.kind == "step":
                break
        return None

    def _changed(self) -> str | None:
        """Which file named in the command is not what it was when the run began, or None."""
        inputs = self._committed.start.get("inputs")
        for path, digest in (inputs if isinstance(inputs, dict) else {}).items():
            try:
                now = file_sha256(path)
            except Unavailable as error:
                return f"{path}, which the command names, cannot be read any more: {error}"
            if now != digest:
                return f"{path} changed since the run began: SHA-256 was {str(digest)[:16]}, is {now[:16]}"
        return None

    # -- 3 and 4: tasks ----------------------------------------------------------------------------------------------

    def _kept(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a task, from an earlier attempt where there is one."""
        path = self._folder / "tasks" / f"{name}.json"
        known = _state(path)
        if known is not None:
            return known
        found = work()
        write_durably(path, msgspec.json.encode(found))
        return found

    def _task(self, group: Sequence[plan.Segment]) -> str:
        """Id of a task: everything that decides its outcome."""
        told = [
            self._run,
            self._command,
            [[segment.first, segment.last] for segment in group],
            [[point.index_sha256, point.data_blake3] for point in self._points(group[0])],
            self._options.limit_seconds,
        ]
        return sha256_hex(msgspec.json.encode(told))[:32]

    def _selftest(self) -> dict[str, Any]:
        """Replay the first steps with a fault planted on our side: it must be found, at that step."""
        until = min(SELFTEST_STEPS, self._committed.last)
        self._progress("self-test: a planted fault must be found")
        try:
            found = self._rerun(self._selftest_task())
        except Refused as error:
            return {"passed": None, "reason": str(error)}
        reason = _unfinished(found, until, self._ranks)
        if reason is not None:
            return {"passed": None, "reason": reason}
        try:
            accounts = self._accounts
            if self._kinds(found):  # bits of the run say nothing here: our own replay without the fault has to do
                clean = self._rerun(msgspec.structs.replace(self._selftest_task(), plant=None))
                accounts = sorted(clean.accounts.items())
        except Refused:
            raise
        except Unavailable as error:
            return {"passed": None, "reason": str(error)}
        difference = compare.first_of_ranks(accounts, found.accounts, first=until, last=until)
        return {
            "passed": difference is not None,
            "opened": msgspec.to_builtins(self._opened(found)),
            "planted": {"step": until, "what": "sign of the gradient"},
            "found": None if difference is None else {"step": difference.step, "link": difference.link},
        }

    def _opened(self, found: Rerun) -> list[Finding]:
        """What the command begins from that is not what was sealed or approved."""
        start = self._committed.start
        where: dict[str, Any] = {"root": found.root, "cwd": str(start.get("cwd")), "began_ns": _began(start)}
        lock = None
        with contextlib.suppress(TrainguardError):  # one that cannot be read is a finding of the verdict
            lock = self._approved()
        return [
            *opened_findings(self._home, self._run, found.read, **where),
            *unapproved_findings(lock, self._measured(), self._run, found.read, **where),
        ]

    def _replay_all(self, drawn: plan.Plan, selftest: Mapping[str, Any]) -> tuple[Result, ...]:
        if selftest.get("passed") is not True:
            reason = str(selftest.get("reason") or "the verifier did not find the fault that was planted in it")
            return tuple(_not_replayed(drawn.segments[number], reason) for number in drawn.chosen)
        if self._options.bisect:
            return self._bisect(drawn)
        results: list[Result] = []
        groups = plan.neighbours(drawn)
        for turn, group in enumerate(groups, 1):
            self._progress(f"replay {turn} of {len(groups)}: steps {group[0].first} to {group[-1].last}")
            results.extend(self._done(group))
            if results[-1].outcome == "differs":
                break  # the rest follows from it
        return tuple(results)

    def _done(self, group: Sequence[plan.Segment]) -> list[Result]:
        """What came of a group: as an earlier attempt left it, or by replaying it now."""
        name = self._task(group)
        path = self._folder / "tasks" / f"{name}.json"
        known = _results(_state(path), group)
        if known is not None:
            return known
        found = self._group(group)
        write_durably(path, msgspec.json.encode({"results": found}))
        return msgspec.convert(found, list[Result])

    # -- the first segment that differs ------------------------------------------------------------------------------

    def _bisect(self, drawn: plan.Plan) -> tuple[Result, ...]:
        """Single segments until one differs, then the first that does (bisect.py); that one is decided as any other."""
        probed: dict[int, Result] = {}

        def differs(number: int) -> bool | None:
            segment = drawn.segments[number]
            self._progress(f"bisect: steps {segment.first} to {segment.last}")
            result = probed[number] = self._probed(segment)
            return None if result.outcome == "not replayed" else result.outcome in ("differs", "departs")

        risky = plan.unusual(self._committed, drawn.segments)
        found = bisect.search(len(drawn.segments), differs, first=risky)
        if found.segment is None:
            return tuple(probed[number] for number in sorted(probed))
        segment, seen = drawn.segments[found.segment], probed[found.segment]
        if seen.outcome == "departs" or seen.difference is None:
            decided = [seen]
        else:
            until = None if seen.difference.path is not None else seen.difference.step
            decided = self._decided(segment, until)
        first = min(result.first for result in decided)
        return (
            *(probed[n] for n in sorted(probed) if probed[n].outcome == "equal" and probed[n].last < first),
            *decided,
        )

    def _probed(self, segment: plan.Segment) -> Result:
        """One segment from its own sealed state; a difference is not decided here."""
        try:
            return self._probe(segment)
        except NotPerformed:
            raise
        except OtherBuild as other:
            return self._tolerated(segment, other.kinds)
        except Unavailable as error:
            return _not_replayed(segment, str(error))

    def _probe(self, segment: plan.Segment) -> Result:
        found = self._rerun(self._first_task([segment]))
        way = "warp" if found.landed else "start"
        difference = self._compare(found, segment.last) or self._altered(found)
        if difference is None:
            reason = found.unsound or _unfinished(found, segment.last, self._ranks)
            if reason is not None:
                return _not_replayed(segment, f"{way}: {reason}")
            if (odd := self._state_differs([segment], found)) is not None:
                difference = Difference(step=odd[0], link="weights", expected="the replay's state", found=odd[1])
        if difference is None:
            return _equal(segment, way)
        return msgspec.structs.replace(_equal(segment, way), outcome="differs", compared=0, difference=difference)

    def _decided(self, segment: plan.Segment, until: int | None) -> list[Result]:
        """A segment that a probe found to differ, from the first step."""
        name = f"decided-{self._task([segment])}"
        kept = self._kept(
            name, lambda: {"results": self._timed([segment], lambda: self._from_start([segment], None, until))}
        )
        return msgspec.convert(kept["results"], list[Result])

    # -- 5: neighbouring segments, in one process --------------------------------------------------------------------

    def _group(self, group: Sequence[plan.Segment]) -> list[dict[str, Any]]:
        return self._timed(group, lambda: self._warped(group))

    def _timed(self, group: Sequence[plan.Segment], work: Callable[[], list[Result]]) -> list[dict[str, Any]]:
        """Results with what they took; what cannot be had is said."""
        began = time.monotonic()
        try:
            results = work()
        except NotPerformed:
            raise
        except OtherBuild as other:
            results = [self._tolerated(segment, other.kinds) for segment in group]
        except Unavailable as error:
            results = [_not_replayed(segment, str(error)) for segment in group]
        seconds = round(time.monotonic() - began, 1)
        return [msgspec.to_builtins(msgspec.structs.replace(result, seconds=seconds)) for result in results]

    def _warped(self, group: Sequence[plan.Segment]) -> list[Result]:
        """By warp where that can be; else, and to confirm a difference, from the first step."""
        sealed, why, until = self._points(group[0]), None, None
        while sealed and sealed[0].step >= SHORTEST_WARP:
            why, until, carried = self._warp_fails(group, sealed)
            if why is None:
                return [_equal(segment, "warp") for segment in group]
            sealed = [] if carried is None else self._points_by(min(carried, sealed[0].step - 1))
        return self._from_start(group, why, until)

    def _warp_fails(
        self, group: Sequence[plan.Segment], sealed: Sequence[Point]
    ) -> tuple[str | None, int | None, int | None]:
        """Why a group is not equal from these sealed states on, the step at which that shows where it does, and the
        step by which a state would have to be sealed for a warp to fare better. All None where it is equal."""
        try:
            for point in sealed:
                points.open_point(self._home.run(self._run) / "points" / point.name, point)
        except TrainguardError as error:
            return str(error), None, None
        last = group[-1].last
        found = self._rerun(self._task_of(group, points=sealed))
        reason = found.unsound or (None if found.landed else _unfinished(found, last, self._ranks) or "it never landed")
        reason = reason or _unfinished(found, last, self._ranks)
        if reason is not None:
            return f"warp: {reason}", None, found.carried
        difference = self._compare(found, last)
        if difference is not None:
            until = difference.step if difference.path is None else None
            return f"warp: step {difference.step}: {difference.what} differs", until, found.carried
        if (odd := self._state_differs(group, found)) is not None:
            return f"warp: {odd[1]} differs in the state after step {odd[0]}", None, found.carried
        if (altered := self._altered(found)) is not None:
            return f"warp: {altered.path} holds something else", None, found.carried
        return None, None, None

    def _from_start(self, group: Sequence[plan.Segment], why: str | None, until: int | None = None) -> list[Result]:
        """Replay from the first step: needs no sealed state and skips nothing, so it decides. until: a step at which a
        warp saw a difference; only where there is none by then, the rest is replayed too."""
        last = group[-1].last
        if until is not None and until < last:
            found = self._rerun(self._task_of(until=until))
            difference = self._compare(found, until)
            if difference is not None:
                return self._confirmed(group, difference, found)
        found = self._rerun(self._task_of(group))
        difference, altered = self._compare(found, last), self._altered(found)
        if altered is not None and (difference is None or altered.step < difference.step):
            difference = altered
        if difference is not None:
            return self._confirmed(group, difference, found)
        reason = _unfinished(found, last, self._ranks)
        if reason is not None:
            return [_not_replayed(segment, reason) for segment in group]
        odd = self._state_differs(group, found)
        if odd is not None:
            text = f"the sealed state after step {odd[0]} is not what the steps committed to: {odd[1]}"
            return [
                _equal(segment, "start") if segment.last < odd[0] else _not_replayed(segment, text) for segment in group
            ]
        results = [msgspec.structs.replace(_equal(segment, "start"), reason=why) for segment in group]
        return [*results[:-1], msgspec.structs.replace(results[-1], told=self._told(group, found))]

    def _told(self, group: Sequence[plan.Segment], found: Rerun) -> tuple[Finding, ...]:
        """What the run told of itself otherwise than this replay, and another one with a faster clock: to be looked
        at where the group ends with the run and bits can be compared."""
        last, ended = self._committed.last, self._committed.ended_ns
        if group[-1].last < last or ended is None or self._ranks > 1 or self._kinds(found):
            return ()

        def departures(replay: Rerun) -> list[told.Departure]:
            start = self._committed.start
            return told.departures(
                replay, last=last, cwd=str(start.get("cwd")), began_ns=_began(start), ended_ns=ended, files=self._files
            )

        first = departures(found)
        if not first:
            return ()
        self._progress("the run told something else than its replay; replaying again with a faster clock")
        again = self._rerun(self._task_of(group, turn=1, clock=told.CLOCK))
        if _unfinished(again, last, self._ranks) or self._unsteady(found, again, last):
            return ()
        return tuple(told.findings(self._run, first, departures(again)))

    def _confirmed(self, group: Sequence[plan.Segment], difference: Difference, first: Rerun) -> list[Result]:
        """A difference counts when a second clean replay agrees with the first one and not with the run."""
        if newer := really_newer(first.newer, self._measured()):
            changed = f"it reads {newer[0]}, which changed since the run began; step {difference.step} differs"
            return [_not_replayed(segment, changed) for segment in group]
        self._progress(f"step {difference.step}: {difference.what} differs; replaying again to be sure")
        until = difference.step if difference.path is None else self._until(group[-1].last)
        again, cause = self._again_and_why(difference, first, until)
        reason = self._unlike(first, again, difference)
        if reason is not None:
            return [_not_replayed(segment, reason) for segment in group]
        results = [_equal(segment, "start") for segment in group if segment.last < difference.step]
        segment = next((s for s in self._segments() if difference.step <= s.last), group[-1])
        compared = max(0, difference.step - segment.first)
        bad = Result(
            segment=segment.number,
            first=segment.first,
            last=segment.last,
            outcome="differs",
            way="start",
            compared=compared,
            difference=difference,
            after=max((n for n in self._committed.steps if n < difference.step), default=None),
            odd=odd_ranks(self._committed.everyone, again.accounts, difference),
            confirmed=True,
            cause=cause,
        )
        return [*results, bad]

    def _again_and_why(self, difference: Difference, first: Rerun, until: int) -> tuple[Rerun, Cause | None]:
        """The second clean replay, and the cause where it is looked for.

        Both in one process where that can be: the second replay is made on this machine, and waits at the step while
        causes are tried in forks of it. What it then gives is compared with the first like any other; where the two
        part, or the process could not be tried, it is replayed once more with nothing done to it.
        """
        tried: list[Cause] = []
        if not self._apart and self._explains(difference) and not self._not_here():
            with contextlib.suppress(TrainguardError):
                again = self._tried_on_the_way(difference, first, until, tried)
                if self._unlike(first, again, difference) is None:
                    cause = _best(tried) or _unexplained(until, again.unable or "the step could not be tried again")
                    return again, cause
        again = self._rerun(self._task_of(until=until, turn=1))
        proved = self._unlike(first, again, difference) is None
        return again, self._explained(difference, again) if proved else None

    def _unlike(self, first: Rerun, again: Rerun, difference: Difference) -> str | None:
        """Why the second clean replay does not confirm the first, or None."""
        reason = _unfinished(again, difference.step, self._ranks) or self._unsteady(first, again, difference.step)
        if reason is None and difference.path is not None and self._altered(again) != difference:
            return f"two clean replays of the same command do not save the same to {difference.path}"
        return reason

    # -- why ---------------------------------------------------------------------------------------------------------

    def _explained(self, difference: Difference, clean: Rerun) -> Cause | None:
        """The cause of a difference that is proved already: nothing that is found here makes it more or less so."""
        until = difference.step
        if not self._explains(difference):
            return None
        why_not = self._not_here()
        if why_not:
            return _unexplained(until, why_not)
        search = self._search(clean, until)
        tried: list[Cause] = []

        def explore(ready: Ready) -> bool:
            tried.append(search.at(ready, until))
            return tried[-1].confidence != "reproduced" and ready.step < until and not search.over

        try:
            unable = self._tried(self._window(until), explore, tried)
        except TrainguardError as error:
            return _unexplained(until, str(error))
        return _best(tried) or _unexplained(until, unable or "the step could not be tried again")

    def _tried_on_the_way(self, difference: Difference, first: Rerun, until: int, tried: list[Cause]) -> Rerun:
        """A replay from the start to step `until` that waits where the act may lie and tries causes there."""
        search = self._search(first, until)

        def explore(ready: Ready) -> bool:
            if not search.over and not any(cause.confidence == "reproduced" for cause in tried):
                tried.append(search.at(ready, until))
            return True

        task = self._task_of(until=until, turn=1)
        limit = self._options.limit_seconds + self._options.explain_seconds
        return explored(msgspec.structs.replace(task, limit_seconds=limit), self._window(difference.step), explore)

    def _search(self, clean: Rerun, until: int) -> Search:
        run = self._committed.account
        self._progress(f"step {until}: trying what may have caused it")
        return Search(run, clean.account, compare.idle(run, clean.account), seconds=self._options.explain_seconds)

    def _explains(self, difference: Difference) -> bool:
        return self._options.explain_seconds > 0 and difference.path is None

    def _window(self, until: int) -> tuple[int, int]:
        """The steps in which what shows at step `until` may have been done."""
        return max((n for n in self._committed.steps if n < until), default=0) + 1, until

    def _not_here(self) -> str:
        """Why steps cannot be tried: it needs a replay on this machine, of one process."""
        if self._ranks > 1:
            return "steps of a job of several ranks are not tried again"
        here = isinstance(self._executor, LocalExecutor) and not self._executor.worker and self._executor.image is None
        if not here:
            return "steps are only tried on the auditor's own machine (--executor local)"
        return ""

    def _tried(self, window: tuple[int, int], explore: Callable[[Ready], bool], tried: Sequence[Cause]) -> str | None:
        """Replay to the window, from a sealed state near it or from the start. Returns why nothing was tried."""
        limit = self._options.limit_seconds + self._options.explain_seconds
        near = self._nearby(window[0])
        for sealed in ([near], []) if near is not None else ([],):
            task = self._task_of(until=window[1], points=sealed)
            found = explored(msgspec.structs.replace(task, limit_seconds=limit), window, explore)
            if tried:
                break
        return found.unable or _unfinished(found, window[1], self._ranks)

    def _nearby(self, step: int) -> Point | None:
        """A sealed state some steps before `step`, from which a replay is short."""
        for point in reversed(self._committed.points):
            if SHORTEST_WARP <= point.step < step - REMEMBERED_STEPS:
                with contextlib.suppress(TrainguardError):
                    points.open_point(self._home.run(self._run) / "points" / point.name, point)
                    return point
        return None

    def _unsteady(self, first: Rerun, again: Rerun, last: int) -> str | None:
        """Why two clean replays of the command do not agree with each other, or None."""
        unseeded: frozenset[int] = frozenset()
        parted: Difference | None = None
        for rank, account in self._accounts:
            one, two = first.accounts.get(rank, Account()), again.accounts.get(rank, Account())
            alike = compare.idle(one, two)
            unseeded |= alike
            streams = alike | compare.idle(account, two)
            found, _ = compare.first_difference(one, two, first=1, last=last, idle_streams=streams)
            if found is not None and (parted is None or found.step < parted.step):
                parted = found
        if parted is None:
            return None
        names = [("torch", "numpy", "python")[place] for place in sorted(unseeded)]
        return (
            f"two clean replays of the same command part from each other at step {parted.step} ({parted.what}"
            f"{'; never seeded: ' + ', '.join(names) if names else ''}): it depends on something that was not recorded"
        )

    def _altered(self, found: Rerun) -> Difference | None:
        """The first file of the run that is not what this replay saved in its place."""
        if self._committed.key is None:
            return None  # storages were sampled by another key
        if self._kinds(found):
            return None  # another build saves other bits
        altered = first_altered(self._files, found, str(self._committed.start.get("cwd")))
        if altered is None:
            return None
        return Difference(
            step=altered.step, link="file", tensor=altered.tensor, tensors=altered.tensors, of=altered.of,
            path=altered.path, expected=altered.expected, found=altered.found,
        )  # fmt: skip

    def _until(self, last: int, *, whole: bool = False) -> int:
        """Where a replay up to step `last` stops: at the very end of the command where the run saved after that, or
        where all of it is replayed and the run came to its end."""
        if last < self._committed.last:
            return last
        to_the_end = any(file.step >= last for file in self._files) or (
            whole and self._ranks == 1 and self._committed.ended_ns is not None
        )
        return last + 1 if to_the_end else last

    def _compare(self, found: Rerun, last: int) -> Difference | None:
        difference = compare.first_of_ranks(self._accounts, found.accounts, first=1, last=last)
        if difference is not None and (kinds := self._kinds(found)):
            raise OtherBuild(kinds)
        return difference

    def _kinds(self, found: Rerun) -> tuple[str, ...]:
        """The kinds of variation between the builds of run and replay, over all ranks; none where bits must be equal.
        Raises Unavailable where nothing covers the difference. Equal bits are equal whatever the builds."""
        kinds: list[str] = []
        for rank, account in self._accounts:
            other = found.accounts.get(rank)
            try:
                kinds.extend(parted(account.build, other.build if other is not None else None))
            except Unavailable as error:
                raise Unavailable(str(error) if self._ranks == 1 else f"rank {rank}: {error}") from error
        return tuple(dict.fromkeys(kinds))

    def _tolerated(self, segment: plan.Segment, kinds: tuple[str, ...]) -> Result:
        """A segment on another build: by size, within what honest arithmetic differs by."""
        self._progress(f"steps {segment.first} to {segment.last}: another build; comparing by size")
        told = self._tolerant.segment(segment, kinds)
        if told.outcome == "not told":
            return _not_replayed(segment, told.reason or "could not tell")
        way = "warp" if self._points(segment) and segment.first > SHORTEST_WARP else "start"
        return msgspec.structs.replace(
            _equal(segment, way),
            outcome="equal" if told.outcome == "within" else "departs",
            compared=segment.steps if told.outcome == "within" else 0,
            difference=told.difference,
            reading=told.reading,
        )

    @property
    def _ranks(self) -> int:
        return len(self._committed.everyone)

    @property
    def _accounts(self) -> list[tuple[int, Account]]:
        return [(rank.rank, rank.account) for rank in self._committed.everyone]

    def _state_differs(self, group: Sequence[plan.Segment], found: Rerun) -> tuple[int, str] | None:
        """Step and tensor in which a sealed state is not the replay's, or None. A sealed state that is gone is skipped:
        what its step committed to has been compared."""
        for step, rank, point in sorted((p.step, r.rank, p) for r in self._committed.everyone for p in r.points):
            clean = found.states.get((rank, step))
            if clean is None or not group[0].first <= step <= group[-1].last:
                continue
            folder = self._home.run(self._run) / "points" / point.name
            try:
                index = points.open_point(folder, point)
            except TrainguardError:
                continue
            odd = points.first_unequal(points.digests(folder, index), clean)
            if odd is not None:
                if kinds := self._kinds(found):
                    raise OtherBuild(kinds)
                return step, odd
        return None

    def _points(self, segment: plan.Segment) -> list[Point]:
        """The sealed state of every rank that a segment begins with; empty for the start of the run."""
        found = (
            next((p for p in rank.points if p.step == segment.first - 1), None) for rank in self._committed.everyone
        )
        return [point for point in found if point is not None]

    def _points_by(self, step: int) -> list[Point]:
        """The last sealed states of every rank that lie not behind `step`, all after the same step."""
        ranks = [{p.step: p for p in rank.points} for rank in self._committed.everyone]
        common = [each for each in ranks[0] if each <= step and all(each in rank for rank in ranks)] if ranks else []
        return [rank[max(common)] for rank in ranks] if common else []

    def _selftest_task(self) -> Task:
        until = min(SELFTEST_STEPS, self._committed.last)
        return self._task_of(until=until, plant=until)

    def _match(self, selftest: Mapping[str, Any]) -> None:
        """Bring the replays nearer to the run's build, where the first one shows that this can be done."""
        if selftest.get("passed") is not True:
            return
        run, clean = self._committed.account.build, self._rerun(self._selftest_task()).account.build
        if run is not None and clean is not None and compare.incomparable(run, clean) is not None:
            self._numeric = matching(run, clean, settings(self._committed.start.get("environment")))

    def _first_task(self, group: Sequence[plan.Segment]) -> Task:
        """What a group is replayed by at first: from its sealed states where there are such."""
        sealed = self._points(group[0])
        return self._task_of(group, points=sealed if sealed and sealed[0].step >= SHORTEST_WARP else ())

    def _task_of(
        self,
        group: Sequence[plan.Segment] = (),
        *,
        until: int = 0,
        points: Sequence[Point] = (),
        plant: int | None = None,
        turn: int = 0,
        clock: float = 1.0,
    ) -> Task:
        """One replay: of a group, from the sealed states of all ranks or from the start; or until a step."""
        start = self._committed.start
        lock = start.get("lock")
        first, last = (group[0].first, group[-1].last) if group else (0, until)
        trusted = [Path(str(self._wanted.python)).parent.parent] if self._options.python is not None else []
        return Task(
            run=self._run,
            command=tuple(self._command),
            cwd=str(start.get("cwd")),
            state=str(self._home.root),
            began=str(_began(start)),
            environment=dict(settings(start.get("environment"))),
            inputs=dict(settings(start.get("inputs"))),
            numeric=self._numeric if plant is None else {},
            key=self._committed.key or "00" * 32,
            begin=points[0].step if points else 0,
            until=self._until(last, whole=not points) if group else last,
            turn=turn,
            clock=clock,
            points=tuple(points),
            keep=tuple(p.step for p in self._committed.points if group and first <= p.step <= last),
            plant=plant,
            ranks=self._ranks,
            in_turn=self._options.in_turn,
            patience_seconds=_patience(self._committed),
            trusted=tuple(str(folder) for folder in trusted),
            limit_seconds=self._options.limit_seconds,
            lock=lock if self._apart and isinstance(lock, str) else None,
            apart=self._apart,
        )

    def _rerun(self, task: Task) -> Rerun:
        """A replay, once the environment it ran in is known to be admissible."""
        outcome = self._desk.outcome(task)
        if self._held_against is not None:
            self._held_against.admit(*self._desk.places[task.id])
        found = outcome.rerun()
        if task.in_turn:
            found.forget_sums(task.begin)
        return found

    # -- 6: what it means --------------------------------------------------------------------------------------------

    def _report(
        self, drawn: plan.Plan, state: Mapping[str, Any], selftest: dict[str, Any], results: tuple[Result, ...]
    ) -> Report:
        apart = self._held_against
        own = {"apart": False, "approved": False, "reason": "the run's own environment"}
        return Report(
            run=self._run,
            plan=drawn,
            drawn=state["drawn"],
            head=dict(state["head"]),
            calibration=self._tolerant.calibration,
            environment={
                "python": self._options.python or self._command[0],
                "build": self._committed.account.build or {},
                "executor": self._executor.name,
                **({"ranks": f"in turn, one process at a time ({self._ranks})"} if self._options.in_turn else {}),
                **(apart.told if apart is not None else own),
            },
            selftest=selftest,
            results=results,
            findings=(
                *(
                    self._finding(result) if result.outcome == "differs" else self._suspicion(result)
                    for result in results
                    if result.outcome in ("differs", "departs")
                ),
                *(finding for result in results for finding in result.told),
                *_opened(selftest),
            ),
            steps=self._committed.last,
            replayed_steps=sum(result.compared for result in results),
            began_ns=self._began,
            ended_ns=time.time_ns(),
        )

    def _finding(self, result: Result) -> Finding:
        difference = result.difference
        if difference is None:
            raise MalformedEvidence(f"segment {result.segment}: differs without a difference")
        if difference.path is not None:
            return self._file_finding(difference)
        step = self._committed.steps[difference.step]
        where = (
            f" of {difference.tensor}"
            if difference.tensor
            else f" ({difference.setting})"
            if difference.setting
            else ""
        )
        many = f" ({difference.tensors} of {difference.of} tensors)" if difference.tensors > 1 else ""
        gap = result.after is not None and result.after < difference.step - 1
        within = f" (the act lies after step {result.after})" if gap else ""
        message = (
            f"step {difference.step}: {difference.what}{where}{many}: not what two clean replays of the same command "
            f"give; everything compared before it is equal{within}{_because(result.cause)}"
        )
        rank = difference.rank
        if result.odd is not None:
            rank, message = result.odd.ranks[0], f"{message}; {result.odd.text}"
        if self._ranks > 1:
            message += SMALLER.format(self._ranks)
        return Finding(
            check="replay",
            outcome="violated",
            techniques=_named(result.cause, _techniques(difference, result.odd)),
            subject=Subject(run=self._run, rank=rank, step=difference.step, tensor=difference.tensor),
            message=message,
            expected=difference.expected,
            found=difference.found,
            evidence=(step.citation,) if isinstance(step.citation, Citation) else (),
        )

    def _file_finding(self, difference: Difference) -> Finding:
        file = min(
            (file for file in self._files if file.path == difference.path),
            key=lambda file: abs(file.step - difference.step),
        )
        many = f" and {difference.tensors - 1} more of {difference.of}" if difference.tensors > 1 else ""
        return Finding(
            check="replay",
            outcome="violated",
            techniques=compare.TECHNIQUES[difference.link],
            subject=Subject(run=self._run, step=difference.step, tensor=difference.tensor, path=difference.path),
            message=(
                f"{difference.path}, saved after step {difference.step}, does not hold what that step had: "
                f"{difference.tensor}{many} is not what two clean replays of the same command save; every step "
                "compared before is equal"
            ),
            expected=difference.expected,
            found=difference.found,
            evidence=(file.citation,) if file.citation is not None else (),
        )

    def _suspicion(self, result: Result) -> Finding:
        """Beyond the tolerance for another build: never proved there."""
        reading, difference = result.reading, result.difference
        techniques: tuple[str, ...] = ("C1", "C3", "C4", "E4")
        step, tensor, rank = result.last, None, 0
        if difference is not None:
            step, rank, techniques = difference.step, difference.rank, compare.TECHNIQUES[difference.link]
            setting = f" ({difference.setting})" if difference.setting else ""
            what = f"step {step}: {difference.what}{setting}: not what two clean replays give"
            expected, found = difference.expected, difference.found
        elif reading is not None:
            tensor = reading.tensor.split("/", 2)[-1] if reading.tensor else None
            what = (
                f"steps {result.first} to {result.last}: {tensor} lies {reading.excess:.3g} times as far from a clean "
                f"replay as honest arithmetic allows ({reading.by})"
            )
            expected, found = "at most 1", f"{reading.excess:.3g}"
        else:
            raise MalformedEvidence(f"segment {result.segment}: departs without a reading")
        return Finding(
            check="replay",
            outcome="suspicious",
            techniques=techniques,
            subject=Subject(run=self._run, rank=rank, step=step, tensor=tensor),
            message=(
                f"{what}; alternatives: kernels of this processor that no class covers, a decision of the code that "
                f"hangs on a last bit, faulty hardware; {self._proof()}"
            ),
            expected=expected,
            found=found,
            evidence=_cited(self._committed.steps.get(step)),
        )

    def _proof(self) -> str:
        """What would prove it."""
        build = self._committed.account.build or {}
        told = ", ".join(f"{name} {build[name]}" for name in ("torch", "cpu", "capability", "threads") if name in build)
        return f"a replay on the run's own build proves ({told})"

    def _log(self, report: Report) -> Report:
        """Store the report, and log a signed statement that binds it."""
        blob = self._home.store_blob(msgspec.json.encode(report))
        body = {
            "run": report.run,
            "drawn": report.drawn,
            "nonce": report.plan.nonce,
            "head": report.head,
            "segments": len(report.plan.segments),
            "chosen": len(report.plan.chosen),
            "steps": report.steps,
            "replayed_steps": report.replayed_steps,
            "selftest": report.selftest.get("passed"),
            "differs": sum(result.outcome == "differs" for result in report.results),
            "departs": sum(result.outcome == "departs" for result in report.results),
            "not_replayed": sum(result.outcome == "not replayed" for result in report.results),
            "causes": [
                {"step": cause.step, "kind": cause.kind, "words": cause.words, "confidence": cause.confidence}
                for cause in (result.cause for result in report.results)
                if cause is not None
            ],
        } | ({"followed": len(report.draws)} if report.draws else {})
        subject = [{"name": f"audits/{report.run}/{report.plan.nonce[:16]}", "digest": {"sha256": blob}}]
        key = load_or_create_key(self._home.keys / "attestation.pem")
        with Log.open(self._home.log, self._home.keys / "log.key") as log:
            leaf = log.append([sign_statement(statement(PREDICATE, body, subject), key)])[0]
            log.publish()
        return msgspec.structs.replace(report, blob=blob, leaf=leaf)


CONFIDENCES = ("reproduced", "consistent", "none")


def _opened(selftest: Mapping[str, Any]) -> tuple[Finding, ...]:
    """What was found of the files that the command begins from."""
    if selftest.get("passed") is not True:
        return ()
    try:
        return msgspec.convert(selftest.get("opened") or [], tuple[Finding, ...])
    except msgspec.ValidationError:
        return ()


def _best(tried: Sequence[Cause]) -> Cause | None:
    """The surest of the causes that steps gave."""
    return min(tried, key=lambda cause: CONFIDENCES.index(cause.confidence), default=None)


def _unexplained(step: int, reason: str) -> Cause:
    return Cause(kind="unknown", words="not found out", confidence="none", step=step, reason=reason[:1000])


def _because(cause: Cause | None) -> str:
    if cause is None or cause.confidence == "none":
        return ""
    sure = "gives the recorded bytes" if cause.confidence == "reproduced" else "fits what was recorded"
    return f"; cause: {cause.words} ({sure})"


def _named(cause: Cause | None, techniques: tuple[str, ...]) -> tuple[str, ...]:
    """Techniques of the cause first, where there is one."""
    return techniques if cause is None else tuple(dict.fromkeys((*cause.techniques, *techniques)))


def _cited(step: Step | None) -> tuple[Citation, ...]:
    return (step.citation,) if step is not None and isinstance(step.citation, Citation) else ()


def _equal(segment: plan.Segment, way: str) -> Result:
    return Result(
        segment=segment.number,
        first=segment.first,
        last=segment.last,
        outcome="equal",
        way=way,
        compared=segment.steps,
    )


def _not_replayed(segment: plan.Segment, reason: str) -> Result:
    return Result(
        segment=segment.number, first=segment.first, last=segment.last, outcome="not replayed", way="start",
        reason=reason[:2000],
    )  # fmt: skip


def _techniques(difference: Difference, odd: Odd | None) -> tuple[str, ...]:
    known = compare.TECHNIQUES[difference.link]
    return ("F2", *known) if odd is not None and odd.how in ("own", "share") else known


def _patience(run: Committed) -> float:
    """Seconds that ranks may be silent: many times their longest step."""
    longest = max((step.wall_ns for step in run.steps.values()), default=0)
    return max(PATIENCE_SECONDS, 10 * longest / 1e9)


def _unfinished(found: Rerun, until: int, ranks: int) -> str | None:
    """Why a replay did not come to step `until`, or None when it did."""
    if found.malformed is not None:
        return f"the replayed process sent something that is no evidence: {found.malformed}"
    if found.mixed is not None or found.trained > ranks:
        return found.mixed or f"{found.trained} processes made steps in the replay, {ranks} in the run"
    if found.reached >= until and found.trained == ranks:
        return None
    if found.unsound is not None:
        return found.unsound
    if found.waits:
        return f"at step {found.reached} of {until} every rank waits for another ({found.waits[0]})"
    if found.outside:
        return f"it wants to write outside its own folder, to {found.outside[0]}; a replay must not"
    said = " ".join(found.output.strip().splitlines()[-1:])[:300]
    if found.timed_out:
        return f"it came to step {found.reached} of {until} in the time it was given"
    missing = f"; left out, because they changed since the run began: {', '.join(found.left_out[:3])}" if (
        found.left_out
    ) else ""  # fmt: skip
    return f"it ended with status {found.status} at step {found.reached} of {until}: {said or 'no output'}{missing}"


def _began(start: Mapping[str, Any]) -> int:
    text = start.get("began_ns")
    if not isinstance(text, str) or not text.isdigit():
        raise Unavailable("the run's statement does not say when it began; it was recorded by an older version")
    return int(text)


def _state(path: Path) -> dict[str, Any] | None:
    """A JSON object of ours, or None where there is none that can be read."""
    try:
        if path.stat().st_size > STATE_LIMIT_BYTES:
            return None
        value = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    return value if isinstance(value, dict) else None


def _results(kept: Mapping[str, Any] | None, group: Sequence[plan.Segment]) -> list[Result] | None:
    """The results of a task as they were kept; None where there are none, or they are not about this group."""
    try:
        found = msgspec.convert((kept or {})["results"], list[Result])
    except (KeyError, msgspec.ValidationError):
        return None
    places = [(segment.first, segment.last) for segment in group]
    return found if found and all((result.first, result.last) in places for result in found) else None


def executor_of(options: Options, where: Wanted) -> Executor:
    """The executor that these options ask for. Raises Misuse."""
    worker, given = options.worker, dict(options.settings)
    if where.image is not None and options.executor == "kubernetes":
        given.setdefault("image", where.image)
    elif where.image is not None:
        if options.executor != "local":
            raise Misuse(f"--env image:{where.image}: expected --executor local or kubernetes")
        given["image"] = where.image
    elif where.words:
        if options.executor != "local":
            raise Misuse("--env: words that lead to another machine go with --executor local")
        worker = (*where.words, *(worker or (sys.executable,)))
    return chosen(options.executor, worker=worker, settings=given)


def audit(
    home: Home, run: str, options: Options, *, progress: Progress = lambda _text: None
) -> Report:  # fmt: skip
    """Audit `run`. Raises Misuse for a run that cannot be meant, Unavailable for one that cannot be replayed."""
    return Auditor(home, run, options, progress=progress).run()


def named_inputs(command: Sequence[str], cwd: Path) -> dict[str, str]:
    """Regular files that words of the command name, by absolute path, with their SHA-256: written into `run/v1`."""
    found: dict[str, str] = {}
    for word in command[1:]:
        value = word.partition("=")[2] if word.startswith("-") and "=" in word else word
        path = Path(cwd) / value
        try:
            if len(value) < 1024 and path.is_file() and len(found) < 64:
                found[str(path)] = file_sha256(path.resolve(), limit_bytes=1 << 30)
        except (OSError, ValueError, VerificationError, Unavailable):
            continue
    return found


def key_commitment(key: str) -> str:
    """What a run says of its secret key before its first step."""
    return hashlib.sha256(key.encode()).hexdigest()


def settings_of(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of the run that its replay takes over."""
    from trainguard.replay.rerun import INHERITED

    return {name: environment[name] for name in INHERITED if name in environment}
