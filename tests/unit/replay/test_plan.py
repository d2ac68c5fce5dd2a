"""Segments are drawn after the fact, riskiest first, and the odds are counted, not estimated."""

from __future__ import annotations

import math

import pytest

from trainguard.appraise.replay import detection
from trainguard.replay.committed import Account, Committed, Point
from trainguard.replay.plan import Segment, draw, make_nonce, needed, segments


def run(points: int = 9, every: int = 10, alarms: tuple[int, ...] = ()) -> Committed:
    sealed = [
        Point(step=(n + 1) * every, name="p", index_sha256="0" * 64, data_blake3="0" * 64, bytes=1)
        for n in range(points)
    ]
    last = (points + 1) * every
    return Committed(
        run="r", start={}, key=None, account=Account(), points=tuple(sealed), process=0, alarms=alarms, last=last
    )


NONCE = make_nonce("r", "aa" * 32, 12, "bb" * 32)


def test_segments_lie_between_sealed_states() -> None:
    """Start to first point, point to point, last point to the end; a point after the last step adds none."""
    assert segments(run(2)) == (
        Segment(number=0, first=1, last=10),
        Segment(number=1, first=11, last=20),
        Segment(number=2, first=21, last=30),
    )
    assert [s.last for s in segments(run(0, every=7))] == [7]


def test_the_draw_follows_from_the_nonce_alone() -> None:
    """The same nonce draws the same segments, another one others: nobody knows them before the tree head is there."""
    first = draw(run(60), NONCE, budget=0.2)
    assert first == draw(run(60), NONCE, budget=0.2)
    others = [draw(run(60), make_nonce("r", f"{n:064x}", 12, "bb" * 32), budget=0.2).chosen for n in range(5)]
    assert len({first.chosen, *others}) == 6


def test_first_segment_and_alarms_come_first() -> None:
    """Risk before lot: the first steps, and where the record has something unusual."""
    plan = draw(run(30, alarms=(155,)), NONCE, budget=0.1)
    assert plan.risky[:2] == plan.chosen[:2] == (0, 15)
    assert sum(plan.segments[n].steps for n in plan.chosen) <= 31


def test_a_budget_too_small_for_one_segment_still_draws_one() -> None:
    """One per cent of a short run is less than a segment; nothing would be a strange audit."""
    assert draw(run(3), NONCE, budget=0.01).chosen == (0,)


def test_segments_can_be_named() -> None:
    """An auditor who suspects something names it."""
    assert draw(run(9), NONCE, budget=0.01, only=(4, 2)).chosen == (4, 2)


@pytest.mark.parametrize(("total", "drawn", "share"), [(200, 20, 0.05), (200, 10, 0.005), (50, 50, 0.1), (10, 0, 0.1)])
def test_the_chance_of_detection_is_the_hypergeometric_one(total: int, drawn: int, share: float) -> None:
    """1 - C(N-m, n) / C(N, n), with at least one bad segment."""
    bad = max(1, round(total * share))
    expected = 1 - math.comb(total - bad, drawn) / math.comb(total, drawn) if drawn else 0.0
    assert detection(total, drawn, share) == pytest.approx(expected, abs=1e-6)


def test_enough_segments_are_drawn_for_a_wanted_confidence() -> None:
    """Of 10,000 segments, 5 % bad: about 90 give 99 %."""
    count = needed(10_000, 0.05, 0.99)
    assert 85 <= count <= 92
    assert detection(10_000, count, 0.05) >= 0.99 > detection(10_000, count - 1, 0.05)
    assert len(draw(run(199), NONCE, budget=0.01, confidence=0.99, tampered=0.5).chosen) == needed(200, 0.5, 0.99)


@pytest.mark.parametrize(("count", "bad", "drawn"), [(20, 1, 10), (20, 2, 5), (40, 4, 10), (100, 5, 44), (200, 1, 20)])
def test_a_drawing_finds_bad_segments_as_often_as_the_formula_says(count: int, bad: int, drawn: int) -> None:
    """1 - C(N - m, n) / C(N, n) against many nonces, within four standard deviations of so many trials. The first
    segment is always replayed, and who tampers knows it: N and n are those of the lot alone."""
    known = run(count - 1)
    odd = set(range(1, 1 + bad))
    trials = 600
    nonces = (make_nonce("r", "aa" * 32, 12, f"{trial:064x}") for trial in range(trials))
    hits = sum(bool(odd & set(draw(known, nonce, budget=drawn / count).chosen)) for nonce in nonces)
    lot, left = count - 1, drawn - 1
    expected = 1 - math.comb(lot - bad, left) / math.comb(lot, left)
    assert abs(hits / trials - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)
