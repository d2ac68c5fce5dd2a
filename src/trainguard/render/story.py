"""One run as a value for people: what happened when, by which processes, at what pace, and what was found.

The terminal timeline, `show --json` and the HTML report are three views of one `Story`, so they cannot differ. A
story holds only what the log proves and what the verdict says; it decides nothing. It is bounded however long the
run was: curves are thinned to ranges, quiet stretches are folded into one line, lists end with a count.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import msgspec

from trainguard.appraise.judge import judge_run
from trainguard.appraise.processes import signal_name
from trainguard.appraise.verdict import Verdict
from trainguard.archive import LogLeaves, RunReader
from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.render import readings
from trainguard.render.line import plain
from trainguard.render.words import duration, plural
from trainguard.veil import MAINTENANCE

POINT_LIMIT = 240
"""Ranges kept of one curve; a report is read at about that many pixels."""

EVENT_LIMIT = 400
PROCESS_LIMIT = 100
CURVE_PROCESS_LIMIT = 16
"""Processes whose curves are kept; the first ones that step."""

DRAWN_LIMIT = 16
"""Curves shown on one page."""

CURVE_LIMIT = 400
"""Curves kept in all; a job names its metrics itself."""

SHOWN_PER_KIND = 12
"""Events of one kind that are listed one by one; the rest is counted."""

Tone = Literal["plain", "good", "bad", "warn", "quiet"]


class Point(msgspec.Struct, frozen=True):
    """The values of one curve over a range of steps."""

    first: int
    last: int
    low: float
    mean: float
    high: float


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One measured quantity over the steps of one process."""

    name: str
    """step_time, own_time, learning_rate, gradient_norm, loss, or a metric that the job reported."""
    unit: str
    process: int
    rank: int | None
    count: int
    low: float
    mean: float
    high: float
    points: tuple[Point, ...]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the timeline."""

    at: int | None
    """Supervisor's clock, nanoseconds since the epoch; None where a finding belongs to the whole run."""
    kind: str
    """The record's kind, `finding`, `first_step`, `quiet` for a folded stretch, or `more` for a count."""
    tone: Tone
    title: str
    detail: str = ""
    process: int | None = None
    rank: int | None = None
    step: int | None = None
    leaf: int | None = None
    hash: str | None = None


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One guarded process."""

    number: int
    pid: int | None
    uid: int | None
    ppid: int | None
    rank: int | None
    command: tuple[str, ...]
    python: str | None
    began: int
    ended: int | None = None
    said_bye: bool | None = None
    steps: int = 0
    of_the_job: bool = True


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the story rests on."""

    records: int = 0
    bytes: int = 0
    segments: int = 0
    unsealed_bytes: int = 0
    """Bytes past the last sealed segment: written, not proved, not told here."""
    run_leaf: int | None = None
    last_leaf: int | None = None
    origin: str = ""
    """Name of the log."""
    tree_size: int = 0
    root: str = ""
    """Merkle root of that size, base64 as in the tree head."""
    broken: str | None = None
    """Where the record stops being what was sealed; nothing after it is told."""


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """See the module."""

    schema: str = "trainguard/show/v1"
    run: str
    state: str
    """ended, running or unended."""
    command: tuple[str, ...]
    cwd: str | None
    host: str | None
    kernel: str | None
    account: str | None
    trainguard: str | None
    links: str | None
    """Which in-process checks were on: governed, all, none."""
    began: int | None
    ended: int | None
    status: int | None
    signal: str | None
    steps: int
    watched_steps: int
    own_ns: int
    """The guard's own time inside the training processes, summed over steps, nanoseconds."""
    step_ns: int
    """Wall time of all steps, nanoseconds."""
    processes: tuple[Process, ...]
    processes_more: int = 0
    events: tuple[Event, ...]
    curves: tuple[Curve, ...]
    counts: dict[str, int]
    """Records by kind."""
    record: Record
    verdict: Verdict

    def curve(self, name: str) -> Curve | None:
        """The curve of that name of the lowest rank that has one."""
        found = [curve for curve in self.curves if curve.name == name]
        return min(found, key=lambda curve: (curve.rank or 0, curve.process)) if found else None

    def drawn_curves(self) -> list[Curve]:
        """One curve of each name, at most DRAWN_LIMIT, in the order they are drawn."""
        names = readings.ordered(curve.name for curve in self.curves)[:DRAWN_LIMIT]
        return [curve for name in names if (curve := self.curve(name)) is not None]

    @property
    def wall_ns(self) -> int | None:
        """Nanoseconds from the first record to the last."""
        return self.ended - self.began if self.began is not None and self.ended is not None else None


def tell(home: Home, run: str, verdict: Verdict, *, leaves: LogLeaves | None = None) -> Story:
    """The story of `run`, with `verdict` on it. Raises VerificationError where the log itself does not verify."""
    reader = RunReader(home, run, leaves=leaves)
    teller = _Teller(verdict)
    broken = None
    try:
        for record in reader.records():
            teller.see(record)
    except VerificationError as error:
        broken = str(error)
    return teller.story(run, reader, broken)


def tell_run(home: Home, run: str) -> Story:
    """The story of `run` with its verdict, drawn anew. Raises as `judge_run` and `LogLeaves` do."""
    leaves = LogLeaves(home)
    return tell(home, run, judge_run(home, run, leaves=leaves), leaves=leaves)


class _Thin:
    """Keeps at most POINT_LIMIT ranges of a curve of any length, by merging neighbours when it is full."""

    def __init__(self) -> None:
        self.points: list[list[float]] = []
        self.width = 1
        self.count, self.total, self.low, self.high = 0, 0.0, float("inf"), float("-inf")

    def add(self, step: int, value: float) -> None:
        self.count, self.total = self.count + 1, self.total + value
        self.low, self.high = min(self.low, value), max(self.high, value)
        last = self.points[-1] if self.points else None
        if last is not None and last[5] < self.width:
            last[1], last[2], last[4] = step, min(last[2], value), max(last[4], value)
            last[3], last[5] = last[3] + value, last[5] + 1
            return
        if len(self.points) == POINT_LIMIT:
            self._halve()
        self.points.append([step, step, value, value, value, 1])

    def _halve(self) -> None:
        pairs = zip(self.points[::2], self.points[1::2], strict=True)
        self.points = [[a[0], b[1], min(a[2], b[2]), a[3] + b[3], max(a[4], b[4]), a[5] + b[5]] for a, b in pairs]
        self.width *= 2

    def ranges(self) -> tuple[Point, ...]:
        return tuple(
            Point(int(first), int(last), low, total / count, high)
            for first, last, low, total, high, count in self.points
        )


class _Quiet:
    """A stretch in which nothing notable happened."""

    def __init__(self) -> None:
        self.heartbeats = self.steps = self.files = self.opened = self.sweeps = 0
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.at: int | None = None

    def event(self) -> Event | None:
        parts = []
        if self.steps:
            span = f" ({self.first_step} to {self.last_step})" if self.steps > 1 else f" ({self.first_step})"
            parts.append(plural(self.steps, "step") + span)
        if self.files:
            parts.append(f"{plural(self.files, 'code file')} hashed as compiled")
        if self.opened:
            parts.append(f"{plural(self.opened, 'file')} opened")
        if self.sweeps:
            parts.append(f"{plural(self.sweeps, 'sweep')} of hooks, names and threads")
        if self.heartbeats:
            parts.append(plural(self.heartbeats, "heartbeat"))
        if not parts:
            return None
        return Event(at=self.at, kind="quiet", tone="quiet", title=", ".join(parts))


class _Teller:
    def __init__(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self._cited: dict[str, list[Finding]] = {}
        for finding in verdict.findings:
            if finding.evidence:
                self._cited.setdefault(finding.evidence[-1].hash, []).append(finding)
        self._placed: set[int] = set()
        self._start: dict[str, Any] = {}
        self._end: dict[str, Any] = {}
        self._first: int | None = None
        self._last: int | None = None
        self._processes: dict[int, Process] = {}
        self._processes_more = 0
        self._steps: dict[int | None, int] = {}
        self._own_ns = self._step_ns = 0
        self._curves: dict[tuple[int, str], _Thin] = {}
        self._curve_processes: dict[int, int | None] = {}
        self._readers: dict[int, readings.Reader] = {}
        self._events: list[Event] = []
        self._by_kind: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._quiet = _Quiet()
        self._records = 0

    # -- one record -----------------------------------------------------------------------------------------------

    def see(self, record: Evidence) -> None:
        self._records += 1
        self._counts[record.kind] = self._counts.get(record.kind, 0) + 1
        self._first = record.at if self._first is None else self._first
        self._last = record.at
        if record.kind in ("step", "steps"):
            self._steps_of(record)
        elif record.kind == "heartbeat":
            self._hush(record).heartbeats += 1
        elif record.kind in ("code", "open"):
            files = record.body.get("files")
            count = len(files) if isinstance(files, list) else 0
            quiet = self._hush(record)
            quiet.files += count if record.kind == "code" else 0
            quiet.opened += count if record.kind == "open" else 0
        elif record.kind == "sweep":
            self._hush(record).sweeps += 1
        elif record.kind == "metric":
            self._curve_values(record, readings.of_metrics(record.body))
        else:
            self._notable(record)
        for finding in self._cited.get(record.hash or "", ()):
            self._placed.add(id(finding))
            self._push(_finding_event(finding, record))

    def _hush(self, record: Evidence) -> _Quiet:
        self._quiet.at = self._quiet.at or record.at
        return self._quiet

    def _steps_of(self, record: Evidence) -> None:
        try:
            for each in unfold(record):
                self._step(each)
        except MalformedEvidence:
            return  # a finding of the judge's

    def _step(self, record: Evidence) -> None:
        body, step = record.body, record.step
        if record.process not in self._steps:
            self._push(_event(record, "first_step", "plain", f"first optimizer step of process {record.process}"))
        self._steps[record.process] = self._steps.get(record.process, 0) + 1
        own, wall = _nanoseconds(body.get("own_ns")), _nanoseconds(body.get("wall_ns"))
        self._own_ns += own or 0
        self._step_ns += wall or 0
        quiet = self._hush(record)
        quiet.steps += 1
        quiet.first_step = step if quiet.first_step is None else quiet.first_step
        quiet.last_step = step
        if record.process is None or step is None:
            return
        reader = self._readers.setdefault(record.process, readings.Reader())
        self._curve_values(record, reader.of_step(body))

    def _curve_values(self, record: Evidence, values: Iterator[tuple[str, float]]) -> None:
        process, step = record.process, record.step
        if process is None or step is None:
            return
        if len(self._curve_processes) < CURVE_PROCESS_LIMIT:
            self._curve_processes.setdefault(process, record.rank)
        if process not in self._curve_processes:
            return
        for name, value in values:
            if (process, name) in self._curves or len(self._curves) < CURVE_LIMIT:
                self._curves.setdefault((process, name), _Thin()).add(step, value)

    def _notable(self, record: Evidence) -> None:
        if record.kind == "start":
            self._start = record.body
        elif record.kind == "end":
            self._end = record.body
        elif record.kind == "process":
            self._greet(record)
        elif record.kind == "exit":
            self._leave(record)
        teller = EVENTS.get(record.kind)
        event = teller(record) if teller is not None else None
        if event is not None:
            self._push(event)

    def _greet(self, record: Evidence) -> None:
        if record.process is None:
            return
        if len(self._processes) >= PROCESS_LIMIT:
            self._processes_more += 1
            return
        hello = record.body.get("hello")
        version = hello.get("version") if isinstance(hello, dict) else None
        self._processes[record.process] = Process(
            number=record.process,
            pid=record.pid,
            uid=record.uid,
            ppid=_integer(record.body.get("ppid")),
            rank=record.rank,
            command=_strings(record.body.get("cmdline")),
            python=plain(version, 40) if isinstance(version, str) else None,
            began=record.at,
            of_the_job=record.body.get("of_the_job") is not False,
        )

    def _leave(self, record: Evidence) -> None:
        process = self._processes.get(record.process if record.process is not None else -1)
        if process is not None:
            bye = record.body.get("said_bye") is True
            self._processes[process.number] = msgspec.structs.replace(process, ended=record.at, said_bye=bye)

    # -- events ---------------------------------------------------------------------------------------------------

    def _push(self, event: Event) -> None:
        key = f"{event.kind}:{event.title.split(':')[0]}" if event.kind == "finding" else event.kind
        seen = self._by_kind[key] = self._by_kind.get(key, 0) + 1
        if seen > SHOWN_PER_KIND or len(self._events) >= EVENT_LIMIT:
            return
        folded = self._quiet.event()
        if folded is not None:
            self._events.append(folded)
        self._quiet = _Quiet()
        self._events.append(event)

    def _closing(self) -> Iterator[Event]:
        folded = self._quiet.event()
        if folded is not None:
            yield folded
        for key, seen in self._by_kind.items():
            if seen > SHOWN_PER_KIND:
                name = key.partition(":")[2] or key.replace("_", " ")
                more = plural(seen - SHOWN_PER_KIND, "more event") + f" of this kind not listed: {name}"
                yield Event(at=None, kind="more", tone="quiet", title=more)
        unplaced = [finding for finding in self._verdict.findings if id(finding) not in self._placed]
        for finding in unplaced[:SHOWN_PER_KIND]:
            yield _finding_event(finding, None)
        if len(unplaced) > SHOWN_PER_KIND:
            more = plural(len(unplaced) - SHOWN_PER_KIND, "more finding") + " on the run as a whole"
            yield Event(at=None, kind="more", tone="quiet", title=more)

    # -- the whole ------------------------------------------------------------------------------------------------

    def story(self, run: str, reader: RunReader, broken: str | None) -> Story:
        begin = self._start or reader.begin or {}
        number = _integer(self._end.get("signal"))
        return Story(
            run=run,
            state="ended" if reader.ended else "running" if reader.running else "unended",
            command=_strings(begin.get("command")),
            cwd=_text(begin.get("cwd")),
            host=_text(begin.get("host")),
            kernel=_text(begin.get("kernel")),
            account=_account(begin.get("account")),
            trainguard=_text(begin.get("trainguard")),
            links=_text((begin.get("settings") or {}).get("links"))
            if isinstance(begin.get("settings"), dict)
            else None,
            began=self._first,
            ended=self._last,
            status=_integer(self._end.get("status")),
            signal=signal_name(number) if number is not None else None,
            steps=sum(self._steps.values()),
            watched_steps=self._verdict.coverage.watched_steps,
            own_ns=self._own_ns,
            step_ns=self._step_ns,
            processes=tuple(
                msgspec.structs.replace(process, steps=self._steps.get(process.number, 0))
                for process in self._processes.values()
            ),
            processes_more=self._processes_more,
            events=tuple(self._shown((*self._events, *self._closing()))),
            curves=tuple(self._curve(*key) for key in sorted(self._curves)),
            counts=dict(sorted(self._counts.items())),
            record=self._record(reader, broken),
            verdict=self._verdict,
        )

    def _shown(self, events: Iterable[Event]) -> Iterator[Event]:
        """Events as this machine shows them: where something of the run is muted, none that sounds an alarm."""
        muted = MAINTENANCE in self._verdict.gaps
        return (event for event in events if not muted or event.tone not in ("bad", "warn"))

    def _curve(self, process: int, name: str) -> Curve:
        thin = self._curves[process, name]
        return Curve(
            name=name,
            unit=readings.UNITS.get(name, ""),
            process=process,
            rank=self._curve_processes[process],
            count=thin.count,
            low=thin.low,
            mean=thin.total / thin.count,
            high=thin.high,
            points=thin.ranges(),
        )

    def _record(self, reader: RunReader, broken: str | None) -> Record:
        return Record(
            records=self._records,
            bytes=sum(leaf.bytes for leaf in reader.segments),
            segments=len(reader.segments),
            unsealed_bytes=reader.unsealed_bytes,
            run_leaf=_integer((reader.begin or {}).get("leaf")),
            last_leaf=reader.segments[-1].leaf if reader.segments else None,
            origin=reader.head.origin,
            tree_size=reader.head.size,
            root=base64.b64encode(reader.head.root).decode(),
            broken=broken,
        )


# -- what each kind of record looks like in a timeline ------------------------------------------------------------


def _event(record: Evidence, kind: str, tone: Tone, title: str, detail: str = "") -> Event:
    return Event(
        at=record.at,
        kind=kind,
        tone=tone,
        title=plain(title, 500),
        detail=plain(detail, 500),
        process=record.process,
        rank=record.rank,
        step=record.step,
        leaf=record.leaf,
        hash=record.hash,
    )


def _finding_event(finding: Finding, record: Evidence | None) -> Event:
    tone: Tone = "bad" if finding.outcome == "violated" else "warn"
    if finding.outcome == "not_checked":
        tone = "quiet"
    title = plain(f"{finding.check}: {finding.message}", 500)
    subject = finding.subject
    cited = finding.evidence[-1] if finding.evidence else None
    return Event(
        at=record.at if record is not None else None,
        kind="finding",
        tone=tone,
        title=title,
        detail=plain(" · ".join(finding.techniques)),
        process=record.process if record is not None else None,
        rank=subject.rank,
        step=subject.step,
        leaf=cited.leaf if cited else None,
        hash=cited.hash if cited else None,
    )


def _on_start(record: Evidence) -> Event:
    body = record.body
    against = "against a lock" if isinstance(body.get("lock"), str) else "without a lock"
    return _event(record, "start", "plain", f"recording began, {against}", shlex.join(_strings(body.get("command"))))


def _on_measurement(record: Evidence) -> Event:
    return _event(record, "measurement", "plain", "what is about to run was measured", str(record.body.get("blob", "")))


def _on_unmeasured(record: Evidence) -> Event:
    return _event(record, "unmeasured", "warn", "what runs could not be measured", str(record.body.get("reason", "")))


def _on_process(record: Evidence) -> Event:
    foreign = record.body.get("of_the_job") is False
    title = f"process {record.process} (pid {record.pid}) reported"
    title += ", but does not descend from the job" if foreign else ""
    detail = shlex.join(_strings(record.body.get("cmdline")))
    return _event(record, "process", "warn" if foreign else "plain", title, detail)


def _on_exit(record: Evidence) -> Event | None:
    if record.body.get("said_bye") is True:
        return None
    title = f"process {record.process} (pid {record.pid}) left without saying goodbye"
    return _event(record, "exit", "quiet", title)


def _on_unheard(record: Evidence) -> Event:
    return _event(record, "unheard", "warn", f"process {record.process} (pid {record.pid}) went on without the guard")


def _on_boot(record: Evidence) -> Event:
    failed = record.body.get("failed")
    names = ", ".join(_strings(list(failed) if isinstance(failed, dict) else ()))
    return _event(record, "boot", "warn", f"parts of the guard could not be loaded: {names}")


def _on_silent(record: Evidence) -> Event:
    title = f"Python process {record.pid} never reported"
    return _event(record, "silent", "warn", title, shlex.join(_strings(record.body.get("cmdline"))))


def _on_spawn(record: Evidence) -> Event:
    command = shlex.join(_strings(record.body.get("args"))) or str(record.body.get("program", ""))
    place = str(record.body.get("place") or "")
    return _event(record, "spawn", "plain", f"process {record.process} started a program: {command}", place)


def _on_kill(record: Evidence) -> Event:
    number, pid = _integer(record.body.get("signal")), _integer(record.body.get("pid"))
    name = signal_name(number) if number is not None else "a signal"
    title = f"process {record.process} sent {name} to pid {pid}"
    return _event(record, "kill", "plain", title, str(record.body.get("place") or ""))


def _on_signal(record: Evidence) -> Event:
    number = _integer(record.body.get("signal"))
    name = signal_name(number) if number is not None else "a signal"
    sender = f"pid {record.body.get('from_pid')}, account {record.body.get('from_uid')}"
    return _event(record, "signal", "plain", f"{name} from {sender}, passed on to the command")


def _on_signalled(record: Evidence) -> Event:
    sender = record.body.get("sender")
    sender = sender if isinstance(sender, dict) else {}
    targets = record.body.get("targets")
    pids = [str(target.get("pid")) for target in _list(targets) if isinstance(target, dict)][:4]
    number = _integer(record.body.get("signal"))
    name = signal_name(number) if number is not None else str(record.body.get("call", "a signal"))
    to = f"to pid {', '.join(pids)}" if pids else "to nobody that was there"
    title = f"pid {sender.get('pid')} (account {sender.get('uid')}) sent {name} {to}"
    return _event(record, "signalled", "plain", title, shlex.join(_strings(sender.get("cmdline"))))


def _on_ledger(record: Evidence) -> Event | None:
    state = record.body.get("state")
    if state == "on":
        return None
    reason = str(record.body.get("reason") or "")
    return _event(record, "ledger", "quiet", f"senders of signals are not named: kill ledger {state}", reason)


def _on_seal(record: Evidence) -> Event:
    path = str(record.body.get("path", ""))
    if record.body.get("unsealed") is not None:
        return _event(record, "seal", "warn", f"saved and not sealed: {path}", str(record.body["unsealed"]))
    return _event(record, "seal", "plain", f"checkpoint saved and sealed: {path}")


def _on_opened(record: Evidence) -> Event:
    return _event(record, "opened", "plain", f"sealed checkpoint opened: {record.body.get('path', '')}")


def _on_label(record: Evidence) -> Event:
    values = record.body.get("values")
    pairs = list(values.items())[:16] if isinstance(values, dict) else []
    detail = ", ".join(f"{name} {value}" for name, value in pairs)
    return _event(record, "label", "quiet", f"named by {record.body.get('by')}", detail)


def _on_gap(record: Evidence) -> Event:
    lost = record.body.get("lost")
    what = f"{lost} records could not be stored" if lost else "frames of a process never arrived"
    return _event(record, "gap", "warn", what)


def _on_malformed(record: Evidence) -> Event:
    return _event(record, "malformed", "warn", f"process {record.pid} sent a message that is not a frame")


def _on_note(record: Evidence) -> Event | None:
    fault = record.body.get("fault")
    if not isinstance(fault, str):
        return None
    return _event(record, "note", "quiet", f"a check failed inside the guard: {fault}")


def _on_end(record: Evidence) -> Event:
    number, status = _integer(record.body.get("signal")), record.body.get("status")
    if "not_started" in record.body:
        return _event(record, "end", "warn", "the command was not started", str(record.body["not_started"]))
    wall = _nanoseconds(record.body.get("wall_ns"))
    after = f" after {duration(wall)}" if wall is not None else ""
    if number is not None:
        return _event(record, "end", "warn", f"the command was ended by {signal_name(number)}{after}")
    return _event(record, "end", "plain", f"the command ended with status {status}{after}")


EVENTS: dict[str, Callable[[Evidence], Event | None]] = {
    "start": _on_start,
    "measurement": _on_measurement,
    "unmeasured": _on_unmeasured,
    "process": _on_process,
    "exit": _on_exit,
    "silent": _on_silent,
    "unheard": _on_unheard,
    "boot": _on_boot,
    "spawn": _on_spawn,
    "kill": _on_kill,
    "signal": _on_signal,
    "signalled": _on_signalled,
    "ledger": _on_ledger,
    "seal": _on_seal,
    "opened": _on_opened,
    "label": _on_label,
    "gap": _on_gap,
    "malformed": _on_malformed,
    "note": _on_note,
    "end": _on_end,
}
"""record kind → its line; kinds that are not here are counted (`Story.counts`) and not listed."""


# -- values of unknown origin -------------------------------------------------------------------------------------


def _strings(value: object, limit: int = 64) -> tuple[str, ...]:
    """A list of words as it was recorded, each made safe to show; empty for anything else."""
    words: Iterable[object] = value if isinstance(value, list | tuple) else ()
    return tuple(plain(str(word), 300) for word in list(words)[:limit])


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return plain(value, 300) if isinstance(value, str) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _nanoseconds(value: object) -> int | None:
    number = _integer(value)
    return number if number is not None and 0 <= number < 1 << 62 else None


def _account(value: object) -> str | None:
    """`name (uid 1000), login uid 1000, session 3`."""
    if not isinstance(value, dict):
        return None
    name, uid = _text(value.get("name")), _integer(value.get("uid"))
    return f"{name or '?'} (uid {uid})" if uid is not None else name
