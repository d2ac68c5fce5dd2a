"""Check *replay*: what the audits in the log say of a run (spec/replay.md, docs/checks/replay.md).

An audit is a signed statement; its report lies among the blobs under the digest that the statement signs. A report that
is gone or altered counts for nothing and is said. Replayed steps and the chance of detection are counted over the
audits whose self-test passed: those in an environment measured apart where there are any, and all others where there
are none. A difference is a finding of whichever audit has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from trainguard.errors import TrainguardError
from trainguard.finding import Finding, LinkState

TAMPERED_FRACTIONS = (0.1, 0.01)
TOLERANCES_TOLD = 20


class _Segment(msgspec.Struct, frozen=True):
    number: int
    first: int
    last: int


class _Plan(msgspec.Struct, frozen=True):
    nonce: str
    segments: tuple[_Segment, ...]
    chosen: tuple[int, ...]


class _Reading(msgspec.Struct, frozen=True):
    kinds: tuple[str, ...]
    steps: int
    excess: float
    undetectable: float
    by: str


class _Result(msgspec.Struct, frozen=True):
    segment: int
    first: int
    last: int
    outcome: str
    compared: int = 0
    reason: str | None = None
    reading: _Reading | None = None


class _Report(msgspec.Struct, frozen=True):
    run: str
    plan: _Plan
    selftest: dict[str, Any]
    environment: dict[str, Any]
    results: tuple[_Result, ...]
    findings: tuple[Finding, ...]


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """What all audits of a run come to."""

    findings: tuple[Finding, ...] = ()
    steps: int = 0
    """Steps that were replayed and equal."""
    detection: dict[str, float] = {}
    apart: bool = False
    """Whether what is counted here was replayed in an environment that was measured apart and is the approved one."""
    link: LinkState | None = None
    """None where nobody audited."""
    tolerances: tuple[str, ...] = ()
    """Of what was replayed on another build: the class, and the largest effect that it would hide."""


@dataclass(slots=True)
class _Tally:
    """What audits in one kind of environment come to together."""

    segments: int = 0
    """Segments that there were to draw from."""
    compared: dict[tuple[int, int], int] = field(default_factory=dict)
    """First and last step of a segment that was equal → steps compared in it."""
    tolerances: list[str] = field(default_factory=list)

    def take(self, report: _Report) -> None:
        self.segments = max(self.segments, len(report.plan.segments))
        equal = [result for result in report.results if result.outcome == "equal"]
        self.compared.update({(result.first, result.last): result.compared for result in equal})
        self.tolerances.extend(_tolerance(result) for result in equal if result.reading is not None)


def replayed(run: str, audits: Sequence[Mapping[str, Any]], blob: Callable[[str], bytes]) -> Replayed:
    """audits: bodies of the run's `audit/v1` statements, each with the digest of its report under `report`.

    Where an approved environment, measured apart, replayed anything equal, then steps, detection and tolerances are
    of what was replayed there, and nothing else raises them. Findings and reasons are of all audits.
    """
    if not audits:
        return Replayed()
    findings: list[Finding] = []
    blind: list[str] = []
    approved, others = _Tally(), _Tally()
    for audit in audits:
        try:
            report = msgspec.json.decode(blob(str(audit.get("report"))), type=_Report)
        except (TrainguardError, msgspec.DecodeError) as error:
            blind.append(f"the report of an audit cannot be read: {error}")
            continue
        if report.run != run:
            blind.append(f"the report of an audit is about run {report.run}")
            continue
        if report.selftest.get("passed") is not True:
            blind.append(f"an audit counts for nothing: {report.selftest.get('reason') or 'its self-test failed'}")
            continue
        findings.extend(finding for finding in report.findings if finding.check == "replay")
        blind.extend(f"steps {r.first} to {r.last}: {r.reason}" for r in report.results if r.outcome == "not replayed")
        (approved if report.environment.get("approved") is True else others).take(report)
    tally = approved if approved.compared else others
    steps = sum(tally.compared.values())
    unique = tuple({msgspec.json.encode(finding): finding for finding in findings}.values())
    link = LinkState(
        link="replay", held=steps, broken=len(unique), blind=tuple(dict.fromkeys(blind))[:20], required=False
    )
    return Replayed(
        findings=unique,
        steps=steps,
        detection={str(s): detection(tally.segments, len(tally.compared), s) for s in TAMPERED_FRACTIONS},
        apart=tally is approved,
        link=link,
        tolerances=tuple(dict.fromkeys(tally.tolerances))[:TOLERANCES_TOLD],
    )


def _tolerance(result: _Result) -> str:
    """What a segment's comparison by size stands on, and the largest effect that it hides."""
    reading = result.reading
    if reading is None:
        return ""
    share = min(1.0, reading.undetectable)
    return (
        f"replay: steps {result.first} to {result.last} were replayed on another build ({', '.join(reading.kinds)}) "
        f"and are equal within its tolerance ({reading.by}), not bit for bit: an act that changes under {share:.2g} "
        "of what the segment moved the weights by would not be seen"
    )


def detection(total: int, drawn: int, tampered: float) -> float:
    """Chance that of `drawn` segments out of `total` at least one is among the share `tampered` that is bad."""
    bad = max(1, round(total * tampered))
    if drawn <= 0 or total <= 0:
        return 0.0
    if drawn + bad > total:
        return 1.0
    return round(1.0 - math.comb(total - bad, drawn) / math.comb(total, drawn), 6)
