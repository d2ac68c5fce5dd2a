"""The verdict on the first part of a run: what happened later does not reach back."""

from __future__ import annotations

from trainguard.appraise.verdict import decide, until
from trainguard.finding import Finding, LinkState, Outcome, Subject


def finding(outcome: Outcome, step: int | None) -> Finding:
    return Finding(check="weights", outcome=outcome, subject=Subject(run="r", step=step), message="m")


HELD = LinkState(link="weights", held=10)
BROKEN = LinkState(link="weights", held=10, broken=1)


def test_before_the_first_finding_the_run_is_what_it_would_have_been() -> None:
    whole = decide([finding("violated", 13)], [BROKEN], run="r", steps=20, lock="a" * 64)
    assert whole.verdict == "TAINTED"
    assert until(whole, 12).verdict == "VERIFIED"
    assert until(whole, 13).verdict == "TAINTED"


def test_a_finding_without_a_step_concerns_all_of_the_run() -> None:
    whole = decide([finding("violated", None), finding("suspicious", 9)], [HELD], run="r", steps=20)
    assert until(whole, 1).verdict == "TAINTED"
    assert len(until(whole, 1).findings) == 1


def test_what_was_not_measured_at_all_stays_unknown() -> None:
    whole = decide([finding("violated", 13)], [BROKEN], run="r", steps=20, gaps=("no lock",))
    assert until(whole, 5).verdict == "UNKNOWN"
    blind = decide([finding("violated", 13)], [LinkState(link="weights", broken=1)], run="r", steps=20)
    assert until(blind, 5).verdict == "UNKNOWN", "a link that only broke never held"


def test_a_run_with_nothing_found_is_the_same_at_every_step() -> None:
    whole = decide([], [HELD], run="r", steps=20)
    assert until(whole, 3) is whole
