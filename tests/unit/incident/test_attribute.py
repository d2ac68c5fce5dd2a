"""Candidates with what speaks against them: a framed account never stands first, and no person is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from trainguard.evidence import Evidence
from trainguard.finding import Citation, Finding, Subject
from trainguard.incident import attribute as module
from trainguard.incident.attribute import NO_LOGIN, SHARES, Attribution, Facts, attribute, facts_of
from trainguard.incident.correlate import grouped, severity

ACCOUNTS = {1001: "victim-b", 1002: "insider"}
HASH = "c" * 64


@pytest.fixture(autouse=True)
def accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_name", lambda uid: f"{ACCOUNTS.get(uid, 'account')} (uid {uid})")


def killed_by(**sender: Any) -> Attribution:
    """A SIGKILL whose sender the kernel named."""
    known = {"pid": 412, "comm": "sh", "cmdline": ["sh", "-c", "kill -9 300"], "ancestry": [[400, 1, "bash", "bash"]]}
    record = Evidence(
        n=7, at=0, source="supervisor", kind="signalled", body={"sender": known | sender}, hash=HASH, leaf=9
    )
    finding = Finding(
        check="kills",
        outcome="violated",
        techniques=("F8",),
        subject=Subject(run="r", rank=1, step=40),
        message="pid 412 sent SIGKILL to rank 1",
        evidence=(Citation(leaf=9, hash=HASH),),
    )
    start = Evidence(n=0, at=0, source="supervisor", kind="start", body={"host": "node-3", "account": {"uid": 1001}})
    return attribute(finding, facts_of([start, record], [finding]))


def test_a_sender_is_named_by_process_and_account() -> None:
    told = killed_by(uid=1002, loginuid=1002, session=7)
    assert [one.level for one in told.candidates] == ["A2", "A3", "A1"]
    assert told.candidates[1].what == "account insider (uid 1002)"
    assert not told.excluded
    assert "We have no independent evidence of who controlled it" in told.sentence


def test_a_framed_account_stands_below_the_session_it_was_used_from() -> None:
    """G9: the process ran as victim-b, but its audit login is insider's."""
    told = killed_by(uid=1001, loginuid=1002, session=7)
    accounts = [one for one in told.candidates if one.level == "A3"]
    assert [one.what for one in accounts] == [
        "login session 7 of account insider (uid 1002)",
        "account victim-b (uid 1001)",
    ]
    assert accounts[0].score > accounts[1].score
    assert any("somebody else's session" in line for line in accounts[1].against)
    assert told.excluded
    assert "victim-b" in told.excluded[0]
    assert "victim-b" not in told.sentence


def test_without_a_recorded_login_the_account_is_less_certain() -> None:
    known = next(one for one in killed_by(uid=1002, loginuid=1002, session=7).candidates if one.level == "A3")
    unknown = next(
        one for one in killed_by(uid=1002, loginuid=NO_LOGIN, session=NO_LOGIN).candidates if one.level == "A3"
    )
    assert unknown.score < known.score
    assert "no login is recorded" in unknown.alternatives


def file_finding(path: Path) -> Finding:
    return Finding(
        check="code",
        outcome="violated",
        techniques=("A5",),
        subject=Subject(path=f"{path}:12"),
        message="edited",
        evidence=(),
    )


def test_a_file_that_others_may_write_weakens_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "adamw.py"
    path.write_text("x")
    tmp_path.chmod(0o755)
    path.chmod(0o644)
    (private,) = attribute(file_finding(path), Facts()).candidates
    path.chmod(0o666)
    tmp_path.chmod(0o777)
    (shared,) = attribute(file_finding(path), Facts()).candidates
    assert private.uid == shared.uid == os.getuid()
    assert shared.score < private.score
    assert {"others could write it", "written through a shared folder"} <= set(shared.alternatives)
    assert len(shared.against) == 2


def test_where_nothing_says_from_where_only_the_effect_is_left() -> None:
    """N1: a bit flip. No account, no process, confidence 0."""
    finding = Finding(check="weights", outcome="suspicious", techniques=("E4",), message="one weight changed")
    (only,) = attribute(finding, Facts()).candidates
    assert (only.level, only.uid, only.confidence) == ("A0", None, 0.0)
    told = attribute(finding, Facts(host="node-3"))
    assert [one.level for one in told.candidates] == ["A1"]
    assert "does not show which process or account" in told.sentence


def test_no_confidence_is_certain_and_every_alternative_has_its_share() -> None:
    assert all(0 < share < 1 for share in SHARES.values())
    for told in (killed_by(uid=1002, loginuid=1002, session=1), killed_by(uid=0, loginuid=None, session=None)):
        assert all(one.score < 1 for one in told.candidates)
        assert all(set(one.alternatives) <= SHARES.keys() for one in told.candidates)


def at(step: int | None, technique: str, outcome: Any = "violated") -> Finding:
    return Finding(
        check="x", outcome=outcome, techniques=(technique,), subject=Subject(step=step), message=f"at {step}"
    )


def test_findings_of_one_kind_and_window_belong_together() -> None:
    groups = grouped([at(900, "C1"), at(10, "C1"), at(12, "C4"), at(11, "F7"), at(None, "C2")])
    assert [sorted(f.subject.step or 0 for f in group) for group in groups] == [[0, 10, 12], [900], [11]]


def test_suspicion_alone_is_never_more_than_medium() -> None:
    assert severity([at(1, "C1", "suspicious"), at(2, "C1", "suspicious")]) == "medium"
    assert severity([at(1, "F7", "suspicious")]) == "low"
    assert severity([at(1, "E4")]) == "critical"
    assert severity([at(1, "F8")]) == "high"
