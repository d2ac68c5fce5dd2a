"""What is shown as confidence for an account, from its score and from scripted truth."""

from __future__ import annotations

from itertools import pairwise

import pytest

from trainguard.incident.calibration import TABLE, calibrated, tally
from trainguard.testing.casebook import CASEBOOK
from trainguard.testing.incidents import SCRIPTS, play, score


def test_a_score_that_was_never_right_is_shown_small_and_one_that_always_was_no_larger_than_it_is() -> None:
    table = tally([(0.5, False)] * 8 + [(0.9, True)] * 8)
    assert calibrated(0.5, table) == 0.1
    assert calibrated(0.9, table) == 0.9
    assert calibrated(0.95, table) == 0.9, "nine of ten, by the rule of succession"


def test_nothing_is_ever_certain_and_nothing_excluded() -> None:
    assert all(0 < calibrated(score / 100) < 1 for score in range(1, 101))
    assert calibrated(0.6, ()) == 0.6, "without a table the score stands"


@pytest.mark.parametrize(
    "seen",
    [
        [(0.3, True)] * 5 + [(0.6, False)] * 5,
        [(0.1, True), (0.3, False), (0.5, True), (0.6, False), (0.75, True), (0.9, False)],
        [],
    ],
)
def test_what_is_shown_never_falls_where_the_score_rises(seen: list[tuple[float, bool]]) -> None:
    shown = [calibrated(score / 100, tally(seen)) for score in range(101)]
    assert all(low <= high for low, high in pairwise(shown))


def test_the_table_in_use_rises_and_counts_no_more_right_than_seen() -> None:
    assert all(0 <= right <= seen for _, right, seen in TABLE)
    assert tuple(sorted(TABLE)) == TABLE
    assert sum(seen for _, _, seen in TABLE) >= 40


@pytest.mark.nightly
def test_the_table_in_use_is_the_one_that_the_scripts_give(tmp_path_factory: pytest.TempPathFactory) -> None:
    played = (score(play(script, tmp_path_factory.mktemp("one"), seed=0)) for script in (*SCRIPTS, *CASEBOOK))
    assert tally(account for each in played for account in each.accounts) == TABLE
