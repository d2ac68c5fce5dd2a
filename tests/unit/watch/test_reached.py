"""A file belongs to the step after which it was written, whenever we hear of either."""

from trainguard.watch.reached import GRAIN_NS, Reached

MS = 1_000_000


def test_the_moment_decides_and_not_the_order_of_arrival() -> None:
    reached = Reached()
    for step in range(1, 101):
        reached.stepped(0, "step", step, {"ended": step * 100 * MS})
    assert reached.at(1050 * MS) == 10
    assert reached.at(1000 * MS) == 10, "written in the same tick as the step ended"
    assert reached.at(99 * MS - GRAIN_NS) is None
    assert reached.at(10**18) == 100


def test_steps_that_travel_together_are_told_apart_by_their_times() -> None:
    reached = Reached()
    rows = [[1, 0, 1, 5, 500 * MS, 0], [6, 0, 6, 1, 100 * MS, 0, {"rng": {}}], [7, 0, 7, 4, 400 * MS, 0]]
    reached.stepped(0, "steps", 10, {"ended": 1000 * MS, "rows": rows})
    assert [reached.at(moment * MS + 50 * MS) for moment in (100, 500, 600, 900, 1000)] == [1, 5, 6, 9, 10]


def test_an_earlier_attempt_does_not_count_for_the_next() -> None:
    reached = Reached()
    reached.stepped(0, "step", 90, {"ended": 1000 * MS})
    reached.stepped(1, "step", 3, {"ended": 2000 * MS})
    assert reached.at(1500 * MS) == 90
    assert reached.at(2500 * MS) == 3


def test_what_is_no_time_and_no_row_is_left_out() -> None:
    reached = Reached()
    for body in ({}, {"ended": "now"}, {"ended": True}, {"ended": 5, "rows": [[1, 2], "x", [1, 0, 1, -1, 5]]}):
        reached.stepped(0, "steps", 1, body)
    assert reached.at(10**18) is None
