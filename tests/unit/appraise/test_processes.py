"""Silence of the supervisor is a finding while it is at work, and only then."""

from __future__ import annotations

from typing import Any

from trainguard.appraise.interface import Context
from trainguard.appraise.processes import Processes
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.policy import Policy

SECOND = 1_000_000_000


def judged(*records: tuple[float, str]) -> list[Finding]:
    """Findings over supervisor records given as (time in seconds, kind)."""
    check = Processes(Context(run="r", policy=Policy(heartbeat_seconds=10), blob=lambda digest: b""))
    found: list[Any] = []
    for number, (at, kind) in enumerate(records):
        body = {"status": 0} if kind == "end" else {}
        record = Evidence(n=number, at=int(at * SECOND), source="supervisor", kind=kind, body=body)
        found.extend(check.see(record))
    return [*found, *(each for each in check.end() if isinstance(each, Finding))]


def test_a_supervisor_that_falls_silent_at_work_is_a_finding() -> None:
    (finding,) = judged(
        (0, "start"), (1, "measurement"), (2, "ledger"), (10, "heartbeat"), (60, "heartbeat"), (61, "end")
    )
    assert finding.outcome == "suspicious"
    assert finding.techniques[0] == "G4"
    assert "50 s" in finding.message


def test_measuring_before_and_sealing_after_may_take_their_time() -> None:
    records = [(0.0, "start"), (90.0, "measurement"), (91.0, "ledger"), (95.0, "end"), (300.0, "seal")]
    assert judged(*records) == []


def test_a_record_without_an_end_is_a_finding() -> None:
    (finding,) = judged((0, "start"), (1, "ledger"), (5, "heartbeat"))
    assert "stops without an end" in finding.message
