"""An audit that follows a run: segments are drawn and replayed while the run goes on (spec/replay.md, "Following").

 1. A segment is fixed once the log's signed tree head holds the sealed state that ends it, of every rank: nobody in the
    job can change any more what it is held against. Where no such state comes, it ends with what steps committed to.
 2. Only then it is decided on, once: its nonce is made of that head and of the auditor's own random number. The first
    segment is replayed, then whatever the lot and the record itself ask for.
 3. The verifier proves itself on the first steps; where it cannot, the audit is over. What was drawn and is not
    replayed yet is replayed, neighbours together, one replay at a time.
 4. A difference is confirmed as in any audit (audit.py). The outcome is then logged at once and the audit is over:
    everything afterwards follows from it.
 5. When the run has ended, or its supervisor was killed, what is left is drawn from the last head, and that is all.

What is still being written is not there yet: a rank without steps, a state that is not sealed, a half record. The run
itself is only read: its log, its spool and its sealed states. Nobody in it waits for us.

    report = follow(home, run, Options(follow=True, budget=0.1), progress=print)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from trainguard.archive import LogLeaves, RunReader, is_running
from trainguard.digest import write_durably
from trainguard.errors import Misuse, TrainguardError, Unavailable
from trainguard.evidence import Evidence
from trainguard.home import Home
from trainguard.replay import plan
from trainguard.replay.audit import SELFTEST_STEPS, Auditor, Options, Progress, Report, Result
from trainguard.replay.committed import Committed, Gathering, Point
from trainguard.replay.files import kept_files
from trainguard.replay.keys import held_key
from trainguard.replay.plan import Draw, Segment
from trainguard.replay.tasks import Desk

NICE = 19
MOST_KILLABLE = "1000"
KEPT_LIMIT_BYTES = 64 << 20

SHORTEST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
READING_SHARE = 4
"""The log is read again after this many times what reading it took."""

UNSEALED_STEPS = 50
UNSEALED_SECONDS = 120.0
"""Without a sealed state of every rank for so long, and so many steps, a segment ends all the same."""

FAILED_READS = 5
"""In a row, before evidence that does not hold is taken for that and not for one that is being written."""

T = TypeVar("T")


@dataclass(slots=True)
class _Known:
    """What was read before."""

    leaves: LogLeaves
    gathering: Gathering
    segments: int = 0
    """Of the run's record, read to their end."""
    seals: list[Evidence] = field(default_factory=list)


class Follower(Auditor):
    """One audit of a run that goes on. Use once: `Follower(home, run, options).run()`."""

    def __init__(
        self,
        home: Home,
        run: str,
        options: Options,
        *,
        progress: Progress = lambda _text: None,
        wait: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """wait: lets the run go on for some seconds; clock: in seconds."""
        super().__init__(home, run, options, progress=progress)
        self._wait = wait
        self._clock = clock
        self._grown = clock()
        """When a segment was last decided on."""
        self._read_seconds = 0.0
        self._said = ""
        self._draws: list[Draw] = []
        self._known: _Known | None = None

    def run(self) -> Report:
        """Follow the run to its end, or to the first confirmed difference, and log the outcome.

        Raises TrainguardError where it cannot even begin: the run ended without anything that could be replayed.
        """
        running = self._await(lambda: min(rank.last for rank in self._committed.everyone) > SELFTEST_STEPS)
        self._refuse_shared_devices()
        self._command = self._words()
        folder, state = self._open(self._head)
        try:
            return self._followed(folder, state, running)
        finally:
            os.close(self._lock)

    def _followed(self, folder: Path, state: dict[str, Any], running: bool) -> Report:
        self._set_up(folder)
        self._draws = read_kept(folder / "draws.json", list[Draw], [])
        changed = self._changed()
        selftest: dict[str, Any] = {"passed": None, "reason": changed}
        if changed is None:
            selftest = self._kept("selftest", self._selftest)
            self._match(selftest)
        able = (
            selftest.get("passed") is True
        )  # else nothing of this audit would count: no need to wait for the run's end
        results = self._replay_as_it_goes(state, running) if able else []
        drawn = plan.Plan(
            nonce=state["nonce"],
            segments=self._segments(),
            chosen=tuple(draw.segment for draw in self._draws if draw.why),
            risky=tuple(draw.segment for draw in self._draws if draw.why not in ("", "lot")),
        )
        report = self._report(drawn, state, selftest, tuple(results))
        return self._concluded(msgspec.structs.replace(report, draws=tuple(self._draws)))

    # -- what there is -----------------------------------------------------------------------------------------------

    def _look(self, *, over: bool) -> None:
        """Read what the log proves by now."""
        began = time.monotonic()
        self._head, self._committed = self._read()
        if not over:  # of a file seen just now, the steps that it can have been written after are not all told
            last = max(self._committed.steps)
            self._files = tuple(file for file in self._files if file.until < last)
        self._read_seconds = time.monotonic() - began

    def _read(self) -> tuple[dict[str, Any], Committed]:
        """As `Auditor._read` does, but only what was logged since. Records that fail are read from the first one again;
        the head that was seen holds for good."""
        known = self._known
        leaves = LogLeaves(self._home, since=known.leaves if known is not None else None)
        reader = RunReader(self._home, self._run, leaves=leaves)
        if reader.begin is None:
            raise Misuse(f"run {self._run}: the log holds no statement of it")
        fresh = _Known(leaves, Gathering(self._run, reader.begin))
        known, self._known = known or fresh, fresh
        for record in reader.records(since=known.segments):
            known.gathering.take([record])
            if record.kind == "seal":
                known.seals.append(record)
        known.leaves, known.segments = leaves, len(reader.segments)
        self._known, self._reader = known, reader
        found = known.gathering.committed(held_key(self._home, self._run))
        walls = {number: step.wall_ns for number, step in found.steps.items()}
        self._files = kept_files(known.seals, self._home.blob, walls)
        return {"size": leaves.head.size, "root": leaves.head.root.hex()}, found

    def _await(self, enough: Callable[[], bool]) -> bool:
        """Wait until there is enough, or the run is over; returns whether it goes on."""
        failed = 0
        while True:
            running = is_running(self._home.run(self._run))  # asked first: what is sealed last is in the log by then
            try:
                self._look(over=not running)
                if not running or enough():
                    return running
                failed = 0
                self._say("following: waiting for the first steps of every rank")
            except (Unavailable, Misuse) as error:
                if not running:
                    raise
                self._say(f"following: not yet: {error}")
            except TrainguardError:
                failed += 1
                if not running or failed >= FAILED_READS:
                    raise
            self._pause()

    def _pause(self) -> None:
        self._wait(min(max(SHORTEST_WAIT_SECONDS, READING_SHARE * self._read_seconds), LONGEST_WAIT_SECONDS))

    def _refuse_shared_devices(self) -> None:
        """A replay beside the run on the run's own accelerator would take memory and time from it."""
        start, build = self._committed.start, self._committed.account.build or {}
        elsewhere = self._options.executor != "local" or bool(self._wanted.words)
        if elsewhere or not build.get("devices") or start.get("boot_id") != _boot_id():
            return
        raise Unavailable(
            f"run {self._run}: its replays would share {build['devices'][0]} with it, which would slow it",
            next_step="follow it from another machine (--env 'ssh HOST PYTHON', --executor), or audit it after its end",
        )

    # -- drawing and replaying ---------------------------------------------------------------------------------------

    def _replay_as_it_goes(self, state: Mapping[str, Any], running: bool) -> list[Result]:
        """Results of everything that was drawn, in order of steps."""
        kept = self._folder / "results.json"
        results = read_kept(kept, list[Result], [])
        tried = {result.first for result in results}
        while not any(result.outcome == "differs" for result in results):
            self._decide(state, over=not running)
            group = self._next(tried)
            if group:
                self._progress(f"following: replaying steps {group[0].first} to {group[-1].last}")
                results.extend(self._done(group))
                tried.update(segment.first for segment in group)
                write_durably(kept, msgspec.json.encode(results))
                if results[-1].outcome == "differs":
                    break  # the rest follows from it
                self._desk = Desk(self._folder / "tasks", self._executor, self._home.store_blob)  # lets go of frames
            elif running:
                self._tell(results)
                self._pause()
            else:
                break
            if running:
                running = self._await(lambda: True)
                self._tolerant.committed = self._committed
        return sorted(results, key=lambda result: result.first)

    def _decide(self, state: Mapping[str, Any], *, over: bool) -> None:
        """Decide on every segment that is fixed by now, by the head it was read under, and keep what was decided."""
        new = decisions(
            self._committed, self._draws, head=self._head, drawn=state["drawn"], share=self._options.budget,
            over=over, unsealed=self._unsealed(),
        )  # fmt: skip
        if new:
            self._draws.extend(new)
            self._grown = self._clock()
            write_durably(self._folder / "draws.json", msgspec.json.encode(self._draws))

    def _unsealed(self) -> int:
        """The step that a segment is ended with although no sealed state is there, for want of one; 0 for none: a rank
        must not put the audit off by writing none."""
        last = min(rank.last for rank in self._committed.everyone) - 1
        waited = self._clock() - self._grown >= UNSEALED_SECONDS
        return last if waited and last - _done(self._draws) >= UNSEALED_STEPS else 0

    def _segments(self) -> tuple[Segment, ...]:
        """As they were decided on, and what is still open."""
        done, last = _done(self._draws), self._committed.last
        rest = (Segment(number=len(self._draws), first=done + 1, last=last),) if done < last else ()
        return (*(Segment(number=draw.segment, first=draw.first, last=draw.last) for draw in self._draws), *rest)

    def _points(self, segment: Segment) -> list[Point]:
        """Of a segment that begins without a sealed state, the last ones before it."""
        return super()._points(segment) or self._points_by(segment.first - 1)

    def _next(self, tried: set[int]) -> list[Segment]:
        """The first stretch of neighbouring segments that were drawn and not tried."""
        left = [
            Segment(number=draw.segment, first=draw.first, last=draw.last)
            for draw in self._draws
            if draw.why and draw.first not in tried
        ]
        group: list[Segment] = []
        for segment in left:
            if group and segment.first != group[-1].last + 1:
                break
            group.append(segment)
        return group

    def _tell(self, results: Sequence[Result]) -> None:
        drawn = sum(bool(draw.why) for draw in self._draws)
        equal = sum(result.outcome == "equal" for result in results)
        unkeyed = "" if self._committed.key is not None else "; the run's key is not there: what is keyed is left out"
        self._say(
            f"following: step {min(rank.last for rank in self._committed.everyone)}; {len(self._draws)} segments are "
            f"fixed up to step {_done(self._draws)}, {drawn} drawn, {equal} replayed and equal{unkeyed}"
        )

    def _say(self, text: str) -> None:
        """One line, where it is another one than before."""
        if text != self._said:
            self._said = text
            self._progress(text)


def decisions(
    run: Committed,
    known: Sequence[Draw],
    *,
    head: Mapping[str, Any],
    drawn: str,
    share: float,
    over: bool,
    unsealed: int = 0,
) -> list[Draw]:
    """What is decided of the segments that are fixed and were not decided on before.

    known: decisions so far; they stand. head: `size` and `root` of the tree head that `run` was read from; drawn: the
    auditor's own random number; share: of segments replayed by lot, and of steps replayed for what the record has of
    unusual; over: the run is, so that the stretch after the last sealed state is fixed too; unsealed: a step that a
    segment ends with for want of a sealed state, 0 for none.
    """
    fixed = _fixed(run, known, over=over, unsealed=unsealed)
    told = set(plan.unusual(run, fixed))
    nonce = plan.make_nonce(run.run, str(head["root"]), int(head["size"]), drawn)
    least = known[0].last if known else fixed[0].last if fixed else 0
    spent = sum(draw.last - draw.first + 1 for draw in known if draw.why == "unusual")
    found: list[Draw] = []
    for segment in fixed:
        why = ""
        if segment.number == 0:
            why = "first"
        elif plan.lot(nonce, segment.number) < share:
            why = "lot"
        elif segment.number in told and spent + segment.steps <= max(share * segment.last, least):
            why, spent = "unusual", spent + segment.steps
        found.append(
            Draw(
                segment=segment.number,
                first=segment.first,
                last=segment.last,
                size=int(head["size"]),
                root=str(head["root"]),
                why=why,
            )
        )
    return found


def _fixed(run: Committed, known: Sequence[Draw], *, over: bool, unsealed: int) -> list[Segment]:
    """What follows on the segments that were decided on, up to the last step that can be an end by now."""
    done = _done(known)
    ends = {point.step for point in run.points} | {unsealed}
    stops = sorted(step for step in ends if done < step < run.last)
    if over and done < run.last:
        stops.append(run.last)
    starts = [done, *stops[:-1]]
    return [
        Segment(number=number, first=start + 1, last=stop)
        for number, (start, stop) in enumerate(zip(starts, stops, strict=False), len(known))
    ]


def _done(draws: Sequence[Draw]) -> int:
    """The last step that was decided on."""
    return draws[-1].last if draws else 0


def read_kept(path: Path, kind: type[T], nothing: T) -> T:
    """What an audit that was cut short had decided or found: it stands. `nothing` where there is none."""
    try:
        if path.stat().st_size > KEPT_LIMIT_BYTES:
            raise Unavailable(f"{path}: larger than {KEPT_LIMIT_BYTES} bytes")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return nothing
    except (OSError, msgspec.DecodeError) as error:
        raise Unavailable(
            f"{path}: what was kept of this audit cannot be read: {error}", next_step="delete its folder to begin anew"
        ) from error


def lower() -> None:
    """Have this process and all it starts give way to everything else on the machine: processor, disk and memory."""
    with contextlib.suppress(OSError):
        os.nice(NICE - os.nice(0))
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(MOST_KILLABLE)


def follow(home: Home, run: str, options: Options, *, progress: Progress = lambda _text: None) -> Report:
    """Audit `run` while it goes on. Raises Misuse for options that need the whole run, Unavailable as audit does."""
    if options.bisect or options.only is not None or options.confidence is not None:
        raise Misuse(
            "--follow decides on each segment as it is sealed: leave out --bisect, --segments and --confidence"
        )
    return Follower(home, run, msgspec.structs.replace(options, follow=True), progress=progress).run()


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None
