"""D2, D3: another order than the sampler draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.helpers.loading import BATCH, Table, fit
from tests.helpers.recorded import judge
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler

from trainguard.appraise.order import Order
from trainguard.evidence import Evidence
from trainguard.finding import Finding

pytestmark = pytest.mark.torch

STEPS = len(Table()) // BATCH


def findings_of(records: list[Evidence]) -> list[Finding]:
    """Findings of the check."""
    return judge(Order, records)[0]


def test_one_pass_sorted_by_label_is_found_at_its_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy of the catalogue: the sampler's own method is replaced, the second pass is in the order of the labels."""
    labels = Table().y.tolist()
    honest = RandomSampler.__iter__
    passes = []

    def ordered(self: RandomSampler) -> Iterator[int]:
        passes.append(1)
        order = list(honest(self))
        return iter(sorted(order, key=labels.__getitem__) if len(passes) == 2 else order)

    monkeypatch.setattr(RandomSampler, "__iter__", ordered)
    findings = findings_of(fit())
    assert [(f.outcome, f.techniques, f.subject.step) for f in findings] == [("violated", ("D2",), STEPS + 1)]
    assert "pass 2: batch 1" in findings[0].message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch_size": BATCH // 2}, "batch was 16 and is 8"),
        ({"drop_last": True}, "drop_last was False and is True"),
        ({"sampler": RandomSampler(range(100))}, "length was 320 and is 100"),
    ],
)
def test_a_loader_whose_samplers_are_changed_between_passes_is_found(change: dict[str, Any], told: str) -> None:
    """Every batch is what these samplers draw: recomputing the order from the run's own account stays green."""
    loader = DataLoader(Table(), batch_size=BATCH, shuffle=True)

    def before(number: int) -> None:
        if number == 1:
            vars(loader.batch_sampler).update(change)

    findings = findings_of(fit(loader, before_pass=before))
    assert [(f.outcome, f.techniques) for f in findings] == [("suspicious", ("D2",))]
    assert told in findings[0].message


def test_data_that_grows_between_passes_is_no_departure() -> None:
    """Examples that are collected while the model learns."""
    data = Table()

    def before(number: int) -> None:
        data.x, data.y = torch.cat([data.x, data.x[:BATCH]]), torch.cat([data.y, data.y[:BATCH]])

    assert findings_of(fit(DataLoader(data, batch_size=BATCH, shuffle=True), before_pass=before)) == []


def test_a_batch_that_comes_twice_is_found_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 5 is repeated in the place of batch 6: same length, same number of batches."""
    honest = BatchSampler.__iter__

    def repeated(self: Any) -> Iterator[list[int]]:
        last: list[int] = []
        for number, batch in enumerate(honest(self)):
            last = last if number == 5 else batch
            yield last

    monkeypatch.setattr(BatchSampler, "__iter__", repeated)
    findings = findings_of(fit(passes=1))
    assert [(f.outcome, f.techniques, f.subject.step) for f in findings] == [("violated", ("D2",), 6)]


def test_samples_left_out_at_the_end_are_found_when_the_sampler_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two batches are never drawn: every batch before is right."""
    honest = BatchSampler.__iter__

    def short(self: Any) -> Iterator[list[int]]:
        batches = list(honest(self))
        yield from batches[:-2]

    monkeypatch.setattr(BatchSampler, "__iter__", short)
    findings = findings_of(fit(passes=1))
    assert [(f.outcome, f.techniques) for f in findings] == [("violated", ("D2",))]
    assert "goes on" in findings[0].message


def test_the_order_of_an_earlier_pass_again_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third pass repeats the first."""
    honest = RandomSampler.__iter__
    orders: list[list[int]] = []

    def again(self: RandomSampler) -> Iterator[int]:
        orders.append(list(honest(self)))
        return iter(orders[0] if len(orders) == 3 else orders[-1])

    monkeypatch.setattr(RandomSampler, "__iter__", again)
    findings = findings_of(fit())
    assert [f.subject.step for f in findings] == [2 * STEPS + 1]


def test_an_iterator_put_in_the_place_of_the_samplers_is_found() -> None:
    """Somebody reaches into the loader's own iterator."""
    made: Any = DataLoader._get_iterator

    def planted(self: Any) -> Any:
        iterator = made(self)
        iterator._sampler_iter = iter([list(range(BATCH))] * STEPS)
        return iterator

    class Loader(DataLoader):  # type: ignore[type-arg]
        _get_iterator = planted

    findings = findings_of(fit(Loader(Table(), batch_size=BATCH, shuffle=True), passes=1))
    assert [(f.outcome, f.subject.step) for f in findings] == [("violated", 1)]


def test_a_distributed_sampler_whose_epoch_stops_is_suspicious() -> None:
    """D3: set_epoch was called before every pass, and then no more."""
    sampler: Any = DistributedSampler(Table(), num_replicas=2, rank=1, seed=3)  # type: ignore[arg-type]
    loader = DataLoader(Table(), batch_size=BATCH, sampler=sampler)
    records = fit(loader, passes=5, before_pass=lambda number: sampler.set_epoch(min(number, 3)))
    findings = findings_of(records)
    assert [(f.outcome, f.techniques) for f in findings] == [("suspicious", ("D3",))]


@pytest.mark.parametrize(
    "make",
    [
        lambda data: DataLoader(data, batch_size=BATCH, shuffle=True),
        lambda data: DataLoader(data, batch_size=7, shuffle=True, drop_last=True),
        lambda data: DataLoader(data, batch_size=BATCH),
        lambda data: DataLoader(data, batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(3)),
        lambda data: DataLoader(data, batch_size=9, sampler=RandomSampler(data, replacement=True, num_samples=100)),
        lambda data: DataLoader(data, batch_size=BATCH, sampler=SubsetRandomSampler(range(0, len(data), 3))),
        lambda data: DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, 3, 1, seed=2)),
        lambda data: DataLoader(data, batch_size=5, shuffle=True, num_workers=1, persistent_workers=True),
    ],
    ids=["random", "drop last", "sequential", "own generator", "replacement", "subset", "distributed", "worker"],
)
def test_honest_samplers_hold_at_every_step(make: Any) -> None:
    """Recomputed without torch: no finding, and something held at each of the steps of two passes."""
    records = fit(make(Table()), passes=2)
    findings, states = judge(Order, records)
    steps = sum(record.kind == "step" for record in records)
    assert findings == []
    assert (states["order"].state, states["order"].held) == ("held", steps + 2)


def test_what_is_not_drawn_again_is_blind_with_its_reason() -> None:
    """A sampler of the job's own, and batches given as a list."""

    class Own(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(64))

    for loader in (
        DataLoader(Table(), batch_size=BATCH, sampler=Own()),
        DataLoader(Table(), batch_sampler=[[1, 2, 3], [4, 5]]),
    ):
        findings, states = judge(Order, fit(loader, passes=1))
        assert findings == []
        assert (states["order"].state, states["order"].required) == ("blind", False)
        assert "own" in states["order"].blind[0]


def test_a_loop_that_breaks_off_early_is_no_departure() -> None:
    """The sampler has more, and nobody asked for it."""
    loader: DataLoader[Any] = DataLoader(Table(), batch_size=BATCH, shuffle=True)

    class Half:
        def __iter__(self) -> Iterator[Any]:
            for number, batch in enumerate(loader):
                if number == 4:
                    return
                yield batch

    findings, states = judge(Order, fit(Half(), passes=3))  # type: ignore[arg-type]
    assert findings == []
    assert states["order"].held >= 12
