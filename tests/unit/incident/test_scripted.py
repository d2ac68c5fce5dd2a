"""Incidents whose truth is known: who stands first, who must not, what it cost, and what was made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainguard.testing.casebook import CASEBOOK
from trainguard.testing.incidents import SCRIPTS, Script, play, score

OTHERS = [
    pytest.param(script, id=script.name, marks=() if script.group != "act" else pytest.mark.nightly)
    for script in CASEBOOK
]
"""The second set: by day those in which somebody could be accused who had nothing to do with it."""


@pytest.mark.parametrize("script", [*(pytest.param(one, id=one.name) for one in SCRIPTS), *OTHERS])
def test_a_scripted_incident_is_told_as_it_was(script: Script, tmp_path: Path) -> None:
    """The right account or none; nobody framed; the loss within 5 %; taint where it belongs and nowhere else."""
    told = score(play(script, tmp_path, seed=0))
    assert not told.framed, told.said
    assert told.right, told.said
    assert told.loss_is_right, (told.hours, told.truth_hours)
    assert told.spread, told.words


def test_the_second_set_is_another_one() -> None:
    """At least 30, of every kind, and none by the name of one of the first set."""
    names = {script.name for script in CASEBOOK}
    assert len(names) == len(CASEBOOK) >= 30
    assert not names & {script.name for script in SCRIPTS}
    assert {script.group for script in CASEBOOK} == {"act", "frame", "hardware", "honest"}


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
