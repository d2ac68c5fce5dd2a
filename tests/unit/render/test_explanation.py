"""Every link is explained: its question, its places, and for what was not seen, what would make it visible."""

from __future__ import annotations

import pytest

from trainguard.appraise.engine import CHECKS
from trainguard.appraise.verdict import Verdict, decide
from trainguard.finding import Finding, LinkState, Subject
from trainguard.render.explanation import ASKS, explain, explanation_view, remedy
from trainguard.render.terminal import as_text


def a_verdict() -> Verdict:
    found = [
        Finding(
            check="optimizer",
            outcome="violated",
            message="too long",
            subject=Subject(step=n, path="/home/u/train.py:9"),
        )
        for n in (3, 4, 5)
    ]
    links = [
        LinkState(link="code", held=7),
        LinkState(link="optimizer", held=5, broken=3),
        LinkState(link="environment", blind=("no lock: what ran was compared with nothing approved",)),
        LinkState(link="hooks", held=2, explained=("train.py:88",)),
        LinkState(link="replicas", required=False),
    ]
    elsewhere = Finding(check="log", outcome="violated", message="a leaf is not signed by our key")
    return decide([*found, elsewhere], links, run="r", steps=9, watched_steps=9)


def test_broken_links_come_first_and_unused_ones_last():
    """What needs attention is read first."""
    states = [(link.link, link.state) for link in explain(a_verdict()).links]
    assert states == [
        ("optimizer", "broken"),
        ("environment", "blind"),
        ("hooks", "explained"),
        ("code", "held"),
        ("replicas", "unused"),
    ]


def test_a_departure_is_told_once_with_its_place_and_how_often():
    """file:line, first step, and a count."""
    (departure,) = explain(a_verdict()).links[0].departures
    assert (departure.place, departure.step, departure.times) == ("/home/u/train.py:9", 3, 3)


def test_findings_without_a_link_are_not_lost():
    """A log that does not verify keeps no balance, and is told all the same."""
    assert [departure.message for departure in explain(a_verdict()).elsewhere] == ["a leaf is not signed by our key"]


def test_blindness_comes_with_what_would_lift_it():
    """The reason alone helps nobody."""
    blind = next(link for link in explain(a_verdict()).links if link.link == "environment").blind
    assert blind[0].remedy.endswith("trainguard lock -- CMD")


def test_a_reason_nobody_foresaw_points_to_the_check_s_own_page():
    """There is always a next step."""
    assert remedy("weights", "the moon was full") == "see docs/checks/weights.md"
    assert remedy("plan.course", "the moon was full") == "see docs/checks/plan.md"


def test_the_text_has_every_link_reason_and_approval():
    """What the document holds, the text shows."""
    verdict = a_verdict()
    text = as_text(explanation_view(explain(verdict), verdict))
    for part in ("/home/u/train.py:9", "(3 times)", "not seen: no lock", "to see it: approve", "approved: train.py:88"):
        assert part in text
    assert "not part of this run" in text


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
def test_every_check_of_the_engine_says_what_it_asks(check: str):
    """A new check without its question would be a bare name to readers."""
    assert check in ASKS
