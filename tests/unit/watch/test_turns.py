"""A process group whose other ranks were here before: what it gives, what it takes, when it has to wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch")
distributed = torch.distributed
turns = pytest.importorskip("trainguard.watch.turns")

RANKS = 3


class Over(Exception):
    """This process would have ended."""


class Group:
    """One rank's process, up to where it would have ended."""

    def __init__(self, folder: Path, rank: int, *, skipping: bool = False, ranks: int = RANKS) -> None:
        self.told: list[dict[str, Any]] = []
        self.warp = SimpleNamespace(
            skipping=skipping,
            engine=SimpleNamespace(flush=lambda: None),
            client=SimpleNamespace(send=lambda _kind, body: self.told.append(body)),
            leave=self._leave,
            unsound=self._leave,
        )
        turn = turns.Turn(self.warp, {"rank": rank, "ranks": ranks, "folder": str(folder)})
        turn.torch = torch
        self.group = turns._group_class(torch)(turn, rank, ranks, "0")

    def _leave(self, *reason: str) -> None:
        raise Over(*reason)


def options(name: str, **given: Any) -> Any:
    found = getattr(distributed, name + "Options", None) or getattr(torch._C._distributed_c10d, name + "Options")
    made = found()
    for key, value in given.items():
        setattr(made, key, value)
    return made


def own(rank: int) -> Any:
    """Values whose sum depends on the order in which they are added."""
    return torch.rand(1000, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (rank * 3)


def all_reduce(group: Any, rank: int) -> Any:
    tensor = own(rank)
    group.allreduce([tensor], options("Allreduce")).wait()
    return tensor


def by_turns(folder: Path, work: Callable[[Any, int], Any]) -> dict[int, Any]:
    """What every rank comes to, each in a new process as often as it has to begin again."""
    found: dict[int, Any] = {}
    for _ in range(10):
        for rank in range(RANKS):
            if rank not in found:
                try:
                    found[rank] = work(Group(folder, rank).group, rank)
                except Over:
                    continue
    return found


def test_a_rank_waits_for_what_the_others_give_and_says_for_which(tmp_path: Path) -> None:
    process = Group(tmp_path, 1)
    with pytest.raises(Over):
        all_reduce(process.group, 1)
    (told,) = process.told
    assert [name.rsplit("-", 1)[1] for name in told["waits"]] == ["1.0", "1.2"]


def test_a_sum_is_what_gloo_gives_among_threads_of_its_own(tmp_path: Path) -> None:
    """To the bit, though the order of adding matters here."""
    found = by_turns(tmp_path, all_reduce)
    store, made = distributed.HashStore(), {rank: own(rank) for rank in range(RANKS)}

    def one(rank: int) -> None:
        distributed.ProcessGroupGloo(store, rank, RANKS).allreduce([made[rank]], options("Allreduce")).wait()

    turns._at_once(RANKS, one)
    assert sorted(found) == list(range(RANKS))
    for rank in range(RANKS):
        assert torch.equal(found[rank], made[rank])


def several(group: Any, rank: int) -> Any:
    """One collective after another, as a job has them."""
    weights = own(rank) if rank == 0 else torch.zeros(1000)
    group.broadcast([weights], options("Broadcast", rootRank=0)).wait()
    parts = [torch.zeros(2, dtype=torch.bfloat16) for _ in range(RANKS)]
    group.allgather([parts], [torch.full((2,), rank, dtype=torch.bfloat16)], options("Allgather")).wait()
    piece = torch.zeros(1)
    group.reduce_scatter(
        [piece], [[torch.tensor([float(rank + k)]) for k in range(RANKS)]], options("ReduceScatter")
    ).wait()
    group.barrier(options("Barrier")).wait()
    if rank == 0:
        group.send([torch.tensor([7.0])], 1, 3)
    message = torch.zeros(1)
    if rank == 1:
        group.recv([message], 0, 3)
    return weights, torch.stack(parts), piece, message


def test_one_collective_after_another_moves_what_it_should(tmp_path: Path) -> None:
    found = by_turns(tmp_path, several)
    assert sorted(found) == list(range(RANKS))
    for rank, (weights, parts, piece, message) in found.items():
        assert torch.equal(weights, own(0))
        assert parts[:, 0].tolist() == [0.0, 1.0, 2.0]
        assert piece.item() == sum(range(RANKS)) + RANKS * rank
        assert message.item() == (7.0 if rank == 1 else 0.0)


def test_what_is_given_again_must_be_what_was_given_before(tmp_path: Path) -> None:
    """A script that does otherwise at its second time cannot be replayed so."""
    for rank in (0, 0):
        with pytest.raises(Over) as told:
            all_reduce(Group(tmp_path, rank).group, rank)
        assert told.value.args == (), "the same again is only another wait"
    with pytest.raises(Over, match="rank 0 gives something else"):
        all_reduce(Group(tmp_path, 0).group, 2)


def test_ranks_that_part_in_what_they_reduce_are_told(tmp_path: Path) -> None:
    with pytest.raises(Over):
        all_reduce(Group(tmp_path, 0, ranks=2).group, 0)
    process = Group(tmp_path, 1, ranks=2)
    with pytest.raises(Over, match="ranks part in what they reduce: barrier here, allreduce in"):
        process.group.barrier(options("Barrier"))


def test_before_a_warp_lands_nobody_is_waited_for_but_who_alone_gives(tmp_path: Path) -> None:
    process = Group(tmp_path, 1, skipping=True)
    assert torch.allclose(all_reduce(process.group, 1), RANKS * own(1))
    with pytest.raises(Over):
        process.group.broadcast([torch.zeros(1000)], options("Broadcast", rootRank=0))
    root = Group(tmp_path, 0, skipping=True)
    all_reduce(root.group, 0)
    root.group.broadcast([own(0)], options("Broadcast", rootRank=0)).wait()
    again, tensor = Group(tmp_path, 1, skipping=True), torch.zeros(1000)
    all_reduce(again.group, 1)
    again.group.broadcast([tensor], options("Broadcast", rootRank=0)).wait()
    assert torch.equal(tensor, own(0))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int64", "bool", "uint8"])
def test_tensors_cross_as_bytes(kind: str) -> None:
    values = [[torch.arange(6).reshape(2, 3).to(getattr(torch, kind)), torch.zeros(0)], None, [1, 2]]
    (first, empty), nothing, sizes = turns._unpacked(torch, turns._packed(torch, values))
    assert torch.equal(first, values[0][0])
    assert (empty.shape, nothing, sizes) == ((0,), None, [1, 2])


@pytest.mark.parametrize("backend", ["nccl", "mpi", "cuda:nccl"])
def test_another_backend_adds_in_another_order_and_is_refused(tmp_path: Path, backend: str) -> None:
    process = Group(tmp_path, 0)
    turn = turns.Turn(process.warp, {"rank": 0, "ranks": 2, "folder": str(tmp_path)})
    with pytest.raises(Over, match="expected gloo"):
        turn._only_gloo(backend)
    turn._only_gloo("gloo")
    turn._only_gloo(None)
