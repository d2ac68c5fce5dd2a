"""Check *stalls*: a training thread that sleeps is a finding with its line; time that others took is told apart (F7).

A sleep is known by its system call, seen from outside (watch/stalls.py), and its line is what the process said while
it lay there: no stopwatch, so a busy machine makes no sleeps. What it weighs depends on where the line is
(docs/checks/stalls.md): locked code explains it, code that is not in the lock proves it, without a lock it is open.

Slow steps are added up by phase, rank and line, less the time the thread was ready to run and had no processor. A rank
that is slow because of its quota, its neighbours or its priority is named as that, and accused of nothing. When steps
stop, the rank that the others wait for is named. Losses are ranges, in device-hours.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec.structs import replace

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import Origins, Standing
from trainguard.appraise.sweeps import whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

LOST_SHARE, LOST_SECONDS = 0.05, 1.0
"""Below either, time lost outside torch's own calls is noted and no more."""

SLOW_STEPS, SLOW_SHARE = 4, 0.5
"""A line accounts for slow steps when it is in this many of them and in this much of the time they lost."""

LABEL_SHARE = 0.1
"""Time without a processor, or held back by a quota, that makes a rank slow for a reason of its own."""

NOTES_LIMIT, OPEN_LIMIT, FRAMES_LIMIT = 40, 4096, 64

Phase = Literal["optimizer", "backward", "forward", "data", "checkpoint", "collective", "compile", "between steps"]

PHASES: tuple[tuple[str, Phase], ...] = (
    (
        r"/torch/(_dynamo|_inductor|_functorch|fx|_export)/|/triton/|/filelock/|/torch/utils/(cpp_ext|file_baton)",
        "compile",
    ),
    (r"/torch/utils/data/", "data"),
    (r"/torch/(distributed|nn/parallel)/", "collective"),
    (r"/torch/optim/(lr_scheduler|swa_utils)\.py", "between steps"),
    (r"/torch/optim/", "optimizer"),
    (r"/torch/autograd/|/torch/_tensor\.py:\d+:backward", "backward"),
    (r"/torch/serialization\.py|/safetensors/|/torch/_weights_only", "checkpoint"),
    (r"/torch/nn/", "forward"),
)
"""What calls the line, by the first of its callers that one of these patterns finds."""

INSIDE: frozenset[Phase] = frozenset({"optimizer", "backward", "forward"})
"""Phases in which torch calls, and no honest code waits."""

ARITHMETIC = re.compile(r"/torch/(optim|nn|autograd)/[^:]*\.py|/torch/_tensor\.py")
"""Files of torch that never sleep in any release."""

CALL_WORDS = {"futex": "a lock with a time limit", "waits": "a call"}


@dataclass(frozen=True, slots=True)
class _Where:
    """A line that time was lost at."""

    place: str
    function: str
    phase: Phase
    standing: Standing


@dataclass(slots=True)
class _Loss:
    """What one line cost one process."""

    where: _Where
    samples: int = 0
    calls: set[str] = field(default_factory=set)
    first: Evidence | None = None
    told: bool = False
    outcome: Outcome | None = None
    steps: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Slow:
    """One slow step while it lasts: (line, on a processor or not, elapsed, without a processor) at each look."""

    median_ns: int
    wall_ns: int
    looks: list[tuple[_Where, bool, int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a process said to one question."""

    stack: int
    same: bool
    """The thread had not run since it was looked at."""
    done: int | None
    """Steps finished."""
    since_ns: int


@dataclass(slots=True)
class _Process:
    """What the record says of one process that makes steps."""

    number: int
    rank: int | None = None
    stacks: dict[int, tuple[str, ...]] = field(default_factory=dict)
    answers: dict[int, _Answer] = field(default_factory=dict)
    asked: dict[int, Evidence] = field(default_factory=dict)
    """Questions whose answer has not come."""
    waiting: deque[tuple[Evidence, _Where, int]] = field(default_factory=deque)
    """Sleeps that are part of training only once another step follows."""
    step: int = 0
    steps: int = 0
    at: int = 0
    began: int = 0
    losses: dict[_Where, _Loss] = field(default_factory=dict)
    slow: dict[int, _Slow] = field(default_factory=dict)
    base: dict[str, int] = field(default_factory=dict)
    """Innermost line → how often it was met at no occasion."""
    slow_lost: dict[tuple[_Where, bool], list[float]] = field(default_factory=dict)
    """(line, on a processor) → seconds lost in each slow step."""
    queued: float = 0.0
    """Seconds of slow steps in which the thread was ready and had no processor."""
    recent: dict[int, int] = field(default_factory=dict)
    """Step → its wall time, for the last ones."""
    window_ns: int = 0
    samples: int = 0
    asleep: int = 0
    queue_ns: int = 0
    throttled_ns: int = 0
    cpus: int | None = None
    nice: int | None = None

    @property
    def seconds(self) -> float:
        """From its first step to its last."""
        return (self.at - self.began) / 1e9


@dataclass(frozen=True, slots=True)
class _Stuck:
    """Where one process was when steps had stopped."""

    evidence: Evidence
    process: _Process
    stack: tuple[str, ...]


class Stalls:
    """See the module."""

    name = "stalls"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._origins = Origins(context)
        self._processes: dict[int, _Process] = {}
        self._ranks: dict[int, int | None] = {}
        self._world = 1
        self._held = self._broken = 0
        self._notes: list[str] = []
        self._explained: list[str] = []
        self._hangs: dict[int, list[_Stuck]] = {}
        self._lengths: dict[int, int] = {}

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        self._origins.see(evidence)
        if evidence.kind == "process":
            self._see_process(evidence)
        elif evidence.kind == "step" and evidence.source == "process":
            yield from self._see_step(evidence)
        elif evidence.kind == "stack" and evidence.source == "process":
            yield from self._see_stack(evidence)
        elif evidence.kind == "stall" and evidence.source == "supervisor":
            yield from self._see_stall(evidence)
        elif evidence.kind == "pace" and evidence.source == "supervisor":
            self._see_pace(evidence)

    # -- records -----------------------------------------------------------------------------------------------------

    def _see_process(self, evidence: Evidence) -> None:
        hello = evidence.body.get("hello")
        env = hello.get("env") if isinstance(hello, dict) else None
        world = env.get("WORLD_SIZE") if isinstance(env, dict) else None
        if isinstance(world, str) and world.isdigit() and len(world) < 8:
            self._world = max(self._world, int(world))

    def _see_step(self, evidence: Evidence) -> Iterator[Finding]:
        process = self._process(evidence)
        if process is None or evidence.step is None:
            return
        wall = _count(evidence.body.get("wall_ns")) if process.at else 0
        process.began = process.began or evidence.at
        process.steps += 1
        if wall:
            process.recent[evidence.step] = wall
        if len(process.recent) > 2048:
            process.recent = dict(list(process.recent.items())[1024:])
        if evidence.step in process.slow:
            process.slow[evidence.step].wall_ns = wall
        process.step, process.at = max(process.step, evidence.step), evidence.at
        while process.waiting and process.waiting[0][2] < process.step:
            yield from self._sleeps(process, *process.waiting.popleft())

    def _see_stack(self, evidence: Evidence) -> Iterator[Finding]:
        process = self._process(evidence)
        ask, number, frames = (evidence.body.get(name) for name in ("ask", "id", "frames"))
        if process is None or not isinstance(ask, int) or not isinstance(number, int):
            return
        if isinstance(frames, list) and len(process.stacks) < OPEN_LIMIT:
            told = tuple(frame[:4500] for frame in frames[:FRAMES_LIMIT] if isinstance(frame, str))
            process.stacks.setdefault(number, told)
        if len(process.answers) >= OPEN_LIMIT:
            process.answers.clear()
        done = evidence.body.get("done")
        process.answers[ask] = _Answer(
            number,
            evidence.body.get("same") is True,
            done if isinstance(done, int) and 0 <= done < 1 << 62 else None,
            _count(evidence.body.get("since_ns")),
        )
        record = process.asked.pop(ask, None)
        if record is not None:
            yield from self._answered(process, record)

    def _see_stall(self, evidence: Evidence) -> Iterator[Finding]:
        process = self._process(evidence)
        ask = evidence.body.get("ask")
        if process is None or not isinstance(ask, int):
            return
        if ask in process.answers:
            yield from self._answered(process, evidence)
        elif len(process.asked) < OPEN_LIMIT:
            process.asked[ask] = evidence

    def _see_pace(self, evidence: Evidence) -> None:
        body = evidence.body
        if isinstance(body.get("blind"), str):
            self._note(f"the training thread could not be looked at: {body['blind'][:200]}")
            return
        process = self._process(evidence)
        if process is None:
            return
        process.window_ns += _count(body.get("window_ns"))
        process.samples += _count(body.get("samples"))
        process.queue_ns += _count(body.get("queue_ns"))
        process.throttled_ns += _count(body.get("throttled_ns"))
        asleep = body.get("asleep")
        process.asleep += sum(_count(n) for n in asleep.values()) if isinstance(asleep, dict) else 0
        process.cpus = body.get("cpus") if isinstance(body.get("cpus"), int) else process.cpus
        process.nice = body.get("nice") if isinstance(body.get("nice"), int) else process.nice
        self._held += _count(body.get("samples")) > 0

    def _answered(self, process: _Process, record: Evidence) -> Iterator[Finding]:
        """A question with its answer."""
        answer = process.answers.pop(record.body["ask"])
        stack = process.stacks.get(answer.stack, ())
        why, call = record.body.get("why"), record.body.get("call")
        if why == "hang":
            yield from self._see_hang(_Stuck(record, process, stack))
            return
        if not stack:
            return
        if why == "base":
            process.base[stack[0]] = process.base.get(stack[0], 0) + 1
        where = self._blame(stack)
        done = answer.done if answer.done is not None else record.step or 0
        if why in ("asleep", "timed") and answer.same and (why == "asleep" or _waits_for_lock(stack)):
            if done < process.step:
                yield from self._sleeps(process, record, where, done)
            elif len(process.waiting) < OPEN_LIMIT:
                process.waiting.append((record, where, done))
            return
        median = _count(record.body.get("median_ns"))
        elapsed = answer.since_ns or _count(record.body.get("elapsed_ns"))
        if why == "slow" or (median and elapsed > max(1.5 * median, median + 30e6)):
            if done + 1 not in process.slow and len(process.slow) >= OPEN_LIMIT:
                self._book_slow(process, process.slow.pop(next(iter(process.slow))))
            slow = process.slow.setdefault(done + 1, _Slow(median, process.recent.get(done + 1, 0)))
            slow.looks.append((where, call == "running", elapsed, _count(record.body.get("queue_ns"))))

    # -- sleeps ------------------------------------------------------------------------------------------------------

    def _sleeps(self, process: _Process, record: Evidence, where: _Where, done: int) -> Iterator[Finding]:
        """The training thread slept between two of its steps."""
        if where not in process.losses and len(process.losses) >= 256:
            return
        loss = process.losses.setdefault(where, _Loss(where))
        loss.samples += max(1, _count(record.body.get("samples")))
        loss.calls.add(str(record.body.get("call"))[:40])
        loss.steps.add(done + 1)
        loss.first = loss.first or record
        if loss.samples < 2 or loss.told:
            return
        outcome = self._weight(process, loss)
        if outcome is None:
            return
        loss.told, loss.outcome = True, outcome
        yield self._finding(
            record,
            process,
            outcome,
            f"{self._who(process)} sleeps in its training thread: {_calls(loss)} at {where.place} ({where.function}), "
            f"{_phase(where.phase)}; the line is in {whose(where.standing)}",
            where=where,
            step=min(loss.steps),
            expected="a training thread that works, or waits for data, devices or other ranks",
            found=f"{_calls(loss)} in step {min(loss.steps)}",
        )

    def _weight(self, process: _Process, loss: _Loss) -> Outcome | None:
        """What a sleep at this line weighs; None: nothing, or not yet."""
        where, strict = loss.where, loss.calls != {"futex"}
        locked = self._origins.lock is not None
        if self._origins.approves(self.name, where.place) or (locked and where.standing == "approved"):
            if where.place not in self._explained and len(self._explained) < NOTES_LIMIT:
                self._explained.append(where.place)
            return None
        if where.standing in ("library", "guard", "cache"):
            made_to = strict and where.phase in INSIDE and ARITHMETIC.search(where.place) is not None
            return "suspicious" if made_to and not locked else None
        if where.standing == "planted" and locked:
            return "violated" if strict else "suspicious"
        if where.phase in INSIDE:
            return "suspicious"
        return "suspicious" if self._is_much(process, self._seconds(process, loss)[1]) else None

    def _seconds(self, process: _Process, loss: _Loss) -> tuple[float, float, float]:
        """Seconds slept at a line: least, likely, most. Looks are a sample of the time (Wilson, 95 %)."""
        total = max(process.samples, 1)
        known = sum(other.samples for other in process.losses.values())
        seen = max(loss.samples, round(process.asleep * loss.samples / known) if known else 0)
        if process.samples < seen:  # no balance yet: the looks themselves, at the pace they are made
            likely = loss.samples * 0.05
            return 0.5 * likely, likely, 2 * likely
        low, high = _wilson(seen, total)
        seconds = process.seconds
        return low * seconds, seen / total * seconds, high * seconds

    def _is_much(self, process: _Process, seconds: float) -> bool:
        return seconds >= LOST_SECONDS and seconds >= LOST_SHARE * process.seconds

    # -- slow steps --------------------------------------------------------------------------------------------------

    def _book_slow(self, process: _Process, slow: _Slow) -> None:
        """What a slow step lost, less what it waited for a processor, goes to its most frequent line."""
        median = slow.median_ns or (int(statistics.median(process.recent.values())) if process.recent else 0)
        if not slow.looks:
            return
        _, _, elapsed, queue = slow.looks[-1]
        lost = (
            max(slow.wall_ns, elapsed) - median
        ) / 1e9  # steps told of together say their mean: the look knows better
        if lost <= 0:
            return
        queued = min(lost, queue / 1e9)
        process.queued += queued
        keys = [(where, running) for where, running, _, _ in slow.looks]
        key = max(dict.fromkeys(keys), key=keys.count)
        if len(process.slow_lost) < 256 or key in process.slow_lost:
            process.slow_lost.setdefault(key, []).append(lost - queued)

    def _slow_steps(self, process: _Process) -> Iterator[Finding]:
        """Lines that account for slow steps."""
        for step, slow in process.slow.items():
            if step <= process.step:
                self._book_slow(process, slow)
        process.slow = {}
        total = sum(sum(lost) for lost in process.slow_lost.values())
        for (where, running), lost in process.slow_lost.items():
            seconds = sum(lost)
            if len(lost) < SLOW_STEPS or seconds < SLOW_SHARE * total or not self._is_much(process, seconds):
                continue
            if where in process.losses and process.losses[where].told:
                continue
            if running and not self._is_unusual(process, where, total, seconds):
                continue
            yield from self._slow_line(process, where, running, lost)

    def _is_unusual(self, process: _Process, where: _Where, total: float, seconds: float) -> bool:
        """Whether a line takes more of the slow steps than of the run at large."""
        looks = sum(process.base.values())
        usual = sum(n for frame, n in process.base.items() if _place(frame) == where.place)
        return looks < 5 or seconds / total > 2 * usual / looks

    def _slow_line(self, process: _Process, where: _Where, running: bool, lost: list[float]) -> Iterator[Finding]:
        seconds = sum(lost)
        does = "is busy" if running else "waits"
        message = (
            f"{len(lost)} slow steps of {self._who(process)} lost {seconds:.1f} s ({_share(seconds, process.seconds)}) "
            f"while its thread {does} at {where.place} ({where.function}), {_phase(where.phase)}; "
            f"{self._hours(0.5 * seconds, seconds)}"
        )
        locked = self._origins.lock is not None
        if self._origins.approves(self.name, where.place):
            self._explained.append(where.place)
        elif (where.standing == "planted" and locked) or (
            not locked and not running and where.phase in INSIDE and where.standing in ("own", "foreign", "generated")
        ):
            yield self._finding(None, process, "suspicious", message, where=where)
        else:
            self._note(message)

    # -- hangs -------------------------------------------------------------------------------------------------------

    def _see_hang(self, stuck: _Stuck) -> Iterator[Finding]:
        """Steps stopped; judged once every process has said where it is."""
        body = stuck.evidence.body
        number, of = _count(body.get("hang")), _count(body.get("of"))
        group = self._hangs.setdefault(number, []) if len(self._hangs) < 16 or number in self._hangs else []
        group.append(stuck)
        if len(group) == of:
            yield from self._judge_hang(group)

    def _judge_hang(self, group: list[_Stuck]) -> Iterator[Finding]:
        waiting = [one for one in group if self._world > 1 and _waits_for_ranks(one.stack, one.evidence.body)]
        odd = [one for one in group if one not in waiting]
        idle = [one for one in odd if _is_idle(one.evidence.body)]
        for one in group:
            self._note(f"steps stopped: {self._stands(one)}")
        for one in idle:
            where = self._blame(one.stack) if one.stack else None
            if where is None or where.standing in _TRUSTED or self._origins.approves(self.name, where.place):
                continue  # noted above; a library that saves, loads or compiles may take its time
            if waiting and where.phase not in _SLOW_BY_NATURE and one.evidence.body.get("state") != "D":
                yield self._hung(one, where, f"; {len(waiting)} of {len(group)} ranks wait for it in a collective")
            elif where.phase in INSIDE and one.evidence.body.get("kind") == "asleep":
                yield self._hung(one, where, "")

    def _hung(self, one: _Stuck, where: _Where, rest: str) -> Finding:
        return self._finding(
            one.evidence,
            one.process,
            "suspicious",
            f"steps stopped: {self._stands(one)}{rest}; a deadlock or a slow disk can do that too",
            where=where,
            expected="a step now and then, or work",
            found=f"none for {_count(one.evidence.body.get('elapsed_ns')) / 1e9:.0f} s",
        )

    def _stands(self, one: _Stuck) -> str:
        """One process, and where it stands."""
        body = one.evidence.body
        does = {"running": "works", "asleep": "sleeps"}.get(str(body.get("kind")), "waits")
        does = {"T": "is stopped by a signal", "D": "waits for a device or disk"}.get(str(body.get("state")), does)
        call = str(body.get("call"))[:40]
        at = ""
        if one.stack:
            where = self._blame(one.stack)
            at = f" at {where.place} ({where.function}), {_phase(where.phase)}"
        seconds = _count(body.get("elapsed_ns")) / 1e9
        return f"{self._who(one.process)} made none for {seconds:.0f} s and {does} in {call}{at}"

    # -- lines -------------------------------------------------------------------------------------------------------

    def _blame(self, stack: tuple[str, ...]) -> _Where:
        """The innermost line that is not the standard library's, and what called it."""
        chosen = next((frame for frame in stack if not self._is_standard(frame)), stack[0])
        place = _place(chosen)
        standing = self._origins.standing(place)
        phase: Phase = "between steps"
        for frame in stack:
            called_by = next((name for pattern, name in _PATTERNS if pattern.search(frame)), None)
            if called_by is not None:
                phase = called_by
                break
        return _Where(place, _function(chosen), phase, standing)

    def _is_standard(self, frame: str) -> bool:
        place = _place(frame)
        if self._origins.standing(place) != "library" or "-packages/" in place:
            return False
        area, tree, _ = self._origins.area(place.rpartition(":")[0])
        return place.startswith("<frozen ") or (area == "library" and not tree.startswith(("site", "user")))

    # -- the balance -------------------------------------------------------------------------------------------------

    def end(self) -> Iterator[Finding | LinkState]:
        for process in self._processes.values():
            yield from self._balance(process)
        for process in self._processes.values():
            yield from self._slow_steps(process)
            self._label(process)
        if not self._held and not self._notes:
            self._note("no training thread was looked at long enough")
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(self._notes),
            explained=tuple(dict.fromkeys(self._explained)),
            required=False,
        )

    def _balance(self, process: _Process) -> Iterator[Finding]:
        """What each line cost, now that the whole run is known."""
        for loss in process.losses.values():
            low, likely, high = self._seconds(process, loss)
            message = (
                f"{self._who(process)} slept {low:.1f} to {high:.1f} s ({_share(likely, process.seconds)} of its "
                f"training time) in {len(loss.steps)} or more of {process.steps} steps at {loss.where.place} "
                f"({loss.where.function}), {_phase(loss.where.phase)}: {self._hours(low, high)}"
            )
            outcome = loss.outcome or (self._weight(process, loss) if loss.samples > 1 else None)
            if outcome is not None and loss.first is not None:
                message += self._contrast(process)
                step = min(loss.steps)
                yield self._finding(loss.first, process, outcome, message, where=loss.where, step=step, counts=False)
            elif self._is_much(process, likely) or (loss.samples > 1 and loss.where.standing not in _TRUSTED):
                self._note(message)

    def _hours(self, low: float, high: float) -> str:
        """Device-hours lost: at least this rank's, at most those of every rank that waited for it."""
        if self._world == 1:
            return f"{low / 3600:.2g} to {high / 3600:.2g} device-hours lost"
        return (
            f"{low / 3600:.2g} device-hours lost (this rank alone) to {high * self._world / 3600:.2g} "
            f"(all {self._world} ranks waiting for it)"
        )

    def _contrast(self, accused: _Process) -> str:
        """Ranks that are slow for another reason, so that nobody mixes them up."""
        others = [(p, self._reason(p)) for p in self._processes.values() if p is not accused]
        told = [f"{self._who(p)} is slow for another reason: {reason}" for p, reason in others if reason is not None]
        return "".join(f"; {text}" for text in told[:4])

    def _label(self, process: _Process) -> None:
        reason = self._reason(process)
        if reason is not None:
            self._note(f"{self._who(process)}: {reason}; that is not its own doing")

    def _reason(self, process: _Process) -> str | None:
        """Why a rank is slow that does nothing wrong; None when it is not."""
        if not process.window_ns:
            return None
        seconds = process.window_ns / 1e9
        stopped, queued = process.throttled_ns / 1e9, process.queue_ns / 1e9
        cpus = [p.cpus for p in self._processes.values() if p.cpus is not None]
        if stopped >= LABEL_SHARE * seconds:
            return f"throttled: the quota of its control group held it back for {stopped:.1f} of {seconds:.1f} s (A11)"
        if queued >= LABEL_SHARE * seconds:
            reason = f"co-tenant load: ready to run, but without a processor, for {queued:.1f} of {seconds:.1f} s"
            if process.nice is not None and process.nice > 0:
                reason += f", at nice {process.nice}"
            if process.cpus is not None and cpus and process.cpus < max(cpus):
                reason += f", on {process.cpus} processors where another rank has {max(cpus)}"
            return reason
        return None

    # -- words -------------------------------------------------------------------------------------------------------

    def _process(self, evidence: Evidence) -> _Process | None:
        number = evidence.process
        if number is None or (number not in self._processes and len(self._processes) >= OPEN_LIMIT):
            return None
        process = self._processes.setdefault(number, _Process(number))
        process.rank = evidence.rank if evidence.rank is not None else process.rank
        return process

    def _who(self, process: _Process) -> str:
        return f"rank {process.rank}" if process.rank is not None else "the training process"

    def _note(self, text: str) -> None:
        if text not in self._notes and len(self._notes) < NOTES_LIMIT:
            self._notes.append(text)

    def _finding(
        self,
        evidence: Evidence | None,
        process: _Process,
        outcome: Outcome,
        message: str,
        *,
        where: _Where | None,
        step: int | None = None,
        expected: str | None = None,
        found: str | None = None,
        counts: bool = True,
    ) -> Finding:
        self._broken += counts
        finding = finding_from(
            self.name,
            outcome,
            message,
            *([evidence] if evidence is not None else []),
            run=self._run,
            techniques=("F7",),
            path=where.place if where is not None else None,
            step=step,
            expected=expected,
            found=found,
        )
        rank = process.rank if process.rank is not None else finding.subject.rank
        return replace(finding, subject=replace(finding.subject, rank=rank))


_TRUSTED = ("library", "guard", "cache", "approved")
_SLOW_BY_NATURE: tuple[Phase, ...] = ("checkpoint", "data", "compile")
_PATTERNS: tuple[tuple[re.Pattern[str], Phase], ...] = tuple((re.compile(p), phase) for p, phase in PHASES)


def _place(frame: str) -> str:
    """`file:line` of a frame `file:line:function`."""
    return frame.rpartition(":")[0] or frame


def _function(frame: str) -> str:
    return frame.rpartition(":")[2][:80]


def _waits_for_lock(stack: tuple[str, ...]) -> bool:
    """Whether Python itself waits with a time limit; a thread that wants the interpreter waits in the same call."""
    return bool(re.search(r"/(threading|queue|_base|synchronize|popen_fork)\.py:\d+:", stack[0])) if stack else False


def _waits_for_ranks(stack: tuple[str, ...], body: dict[str, Any]) -> bool:
    """Whether a thread stands in a collective, or in the backward pass that ends with one."""
    if body.get("kind") in ("running", "asleep") or body.get("state") in ("T", "D"):
        return False
    return bool(stack) and bool(re.search(r"/torch/(distributed|autograd|nn/parallel)/", stack[0]))


def _is_idle(body: dict[str, Any]) -> bool:
    return _count(body.get("cpu_ns")) < 0.05 * max(1, _count(body.get("elapsed_ns")))


def _phase(phase: Phase) -> str:
    return phase if phase == "between steps" else f"in {'a ' if phase == 'collective' else ''}{phase}"


def _calls(loss: _Loss) -> str:
    return ", ".join(sorted(CALL_WORDS.get(call, call) for call in loss.calls))


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "all"


def _count(value: object) -> int:
    """A count from a record; 0 for anything that is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else 0


def _wilson(seen: int, total: int) -> tuple[float, float]:
    """95 % range of a share of which `seen` of `total` looks were found (Wilson 1927)."""
    z, share = 1.96, seen / total
    centre = share + z * z / (2 * total)
    width = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)
