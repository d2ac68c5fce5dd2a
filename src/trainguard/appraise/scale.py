"""Check *scale*: what a command does as rank 0 of a big job and not as rank 0 of a small one (F4, F5).

The same command was probed (watch/probe.py) once at a small world size, with the same seeds and the same share of the
data, and then at each planned size or under another identity. Honest code has little reason to differ:

    a link breaks, or a finding of another check comes up, only there     as grave as that finding
    lines run, files open, programs start or sleeps occur only there      suspicious, with place and step
    hyper-parameters differ (learning rates scale with the job)           listed, never an accusation

Lines inside torch's own distributed code differ by nature and are listed. A place that is honest is approved once
(`[[approve]] check = "scale"`). A function of values: records in, one verdict out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec.structs import replace

from trainguard.appraise.processes import signal_name
from trainguard.appraise.verdict import Verdict, decide
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Finding, LinkState, Subject
from trainguard.policy import Policy

EXPECTED = ("/torch/distributed/", "/torch/utils/data/distributed.py", "/torch/nn/parallel/", "/torch/testing/")
"""Parts of torch that depend on the world size by nature."""

SLEEP_SECONDS = 0.001
"""Shorter naps are polling."""

LISTED_LIMIT = 20
PLACES_SHOWN = 6


@dataclass(slots=True)
class Observation:
    """What one probed run did."""

    world: int
    identity: Mapping[str, str] = field(default_factory=dict)
    """What it was made to believe besides the world size; empty for what is true."""
    findings: list[Finding] = field(default_factory=list)
    """Of the other checks."""
    lines: dict[str, dict[int, int]] = field(default_factory=dict)
    """File → line → optimizer steps made when it first ran."""
    code: set[str] = field(default_factory=set)
    opened: dict[str, tuple[str | None, int | None]] = field(default_factory=dict)
    """File read → (place, step)."""
    spawned: dict[str, tuple[str | None, int | None]] = field(default_factory=dict)
    sleeps: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Place → (seconds, steps made at the first)."""
    groups: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    """(optimizer, group) → hyper-parameters at its first step."""
    replaced: list[str] = field(default_factory=list)
    steps: int = 0
    stopped: str | None = None
    status: int | None = None
    signal: int | None = None
    timed_out: bool = False
    """Ended by us: it did not stop in time."""
    tail: str = ""
    """Last line the command printed on stderr."""

    @property
    def name(self) -> str:
        """`world size 256`, with the assumed identity if there is one."""
        names = ", ".join(f"{key}={value}" for key, value in self.identity.items())
        return f"world size {self.world}" + (f" as {names}" if names else "")

    @property
    def failed(self) -> str | None:
        """Why there is nothing to compare, or None."""
        if self.steps:
            return None
        if self.timed_out:
            return "it made no optimizer step in the time it was given"
        how = f"status {self.status}" if self.signal is None else signal_name(self.signal)
        return f"it ended with {how} before its first optimizer step" + (f": {self.tail[:200]}" if self.tail else "")


def observe(
    records: Iterable[Evidence], findings: Sequence[Finding], *, world: int, identity: Mapping[str, str], tail: str
) -> Observation:
    """The observation in the records of one probed run. Bodies that are not as specified are passed over."""
    seen = Observation(world=world, identity=identity, findings=list(findings), tail=tail)
    readers: dict[str, Callable[[Observation, Evidence], None]] = {
        "probe": _take_probe,
        "step": _take_step,
        "steps": _take_steps,
        "code": _take_code,
        "open": _take_open,
        "spawn": _take_spawn,
        "end": _take_end,
        "timed_out": _take_time,
    }
    for record in records:
        reader = readers.get(record.kind)
        if reader is not None:
            reader(seen, record)
    return seen


def _take_probe(seen: Observation, record: Evidence) -> None:
    lines, sleeps = record.body.get("lines"), record.body.get("sleeps")
    for file, ran in lines.items() if isinstance(lines, dict) else ():
        known = seen.lines.setdefault(str(file), {})
        for line, step in ran.items() if isinstance(ran, dict) else ():
            if str(line).isdigit() and isinstance(step, int):
                known[int(line)] = step
    for place, value in sleeps.items() if isinstance(sleeps, dict) else ():
        if isinstance(value, list) and len(value) == 3 and isinstance(value[1], int | float):
            seen.sleeps[str(place)] = (float(value[1]), value[2] if isinstance(value[2], int) else 0)
    if isinstance(record.body.get("stopped"), str):
        seen.stopped = record.body["stopped"]
    if isinstance(record.body.get("replaced"), str):
        seen.replaced.append(f"{record.body['replaced'][:200]}: {record.body.get('why')}")


def _take_steps(seen: Observation, record: Evidence) -> None:
    try:
        for each in unfold(record):
            _take_step(seen, each)
    except MalformedEvidence:
        return  # a finding of the judge's


def _take_step(seen: Observation, record: Evidence) -> None:
    seen.steps += 1
    value = record.body.get("hyperparameters")
    groups = value.get("groups") if isinstance(value, dict) else None
    for index, group in enumerate(_list(groups)):
        opt = record.body.get("opt")
        if isinstance(group, dict) and isinstance(opt, int):
            seen.groups.setdefault((opt, index), group)


def _take_code(seen: Observation, record: Evidence) -> None:
    for line in _list(record.body.get("files")):
        if isinstance(line, list) and len(line) == 4 and isinstance(line[0], str):
            seen.code.add(line[0])


def _take_open(seen: Observation, record: Evidence) -> None:
    for line in _list(record.body.get("files")):
        if isinstance(line, dict) and line.get("mode") in ("r", "mapped") and isinstance(line.get("path"), str):
            step = line.get("step")
            place = line.get("place")
            seen.opened.setdefault(
                _steady(line["path"]),
                (place if isinstance(place, str) else None, step if isinstance(step, int) else None),
            )


def _take_spawn(seen: Observation, record: Evidence) -> None:
    words = record.body.get("args")
    place = record.body.get("place")
    text = " ".join(str(word) for word in words)[:300] if isinstance(words, list) else ""
    seen.spawned.setdefault(_steady(text), (place if isinstance(place, str) else None, record.step))


def _take_end(seen: Observation, record: Evidence) -> None:
    status, number = record.body.get("status"), record.body.get("signal")
    seen.status = status if isinstance(status, int) else None
    seen.signal = number if isinstance(number, int) else None


def _take_time(seen: Observation, record: Evidence) -> None:
    seen.timed_out = True


def _installed(file: str) -> bool:
    return "/site-packages/" in file or "/dist-packages/" in file


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _steady(text: str) -> str:
    """`text` without what is new in every run: pids, times, names of temporary files."""
    return re.sub(r"\d+", "#", re.sub(r"tmp[a-z0-9_]{8}", "tmp*", text))


# -- the comparison ----------------------------------------------------------------------------------------------------


def compare(
    base: Observation, others: Sequence[Observation], policy: Policy, *, again: Sequence[Observation] = ()
) -> Verdict:
    """The verdict on a probe: `others` beside `base`, the small job as it is.

    again: some of `others` probed a second time. Seeds are equal, so what depends on the size comes again; what is
    suspicious in only one of two probes (a finalizer ran at another moment) is not checked, neither found nor clean.
    """
    judge = _Comparison(base, policy)
    if base.failed is not None:
        judge.blind.append(f"{base.name} could not be probed: {base.failed}")
    else:
        for other in others:
            judge.add(other)
        judge.confirm(again)
    link = LinkState(
        link="scale",
        held=judge.held,
        broken=len(judge.findings),
        blind=tuple(judge.blind),
        explained=tuple(dict.fromkeys(judge.explained)),
    )
    steps = base.steps + sum(other.steps for other in others)
    verdict = decide(judge.findings, [link], steps=steps, watched_steps=steps, policy=policy.digest)
    words = [
        f"compared {', '.join(o.name for o in others)} with {base.name}, {max(o.steps for o in others)} steps each"
    ]
    reasons = words + [r for r in verdict.reasons if not r.startswith("every link held")] + judge.listed[:LISTED_LIMIT]
    return replace(verdict, reasons=tuple(reasons))


class _Comparison:
    """Findings, what is only listed, and what could not be compared."""

    def __init__(self, base: Observation, policy: Policy) -> None:
        self.base = base
        self.policy = policy
        self.findings: list[Finding] = []
        self.listed: list[str] = []
        self.blind: list[str] = []
        self.explained: list[str] = []
        self.held = 0
        if base.findings:
            self.listed.append(
                f"{len(base.findings)} finding(s) come up at {base.name} as well: judge them with trainguard run"
            )

    def add(self, other: Observation) -> None:
        """Compare one observation with the base."""
        before = len(self.findings)
        if other.signal is not None and self.base.signal is None and not other.timed_out:
            self._end(other)
        elif other.failed is not None:
            self.blind.append(f"{other.name} could not be probed: {other.failed}")
            return
        for part in (self._lines, self._links, self._code, self._opened, self._spawned, self._sleeps):
            for finding in part(other):
                self._keep(finding)
        self._hyperparameters(other)
        self.listed += [f"at {other.name} not run as it is: {what}" for what in other.replaced]
        self.held += len(self.findings) == before

    def confirm(self, again: Sequence[Observation]) -> None:
        """Hold what is suspicious against a second probe of the same size and identity."""
        for other in again:
            second = _Comparison(self.base, self.policy)
            second.add(other)
            known = {_key(finding) for finding in second.findings}
            for index, finding in enumerate(self.findings):
                its = f"only at {other.name}: " in finding.message
                if its and finding.outcome == "suspicious" and _key(finding) not in known:
                    message = f"in one of two probes {finding.message}"
                    self.findings[index] = replace(finding, outcome="not_checked", techniques=(), message=message)

    def _keep(self, finding: Finding) -> None:
        place = finding.subject.path
        if place is not None and self.policy.approves("scale", place):
            self.explained.append(place)
        else:
            self.findings.append(finding)

    def _finding(
        self,
        other: Observation,
        outcome: Literal["violated", "suspicious"],
        message: str,
        *also: str,
        **subject: Any,
    ) -> Finding:
        techniques = {"F4"} if other.world != self.base.world else set()
        first = (*sorted(techniques), *(("F5",) if other.identity else ()))
        return Finding(
            check="scale",
            outcome=outcome,
            techniques=tuple(dict.fromkeys((*first, *also))),
            subject=Subject(rank=0, **subject),
            message=f"only at {other.name}: {message}",
            expected=f"the same at {self.base.name}",
        )

    def _lines(self, other: Observation) -> Iterator[Finding]:
        """Python lines that ran only there, one finding a file."""
        own = False
        for file, lines in sorted(other.lines.items(), key=lambda item: (_installed(item[0]), item[0])):
            known = self.base.lines.get(file, {})
            new = {line: step for line, step in lines.items() if line not in known}
            if not new:
                continue
            shown = ", ".join(str(line) for line in sorted(new)[:PLACES_SHOWN])
            if any(part in file for part in EXPECTED) or (own and _installed(file)):
                why = "which the lines above may have called" if own else "torch's distributed code"
                self.listed.append(f"at {other.name}, {file} also ran line {shown}: {why}")
                continue
            first = min(new, key=lambda line: (new[line], line))
            more = f" and {len(new) - PLACES_SHOWN} more" if len(new) > PLACES_SHOWN else ""
            own = own or not (_installed(file) or self.policy.approves("scale", f"{file}:{first}"))
            message = f"{file} ran line{'s' if len(new) > 1 else ''} {shown}{more}"
            yield self._finding(other, "suspicious", message, path=f"{file}:{first}", step=new[first] + 1)

    def _links(self, other: Observation) -> Iterator[Finding]:
        """Findings of other checks that the small job does not have."""
        known = {_key(finding) for finding in self.base.findings}
        told: set[tuple[str, ...]] = set()
        for finding in other.findings:
            key = _key(finding)
            if finding.outcome == "not_checked" or key in known or key in told:
                continue
            told.add(key)
            subject = finding.subject
            new = self._finding(
                other,
                finding.outcome,
                f"check {finding.check}: {finding.message}",
                *finding.techniques,
                step=subject.step,
                tensor=subject.tensor,
                path=subject.path or self._cause(other, subject.step),
            )
            yield replace(new, expected=finding.expected or new.expected, found=finding.found)

    def _cause(self, other: Observation, step: int | None) -> str | None:
        """The place of code that ran only there, by the time `step` was over: the likeliest cause."""
        for finding in self.findings:
            at = finding.subject.step
            if other.name in finding.message and finding.subject.path and (step is None or at is None or at <= step):
                return finding.subject.path
        return None

    def _code(self, other: Observation) -> Iterator[Finding]:
        ran = set(other.lines)
        for file in sorted(other.code - self.base.code):
            if file in ran or file in self.base.lines:
                continue
            if any(part in file for part in EXPECTED):
                self.listed.append(f"at {other.name}, {file} was loaded too")
                continue
            yield self._finding(other, "suspicious", f"{file} was loaded", path=file)

    def _opened(self, other: Observation) -> Iterator[Finding]:
        for file, (place, step) in sorted(other.opened.items()):
            if file not in self.base.opened:
                yield self._finding(other, "suspicious", f"{file} was read", path=place or file, step=step)

    def _spawned(self, other: Observation) -> Iterator[Finding]:
        for text, (place, step) in sorted(other.spawned.items()):
            if text not in self.base.spawned:
                yield self._finding(other, "suspicious", f"a program was started: {text}", path=place, step=step)

    def _sleeps(self, other: Observation) -> Iterator[Finding]:
        for place, (seconds, step) in sorted(other.sleeps.items()):
            if place not in self.base.sleeps and seconds > SLEEP_SECONDS:
                message = f"it slept {seconds:.3g} s at {place}"
                yield self._finding(other, "suspicious", message, "F7", path=place, step=step + 1)

    def _end(self, other: Observation) -> None:
        message = f"it was ended by {signal_name(other.signal or 0)} after {other.steps} steps"
        self._keep(self._finding(other, "suspicious", message, "F8", step=other.steps + 1))

    def _hyperparameters(self, other: Observation) -> None:
        """Differences by size are usual (learning rates scale with the job): listed."""
        for key, group in other.groups.items():
            known = self.base.groups.get(key)
            if known is None:
                continue
            for name in group:
                if group[name] != known.get(name):
                    self.listed.append(
                        f"hyper-parameter {name} of group {key[1]}: {known.get(name)} at {self.base.name}, "
                        f"{group[name]} at {other.name}"
                    )


def _key(finding: Finding) -> tuple[str, ...]:
    """What makes two findings of different runs the same: check, kind, and place or nothing."""
    first = finding.techniques[0] if finding.techniques else ""
    return finding.check, finding.outcome, first, _steady(finding.subject.path or "")
