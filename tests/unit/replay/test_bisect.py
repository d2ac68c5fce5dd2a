"""Which segments are replayed to find the first that differs."""

from __future__ import annotations

import pytest

from trainguard.replay.bisect import Found, order, search


@pytest.mark.parametrize("bad", [0, 1, 31, 32, 62, 63])
def test_a_change_that_stays_is_found_in_as_many_replays_as_halvings(bad: int) -> None:
    """64 segments, all from one on differ: at most the last one and six halves."""
    found = search(64, lambda number: number >= bad)
    assert found.segment == bad
    assert len(found.probed) <= 7
    assert len(set(found.probed)) == len(found.probed)


@pytest.mark.parametrize("bad", [0, 5, 11, 12])
def test_a_single_act_is_found_whatever_its_place(bad: int) -> None:
    """Only one segment differs: all are replayed if need be, none twice."""
    found = search(13, lambda number: number == bad)
    assert found.segment == bad
    assert len(set(found.probed)) == len(found.probed) <= 13


def test_what_the_record_makes_suspicious_comes_first() -> None:
    """Then the last segment, then middles."""
    assert list(order(7, (4,))) == [4, 6, 3, 1, 5, 0, 2]
    assert search(7, lambda number: number == 4, first=(4,)).probed[0] == 4


def test_no_difference_means_that_all_were_replayed() -> None:
    """A segment that cannot be replayed is neither equal nor different."""
    assert search(5, lambda number: None if number == 2 else False) == Found(segment=None, probed=(4, 2, 0, 3, 1))


def test_a_run_of_one_segment_is_replayed_once() -> None:
    """The last is the first."""
    assert search(1, lambda _number: True) == Found(segment=0, probed=(0,))
