"""When gradient truth may look again: three times at once, then as its share of the time pays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

truth = pytest.importorskip("trainguard.watch.truth")

CHECK_NS = 60e6
"""Of steps of some 12 ms: EVERY steps later SHARE has paid for a quarter of it."""


def looks(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cost_ns: float,
    step_ns: float,
    steps: int,
    rechecks: int = 0,
    pressed: bool = False,
) -> list[int]:
    """Steps before which a check is affordable, looked for every EVERY steps."""
    now = [0.0]
    monkeypatch.setattr(truth.time, "perf_counter_ns", lambda: now[0])
    link = truth.Truth(SimpleNamespace(settings={}))
    memory: dict[str, Any] = {truth.Truth.name: {"next": 1, "rechecks": rechecks, "said": None}}
    governor = SimpleNamespace(wall_ns=step_ns, pressed=pressed)
    step: Any = SimpleNamespace(
        wall_ns=step_ns,
        engine=SimpleNamespace(tracks={1: None}, governor=governor),
        track=SimpleNamespace(memory=memory),
    )
    found = []
    for number in range(0, steps, truth.EVERY):
        now[0] = number * step_ns
        if link._affordable(step):
            found.append(number)
            link.cost_ns = link.dearest_ns = cost_ns
            link.spent_ns += cost_ns
    return found


def test_three_looks_come_at_once_and_then_one_as_the_share_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    found = looks(monkeypatch, cost_ns=CHECK_NS, step_ns=12e6, steps=40_000)
    assert found[:3] == [0, truth.EVERY, 2 * truth.EVERY]
    later = found[3:]
    assert len(later) * CHECK_NS <= truth.SHARE * 40_000 * 12e6
    assert len(later) >= 0.8 * truth.SHARE * 40_000 * 12e6 / CHECK_NS, "what is paid for is made"


def test_where_the_budget_is_overdrawn_for_good_it_looks_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    often = looks(monkeypatch, cost_ns=CHECK_NS, step_ns=12e6, steps=40_000)
    rarely = looks(monkeypatch, cost_ns=CHECK_NS, step_ns=12e6, steps=40_000, pressed=True)
    assert rarely[:3] == often[:3]
    assert len(rarely[3:]) * CHECK_NS <= truth.PRESSED_SHARE * 40_000 * 12e6
    assert len(rarely) > 6


def test_what_did_not_agree_is_looked_at_again_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = looks(monkeypatch, cost_ns=CHECK_NS, step_ns=12e6, steps=2_000)
    again = looks(monkeypatch, cost_ns=CHECK_NS, step_ns=12e6, steps=2_000, rechecks=truth.RECHECKS)
    assert (len(plain), len(again)) == (3, 4)


def test_dear_checks_still_are_no_more_than_their_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a second: the first comes by estimate, the second by credit, the third is paid for first."""
    found = looks(monkeypatch, cost_ns=3e9, step_ns=1e9, steps=4_000)
    assert found[:2] == [0, truth.EVERY]
    assert len(found) <= 2 + truth.SHARE * 4_000 * 1e9 / 3e9
