"""Incidents whose truth is known: who stands first, who must not, what it cost, and what was made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainguard.testing.incidents import SCRIPTS, Script, play, score


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_scripted_incident_is_told_as_it_was(script: Script, tmp_path: Path) -> None:
    """The right account or none; nobody framed; the loss within 5 %; taint where it belongs and nowhere else."""
    told = score(play(script, tmp_path, seed=0))
    assert not told.framed, told.said
    assert told.right, told.said
    assert told.loss_is_right, (told.hours, told.truth_hours)
    assert told.spread, told.words


def test_there_are_enough_of_them_of_every_kind() -> None:
    """At least 40, a quarter of them made to look like somebody else's; N1 to N7 and more that accuse nobody."""
    assert len(SCRIPTS) >= 40
    assert len({script.name for script in SCRIPTS}) == len(SCRIPTS)
    groups = [script.group for script in SCRIPTS]
    assert min(groups.count(group) for group in ("act", "frame", "hardware", "honest")) >= 7


def test_the_same_seed_makes_the_same_history(tmp_path: Path) -> None:
    """And another one another."""
    first, again, other = (
        score(play(SCRIPTS[0], tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (first.hours, first.said) == (again.hours, again.said)
    assert first.hours != other.hours
