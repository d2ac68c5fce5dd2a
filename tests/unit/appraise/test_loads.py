"""The check *loads* over records."""

from __future__ import annotations

from typing import Any

from trainguard.appraise.interface import Context
from trainguard.appraise.loads import Loads
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.policy import Approval, Policy


def judge(
    *records: tuple[str, str, dict[str, Any]], approve: tuple[Approval, ...] = ()
) -> tuple[list[Finding], LinkState]:
    """Findings and the link's state after (source, kind, body) records."""
    check = Loads(Context(run="r", policy=Policy(approve=approve), blob=lambda _: b""))
    found: list[Finding] = []
    for number, (source, kind, body) in enumerate(records):
        found += check.see(Evidence(n=number, at=0, source=source, kind=kind, body=body))
    (state,) = check.end()
    return found, state


def test_safe_files_hold_and_unknown_ones_are_blind() -> None:
    """Neither is a finding as long as nothing was refused."""
    found, state = judge(
        ("supervisor", "opened", {"path": "/a", "verdict": "safe", "findings": []}),
        ("supervisor", "opened", {"path": "/b", "verdict": "unknown", "findings": [], "why": "names x.Y"}),
        ("supervisor", "opened", {"left_out": 7, "quiet": 2}),
        ("process", "load", {"unvetted": "/c", "why": "timed out"}),
    )
    assert not found
    assert state.held == 1
    assert [reason.split(":")[0] for reason in state.blind] == ["/b", "7 model files were not vetted", "/c"]
    assert not state.required


def test_a_refusal_and_a_name_that_runs_code_are_suspicious() -> None:
    """Each told once; only the supervisor says what was opened."""
    name = {"global": "posix.system", "place": "/job/a.py:3", "refused": False}
    found, state = judge(
        ("supervisor", "opened", {"path": "/b", "verdict": "unknown", "findings": [], "why": "?", "refused": True}),
        ("process", "opened", {"path": "/z", "verdict": "unknown", "findings": [], "refused": True}),
        ("process", "load", name),
        ("process", "load", name),
    )
    assert [(f.outcome, f.techniques, f.subject.path) for f in found] == [
        ("suspicious", ("E1",), "/b"),
        ("suspicious", ("E1",), "/job/a.py:3"),
    ]
    assert state.state == "broken"


def test_an_approved_line_explains_the_name() -> None:
    """Some jobs send commands around in pickles."""
    approve = (Approval(check="loads", place="/job/a.py:3"),)
    found, state = judge(("process", "load", {"global": "posix.system", "place": "/job/a.py:3"}), approve=approve)
    assert not found
    assert state.state == "explained"


def test_bodies_that_are_not_as_specified_are_passed_over() -> None:
    """A process can write what it likes."""
    found, state = judge(
        *(("process", "load", body) for body in ({}, {"global": 3}, {"global": "a.b", "place": []}, {"unvetted": {}})),
        ("supervisor", "opened", {"verdict": 3}),
    )
    assert not found
    assert state.held == 0
