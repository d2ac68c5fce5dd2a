"""What several audits of one run come to together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainguard.appraise.replay import Replayed, replayed


def report(equal: list[int], *, approved: bool, differs: int | None = None, **changed: object) -> dict[str, Any]:
    """An audit of a run of five segments of ten steps."""
    results = [
        {"segment": n, "first": 10 * n + 1, "last": 10 * n + 10, "outcome": "equal", "compared": 10} for n in equal
    ]
    findings = []
    if differs is not None:
        results.append({"segment": differs, "first": 10 * differs + 1, "last": 10 * differs + 10, "outcome": "differs"})
        findings.append({"check": "replay", "outcome": "violated", "techniques": ["C1"], "message": "it differs"})
    segments = [{"number": n, "first": 10 * n + 1, "last": 10 * n + 10} for n in range(5)]
    body = {
        "run": "r",
        "plan": {"nonce": "00", "segments": segments, "chosen": equal},
        "selftest": {"passed": True},
        "environment": {"approved": approved},
        "results": results,
        "findings": findings,
    }
    return body | changed


def together(*reports: dict[str, Any]) -> Replayed:
    """As the log has them, by number instead of digest."""
    audits = [{"report": str(number)} for number in range(len(reports))]
    return replayed("r", audits, lambda name: json.dumps(reports[int(name)]).encode())


OWN = report([0, 1, 2], approved=False)
APART = report([0, 3], approved=True)


@pytest.mark.parametrize("order", [(OWN, APART), (APART, OWN)])
def test_an_audit_in_the_runs_own_environment_neither_adds_to_one_made_apart_nor_takes_from_it(
    order: tuple[dict[str, Any], ...],
) -> None:
    """An own audit first, then one made apart: formerly the first kept the level down for good."""
    both, apart = together(*order), together(APART)
    assert (both.apart, both.steps, both.detection) == (True, 20, apart.detection)


def test_audits_in_the_runs_own_environment_alone_are_counted_and_raise_nothing() -> None:
    only = together(OWN)
    assert (only.apart, only.steps) == (False, 30)


def test_a_difference_counts_whichever_audit_has_it() -> None:
    both = together(report([], approved=False, differs=2), APART)
    assert [finding.message for finding in both.findings] == ["it differs"]
    assert both.link is not None
    assert both.link.broken == 1


def test_an_audit_apart_in_which_nothing_was_equal_gives_no_level() -> None:
    both = together(OWN, report([], approved=True, differs=2))
    assert (both.apart, both.steps, len(both.findings)) == (False, 30, 1)


def test_an_audit_whose_self_test_failed_counts_for_nothing() -> None:
    blind = together(report([0, 3], approved=True, selftest={"passed": False, "reason": "the fault was not seen"}))
    assert (blind.apart, blind.steps) == (False, 0)
    assert blind.link is not None
    assert blind.link.blind == ("an audit counts for nothing: the fault was not seen",)
