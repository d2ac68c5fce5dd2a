"""Which stretch of which device's time was lost, and for what: the rows that damage adds up.

    for row in rows_of(home, leaves, lineage, run): …

    tainted     work after the first proved act on the results (low: up to the last one seen; high: all of the run)
    descendant  all of a run that was made from such work
    suspect     all of a run in which something is open: only in the high figure
    redone      from the last checkpoint on disk to the moment a rank was killed: done for nothing, and done again
    idle        from that moment until the device begins its next step, in this run or in the one that goes on from it
    slowed      by how much steps were slower than the same process made them before, at the line that is named

Each moment of a device is counted in one row. What takes only time (kills, sleeps) spoils no result that is known of:
the work of such a run is presumed good, and stands in the high figure alone.

Taken off: ends that come by nature, where the sender is not known (`kills.BASE_RATE_PER_GPU_DAY`); slow steps that
there were before, where a line is named; and of a slow step, what a rank of it waited for a processor longer than it
usually does, which a sleep does not cause.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from trainguard.appraise.kills import BASE_RATE_PER_GPU_DAY
from trainguard.archive import LogLeaves, RunReader
from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.incident.graph import RANK
from trainguard.incident.lineage import Lineage, checkpoint_key, run_key

NS_PER_HOUR = 3_600_000_000_000
NS_PER_DAY = 24 * NS_PER_HOUR
INTERRUPTION_NS = 60_000_000_000
"""Kills closer together than this are one interruption; so is a kill and the end it causes."""
RESUMED_WITHIN_NS = NS_PER_DAY
"""A run that goes on later than this after a kill does so for a reason of its own."""
BASELINE_STEPS = 8
"""Steps before the first named sleep that make a baseline."""
SLOW_SHARE = 0.05
"""A step is slow when it takes this much longer than the baseline, or than three times its scatter."""
TIME_ONLY = frozenset({"F7", "F8", "F9", "A11"})
"""Techniques that take time and touch no result."""

Kind = Literal["tainted", "suspect", "descendant", "redone", "idle", "slowed"]
Stretch = tuple[int, int]
"""From, to: nanoseconds since the epoch, by the supervisor's clock."""


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Low, likely and high of one quantity."""

    low: float = 0.0
    likely: float = 0.0
    high: float = 0.0

    def plus(self, other: Range) -> Range:
        """Sum of both; ranges add end to end, which is the widest they can be."""
        return Range(low=self.low + other.low, likely=self.likely + other.likely, high=self.high + other.high)

    def times(self, price: Range) -> Range:
        """Each end at the price of the same end."""
        return Range(low=self.low * price.low, likely=self.likely * price.likely, high=self.high * price.high)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of one rank's time."""

    kind: Kind
    run: str
    rank: int | None
    process: int
    from_step: int | None
    to_step: int | None
    hours: Range
    """Device-hours."""
    why: str
    leaf: int | None = None
    """Log leaf of the finding or of the run's first statement."""


@dataclass(slots=True)
class Span:
    """When one process took which step; it occupies its device from hello to end."""

    run: str
    process: int
    rank: int | None
    steps: list[tuple[int, int, int]] = field(default_factory=list)
    """(step, when it ended, how long it took), in order."""
    began: int = 0
    ended: int = 0
    pid: int | None = None

    @property
    def device(self) -> int:
        """Rank, or for a job without ranks the process."""
        return self.rank if self.rank is not None else -1 - self.process

    @property
    def first_step_began(self) -> int:
        """When it began to work."""
        return max(self.began, self.steps[0][1] - self.steps[0][2]) if self.steps else self.ended

    def begins(self, step: int | None) -> int:
        """When `step` began, which is the end of the one before it; the beginning of the process for None."""
        if step is None:
            return self.began
        before = [at for number, at, _ in self.steps if number < step]
        return before[-1] if before else self.began

    def ends(self, step: int) -> int:
        """When `step` ended; the end of the process where it was not reached."""
        return next((at for number, at, _ in self.steps if number >= step), self.ended)


@dataclass(slots=True)
class _Course:
    """What the record of a run says about time."""

    spans: list[Span]
    at: dict[str, Evidence]
    """Hash → cited record."""
    saved: list[int]
    """When checkpoints were on disk, in order."""
    exits: list[Evidence]
    ended: int = 0
    waits: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)
    """Process → (from, to, share of that time it was ready and had no processor)."""

    def busy_ns(self, begin: int, end: int) -> int:
        """How long the rank that waited most for a processor did so from `begin` to `end`, above what is usual."""
        return max((int(_above_usual(windows, begin, end)) for windows in self.waits.values()), default=0)


@dataclass(slots=True)
class _Stop:
    """One interruption that somebody caused, or may have."""

    at: int
    finding: Finding
    low: float
    """Share of it that is proved."""
    likely: float


def rows_of(home: Home, leaves: LogLeaves, lineage: Lineage, run: str) -> Iterator[Row]:
    """One row for each process and kind of loss, where the run or what it was made from is tainted or suspect."""
    verdict, standing = lineage.verdicts[run], lineage.standing_of(run_key(run))
    if RANK[standing.word] < RANK["SUSPECT"]:
        return
    findings = [finding for finding in verdict.findings if finding.outcome != "not_checked"]
    course = _read(home, leaves, run, findings)
    bad = [finding for finding in findings if finding.outcome == "violated" and not takes_time_only(finding)]
    spoilt_at = _first_moment(course, bad)
    began = leaves.runs[run].get("leaf")
    inherited = _inherits(lineage, run)
    lost = list(_time_lost(course, findings, spoilt_at, _resumed_at(home, leaves, lineage, run, course)))
    for span in course.spans:
        for kind, claim in lost:
            if claim.span is span and claim.hours.high > 0:
                yield _row(span, kind, claim.hours, claim.why, claim.leaf)
        apart = [stretch for _, claim in lost if claim.span.device == span.device for stretch in claim.high]
        rest = _hours(_without([(span.began, span.ended)], apart))
        if inherited is not None:
            likely = rest if inherited.spoilt else 0.0
            yield _row(span, "descendant", Range(likely=likely, high=rest), inherited.why, began)
        elif bad:
            yield _tainted(span, course, bad, apart)
        elif standing.word == "SUSPECT":
            yield _row(span, "suspect", Range(high=rest), "suspect: cause open", began)
        else:
            why = "what was done takes time and touches no result that is known of: presumed good"
            yield _row(span, "tainted", Range(high=rest), why, began)


def _found(finding: Finding) -> str:
    """What a row rests on, in words that name no account: what is lost is no matter of who."""
    techniques = f" ({', '.join(finding.techniques[:3])})" if finding.techniques else ""
    step = f" at step {finding.subject.step:,}" if finding.subject.step is not None else ""
    word = "proved" if finding.outcome == "violated" else "suspicious"
    return f"{word}: check {finding.check}{step}{techniques}"


def takes_time_only(finding: Finding) -> bool:
    """Whether a finding is about an act that costs time and leaves results as they are."""
    return bool(finding.techniques) and set(finding.techniques) <= TIME_ONLY


def held(home: Home, leaves: LogLeaves, run: str) -> tuple[int, float]:
    """Devices of a run and the hours they were in it, whatever is said of the run."""
    spans = _read(home, leaves, run, ()).spans
    return len({span.device for span in spans}), sum(max(0, s.ended - s.began) for s in spans) / NS_PER_HOUR


# -- what was spoilt ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Inherited:
    spoilt: bool
    """Whether what it was made from is spoilt, and not merely slowed or open."""
    why: str


def _inherits(lineage: Lineage, run: str) -> _Inherited | None:
    """What the run was made from, where that decides; None where its own findings do."""
    standing = lineage.standing_of(run_key(run))
    if len(standing.because) < 2:
        return None
    source = lineage.graph.nodes.get(standing.because[0])
    verdict = lineage.verdicts.get(source.run) if source is not None and source.run is not None else None
    violated = [f for f in verdict.findings if f.outcome == "violated"] if verdict is not None else []
    spoilt = standing.word == "TAINTED" and not (violated and all(map(takes_time_only, violated)))
    return _Inherited(spoilt, f"made from {source.label if source is not None else 'what is not recorded'}")


def _first_moment(course: _Course, bad: Sequence[Finding]) -> int | None:
    """When the results began to be spoilt; None where they were not."""
    moments = [_moment(course, finding) for finding in bad]
    return min(moments) if moments else None


def _moment(course: _Course, finding: Finding) -> int:
    """When the step of a finding began, in the process that its record is about; the start of the run without one."""
    step = finding.subject.step
    cited = [course.at[citation.hash] for citation in finding.evidence if citation.hash in course.at]
    spans = [span for span in course.spans if any(span.process == record.process for record in cited)]
    if step is None:
        return min((span.began for span in course.spans), default=0)
    return min((span.begins(step) for span in spans or course.spans), default=0)


def _tainted(span: Span, course: _Course, bad: Sequence[Finding], apart: Sequence[Stretch]) -> Row:
    """Low: to the last act that was seen; likely: to the end; high: all of it, less what is counted elsewhere."""
    worst = min(bad, key=lambda finding: _moment(course, finding))
    first = max(span.began, min(_moment(course, worst), span.ended))
    steps = [finding.subject.step for finding in bad]
    known = [step for step in steps if step is not None]
    last = span.ended if len(known) < len(steps) else min(max(map(span.ends, known)), span.ended)
    whole = [(span.began, span.ended)]
    hours = Range(
        low=_hours(_without([(first, max(first, last))], apart)),
        likely=_hours(_without([(first, span.ended)], apart)),
        high=_hours(_without(whole, apart)),
    )
    leaf = worst.evidence[0].leaf if worst.evidence else None
    return _row(span, "tainted", hours, _found(worst), leaf, worst.subject.step)


# -- what took time ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Claim:
    """Time of one process that was lost without spoiling anything."""

    span: Span
    high: list[Stretch]
    hours: Range
    why: str
    leaf: int | None


def _time_lost(
    course: _Course, findings: Sequence[Finding], spoilt_at: int | None, resumed_at: int | None
) -> Iterator[tuple[Kind, _Claim]]:
    """Redone, idle and slowed time; from `spoilt_at` on only what no process was there for."""
    taken: dict[int, list[Stretch]] = {}
    stops = _stops(course, findings)
    for kind, span, stretch, low, likely, finding in (
        *_stopped(course, stops, resumed_at),
        *_slowed(course, findings),
    ):
        free = _without([stretch], taken.get(span.device, ()))
        if spoilt_at is not None:
            late = _without(free, [(0, spoilt_at)])
            occupied = [(s.began, s.ended) for s in course.spans if s.device == span.device]
            free = [*_without(free, [(spoilt_at, 1 << 63)]), *_without(late, occupied)]
        if not free:
            continue
        taken.setdefault(span.device, []).extend(free)
        hours = _hours(free)
        leaf = finding.evidence[0].leaf if finding.evidence else None
        yield kind, _Claim(span, free, Range(low=hours * low, likely=hours * likely, high=hours), _found(finding), leaf)


Piece = tuple[Kind, Span, Stretch, float, float, Finding]
"""Kind, process, stretch, and which shares of it are proved and likely."""


def _stops(course: _Course, findings: Sequence[Finding]) -> list[_Stop]:
    """Interruptions by a sender that is named, and those by nobody known where they are too many to be nature's."""
    stops: list[_Stop] = []
    for finding in findings:
        if finding.check != "kills" or "F8" not in finding.techniques:
            continue
        proved = 1.0 if finding.outcome == "violated" else 0.0
        for citation in finding.evidence:
            record = course.at.get(citation.hash)
            if record is not None and _ended_by(course, record):
                stops.append(_Stop(record.at, finding, proved, 1.0))
        if not finding.evidence:
            stops.extend(_unexplained(course, finding))
    stops.sort(key=lambda stop: (stop.at, -stop.low))
    kept: list[_Stop] = []
    for stop in stops:
        if not kept or stop.at - kept[-1].at > INTERRUPTION_NS:
            kept.append(stop)
    return kept


def _ended_by(course: _Course, record: Evidence) -> bool:
    """Whether a process that the signal went to ended soon after."""
    targets = record.body.get("targets")
    pids = {target.get("pid") for target in targets if isinstance(target, dict)} if isinstance(targets, list) else set()
    pids.add(record.body.get("target"))
    return any(each.pid in pids and 0 <= each.at - record.at <= INTERRUPTION_NS for each in course.exits)


def _unexplained(course: _Course, finding: Finding) -> list[_Stop]:
    """Ends by SIGKILL of nobody known, likely only as far as there are more of them than come by nature."""
    told = {record.at for record in course.at.values() if record.kind in ("signalled", "outside")}
    ends = [each for each in course.exits if _is_unexplained(each)]
    moments: list[int] = []
    for each in ends:
        near = any(0 <= each.at - at <= INTERRUPTION_NS for at in told)
        if not near and (not moments or each.at - moments[-1] > INTERRUPTION_NS):
            moments.append(each.at)
    days = sum(span.ended - span.began for span in course.spans) / NS_PER_DAY
    excess = max(0.0, 1 - BASE_RATE_PER_GPU_DAY * days / len(moments)) if moments else 0.0
    return [_Stop(at, finding, 0.0, excess) for at in moments]


def _is_unexplained(record: Evidence) -> bool:
    ended, memory = record.body.get("ended"), record.body.get("out_of_memory")
    killed = isinstance(ended, dict) and ended.get("signal") == 9
    return killed and not (isinstance(memory, dict) and any(memory.get(name) for name in ("group", "host", "named")))


def _stopped(course: _Course, stops: Sequence[_Stop], resumed_at: int | None) -> Iterator[Piece]:
    """What each device lost by each interruption."""
    for stop in stops:
        saved = max((at for at in course.saved if at <= stop.at), default=0)
        hit = [span for span in course.spans if span.began <= stop.at <= span.ended and span.steps]
        for span in hit:
            after = [s for s in course.spans if s.device == span.device and s.began > stop.at and s.steps]
            again = bool(after) or resumed_at is not None
            done = (max(saved, span.first_step_began), stop.at)
            yield "redone", span, done, stop.low if again else 0.0, stop.likely, stop.finding
            until = after[0].first_step_began if after else max(course.ended, stop.at)
            yield "idle", span, (stop.at, until), stop.low, stop.likely, stop.finding
            if not after and resumed_at is not None and until < resumed_at <= until + RESUMED_WITHIN_NS:
                yield "idle", span, (until, resumed_at), 0.0, stop.likely, stop.finding


def _resumed_at(home: Home, leaves: LogLeaves, lineage: Lineage, run: str, course: _Course) -> int | None:
    """When a run that goes on from this one's checkpoints on the same host with the same devices began to step."""
    if not any(f.check == "kills" and f.outcome != "not_checked" for f in lineage.verdicts[run].findings):
        return None
    devices, host = {span.device for span in course.spans}, leaves.runs[run].get("host")
    children = {
        edge.target.partition(":")[2]
        for seal in lineage.seals
        if seal.run == run
        for edge in lineage.graph.made_with(checkpoint_key(seal.root))
    }
    found = []
    for child in sorted(children & lineage.verdicts.keys() - {run}):
        if leaves.runs[child].get("host") != host or leaves.runs[child].get("command") != leaves.runs[run].get(
            "command"
        ):
            continue
        spans = _read(home, leaves, child, ()).spans
        if {span.rank for span in spans} == {span.rank for span in course.spans} and len(spans) >= len(devices):
            found += [span.first_step_began for span in spans if span.first_step_began >= course.ended]
    return min(found, default=None)


def _slowed(course: _Course, findings: Sequence[Finding]) -> Iterator[Piece]:
    """Steps that were slow from the first named sleep on, in the rank it was in and in those that waited for it."""
    first: dict[int, Finding] = {}
    for finding in findings:
        if finding.check != "stalls" or finding.subject.step is None:
            continue
        for span in _accused(course, finding):
            known = first.get(span.process)
            if known is None or (finding.subject.step, finding.outcome) < (known.subject.step or 0, known.outcome):
                first[span.process] = finding
    for process, finding in first.items():
        accused = next(span for span in course.spans if span.process == process)
        slow, share = _slow_steps(accused, finding.subject.step or 0)
        low = share if finding.outcome == "violated" else 0.0
        for span in course.spans:
            waits = span is not accused
            together = span.began <= accused.ended and accused.began <= span.ended
            if waits and not together:
                continue
            median = _median(span, finding.subject.step or 0)
            for number, at, wall in span.steps:
                if number in slow and (excess := wall - median) > 0:
                    own = share * max(0.0, 1 - course.busy_ns(at - wall, at) / excess)
                    yield "slowed", span, (at - excess, at), 0.0 if waits else min(low, own), own, finding


def _above_usual(windows: Sequence[tuple[int, int, float]], begin: int, end: int) -> float:
    """Nanoseconds without a processor from `begin` to `end`, above the median of all windows."""
    usual = statistics.median([share for _, _, share in windows]) if len(windows) > 2 else 0.0
    parts = (max(0, min(end, last) - max(begin, first)) * max(0.0, share - usual) for first, last, share in windows)
    return sum(parts)


def _accused(course: _Course, finding: Finding) -> list[Span]:
    cited = {course.at[c.hash].process for c in finding.evidence if c.hash in course.at}
    spans = [span for span in course.spans if span.process in cited and span.steps]
    return spans or [span for span in course.spans if span.rank == finding.subject.rank and span.steps]


def _median(span: Span, before: int) -> int:
    """What a step of this process takes: its median before step `before`, or over all where there are too few."""
    walls = [wall for number, _, wall in span.steps if number < before]
    walls = walls if len(walls) >= BASELINE_STEPS else [wall for _, _, wall in span.steps]
    return int(statistics.median(walls))


def _slow_steps(span: Span, first: int) -> tuple[set[int], float]:
    """Steps from `first` on that are slower than usual, and which share of that is more than there was before."""
    median = _median(span, first)
    before = [wall - median for number, _, wall in span.steps if number < first]
    scatter = 1.4826 * statistics.median([abs(each) for each in before]) if before else 0.0
    bar = max(3 * scatter, SLOW_SHARE * median)
    slow = {number: wall - median for number, _, wall in span.steps if number >= first and wall - median > bar}
    if not slow or len(before) < BASELINE_STEPS:
        return set(slow), 1.0
    usual = sum(each for each in before if each > bar) / len(before)
    after = sum(1 for number, _, _ in span.steps if number >= first)
    return set(slow), max(0.0, 1 - usual * after / sum(slow.values()))


# -- reading and arithmetic --------------------------------------------------------------------------------------------


def _read(home: Home, leaves: LogLeaves, run: str, findings: Sequence[Finding]) -> _Course:
    """One pass over the records of a run. What is proved is counted; a broken record ends it: the verdict says so."""
    wanted = {citation.hash for finding in findings for citation in finding.evidence}
    spans: dict[int, Span] = {}
    hellos: dict[int, Evidence] = {}
    course = _Course([], {}, [], [])
    try:
        for record in RunReader(home, run, leaves=leaves).records():
            course.ended = record.at
            if record.hash is not None and record.hash in wanted:
                course.at[record.hash] = record
            if record.kind == "seal" and record.body.get("leaf") is not None:
                course.saved.append(record.at)
            elif record.kind == "process" and record.process is not None:
                hellos[record.process] = record
            elif record.kind == "pace" and record.process is not None:
                course.waits.setdefault(record.process, []).extend(_window(record))
            elif record.kind == "exit":
                course.exits.append(record)
                if record.process in spans:
                    spans[record.process].ended = record.at
            elif record.kind in ("step", "steps") and record.process is not None and record.step is not None:
                span = spans.setdefault(record.process, Span(run, record.process, record.rank, pid=record.pid))
                span.steps.extend(_steps(record))
    except VerificationError:
        pass
    for number, span in spans.items():
        hello = hellos.get(number)
        span.began = hello.at if hello is not None else span.steps[0][1] if span.steps else 0
        span.ended = span.ended or course.ended
    course.spans = [span for span in spans.values() if span.steps]
    return course


def _steps(record: Evidence) -> list[tuple[int, int, int]]:
    """(step, when it ended, how long it took); steps that came together are set back from the last one."""
    try:
        lines = [(each.step or 0, _whole(each.body.get("wall_ns"))) for each in unfold(record)]
    except MalformedEvidence:
        return []
    at, found = record.at, []
    for number, wall in reversed(lines):
        found.append((number, at, wall))
        at -= wall
    return found[::-1]


def _window(record: Evidence) -> Iterator[tuple[int, int, float]]:
    """The stretch a `pace` record is about, and the share of it without a processor; nothing where it does not say."""
    length, queue, stopped = (_whole(record.body.get(name)) for name in ("window_ns", "queue_ns", "throttled_ns"))
    if length:
        yield record.at - length, record.at, min(1.0, max(queue, stopped) / length)


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else 0


def _row(span: Span, kind: Kind, hours: Range, why: str, leaf: object, step: int | None = None) -> Row:
    return Row(
        kind=kind,
        run=span.run,
        rank=span.rank,
        process=span.process,
        from_step=step if step is not None else span.steps[0][0],
        to_step=span.steps[-1][0],
        hours=hours,
        why=why,
        leaf=leaf if isinstance(leaf, int) else None,
    )


def _hours(stretches: Iterable[Stretch]) -> float:
    """Their sum; they do not overlap."""
    return sum(max(0, end - begin) for begin, end in stretches) / NS_PER_HOUR


def _without(stretches: Sequence[Stretch], taken: Iterable[Stretch]) -> list[Stretch]:
    """What is left of `stretches` outside every one of `taken`."""
    left = [stretch for stretch in stretches if stretch[0] < stretch[1]]
    for begin, end in taken:
        left = [
            part for low, high in left for part in ((low, min(high, begin)), (max(low, end), high)) if part[0] < part[1]
        ]
    return left
