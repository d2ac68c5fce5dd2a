"""Rounds that every rank finds by itself, and a store that nobody has to wait for."""

from __future__ import annotations

import functools
import itertools
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from trainguard.watch import replicas
from trainguard.watch.governor import Governor

WAIT_SECONDS = 20.0


def rounds(governor: Governor, shift: int, steps: int = 400) -> set[int]:
    """Steps that are rounds."""
    return {i for i in range(1, steps + 1) if replicas.is_round(governor.draw, 0, i, replicas.ROUND, shift)}


def governor(key: str = "5a" * 32) -> Governor:
    """A governor with a key."""
    return Governor({"key": key}, 0)


def test_two_rounds_are_at_most_nine_steps_apart_and_the_same_on_every_rank() -> None:
    """One secret step in every five."""
    found = sorted(rounds(governor(), 0))
    assert found == sorted(rounds(governor(), 0))
    assert found[0] == 1
    assert max(b - a for a, b in itertools.pairwise(found)) <= 9
    assert rounds(governor("00" * 32), 0) != set(found)


def test_the_rounds_of_a_rank_with_less_room_are_rounds_of_all_others() -> None:
    """Ranks whose budget differs still have rounds in common: every one that the poorest makes."""
    for shift in range(4):
        assert rounds(governor(), shift + 1) < rounds(governor(), shift)
    assert len(rounds(governor(), 3)) >= 8


@pytest.mark.torch
def test_a_collective_bound_to_other_code_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own are not; a wrapper that says it is torch's is known by its code."""
    torch = pytest.importorskip("torch")
    assert replicas.foreign(torch) == []
    original = torch.distributed.all_reduce

    @functools.wraps(original)
    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    ((name, place),) = replicas.foreign(torch)
    assert (name, place.rsplit(":", 1)[0]) == ("torch.distributed.all_reduce", __file__)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_the_next_round_is_told_ahead(shift: int) -> None:
    """So that steps taken at a glance end before it."""
    found = sorted(rounds(governor(), shift))
    for one, other in itertools.pairwise(found):
        for index in range(one, other):
            assert replicas.next_round(governor().draw, 0, index, replicas.ROUND, shift) == other


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Exchanges of three ranks over one real store."""
    torch = pytest.importorskip("torch")
    distributed = torch.distributed
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: server)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    faults: list[str] = []
    client: Any = SimpleNamespace(fault=lambda place, error: faults.append(place))
    made = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        made.append(replicas._Exchange.begin(torch, client))
    assert faults == []
    return [*made, server]


def until(condition: Any) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.torch
def test_ranks_find_what_the_others_left_in_the_round_before(job: list[Any]) -> None:
    """Each draws the same places, and sees the texts of both others."""
    ranks = job[:3]
    assert until(lambda: all(rank.draw is not None for rank in ranks))
    assert len({rank.draw(b"round", 0, 5) for rank in ranks}) == 1
    for number in range(3):
        for rank in ranks:
            rank.turn(0, number, json.dumps({"weights": number, "of": rank.rank}))
        assert until(lambda number=number: job[3].check([f"trainguard/0/0/{number}/{r}" for r in range(3)]))
    assert until(lambda: "0.1.2" in ranks[0].found)
    seen = ranks[0].turn(0, 3, "{}")
    assert json.loads(seen["0.1.1"]) == {"weights": 1, "of": 1}
    assert ranks[0].found == {}


@pytest.mark.torch
def test_a_rank_that_leaves_too_much_or_nothing_is_cut_or_left_out(job: list[Any]) -> None:
    """Bounded, and never waited for: rank 2 says nothing."""
    ranks = job[:3]
    assert until(lambda: all(rank.draw is not None for rank in ranks[:2]))
    ranks[1].turn(0, 0, "x" * 5000)
    assert until(lambda: job[3].check(["trainguard/0/0/0/1"]))
    ranks[0].turn(0, 0, "{}")
    ranks[0].turn(0, 1, "{}")
    assert until(lambda: "0.0.1" in ranks[0].found)
    assert len(ranks[0].found["0.0.1"]) == replicas.VALUE_LIMIT_BYTES
    assert "0.0.2" not in ranks[0].found


@pytest.mark.torch
def test_a_store_that_fails_ends_the_exchange_and_nothing_else(job: list[Any]) -> None:
    """The thread ends; handing over goes on without waiting and without an error, and keeps a bounded queue."""
    exchange = job[0]
    assert until(lambda: exchange.draw is not None)
    exchange.store = SimpleNamespace(set=lambda *_: (_ for _ in ()).throw(RuntimeError("connection reset by peer")))
    exchange.turn(0, 0, "{}")
    assert until(lambda: exchange.draw is None)
    for number in range(100):
        assert exchange.turn(0, number, "{}") == {}
    assert len(exchange.waiting) <= replicas.QUEUE_LIMIT


@pytest.mark.torch
def test_ranks_of_one_host_leave_nothing_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher says that all ranks are here: the supervisor sees them all."""
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert replicas._Exchange.begin(torch, SimpleNamespace()) is None  # type: ignore[arg-type]
