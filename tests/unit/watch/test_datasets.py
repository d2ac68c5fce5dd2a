"""How data sets are told: by numbers of their own, without calling anything of theirs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from trainguard.sources.layout import parse_layout
from trainguard.watch import datasets

pytestmark = pytest.mark.torch


class Rows(Dataset[int]):
    """A data set that must not be asked anything."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        raise AssertionError("asked")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def test_every_index_of_torch_s_own_combinations_leads_where_torch_leads_it() -> None:
    """The judge's reading of a layout against torch itself."""
    parts = [TensorDataset(torch.arange(n) + 100 * i) for i, n in enumerate((3, 5, 2))]
    whole = ConcatDataset([parts[0], ConcatDataset([parts[1], parts[2]])])
    for data in (whole, *random_split(whole, [4, 6], torch.Generator().manual_seed(1)), Subset(whole, range(2, 9))):
        layout = parse_layout(datasets.layout(data))
        assert layout is not None
        numbers = [datasets.number_of(part) for part in parts]
        for index in range(len(data)):
            found = layout.find(index)
            assert found is not None
            assert int(parts[numbers.index(found[0])][found[1]][0]) == int(data[index][0])


def test_nothing_of_the_job_is_called() -> None:
    """Not even __getattr__ or __len__."""
    told = datasets.layout(ConcatDataset([Rows(2), Rows(3)]))
    assert told is not None
    assert told["ends"] == [2, 5]


def test_a_number_is_not_given_again_to_a_later_object_at_the_same_address() -> None:
    """An address is reused, a number is not."""
    first = Rows(1)
    number = datasets.number_of(first)
    assert datasets.number_of(first) == number
    del first
    gc.collect()
    assert all(datasets.number_of(other) != number for other in [Rows(1) for _ in range(50)])


@pytest.mark.parametrize(
    "indices",
    [list(range(0, 1 << 17, 2)), "012", [0, None], torch.arange(3), list(range(0, 5000, 2))],
    ids=["many", "text", "none", "tensor", "runs"],
)
def test_a_selection_that_cannot_be_told_in_short_is_not_told(indices: Any) -> None:
    """Then no row is claimed."""
    told = datasets.layout(Subset(Rows(3), indices))
    assert told is not None
    assert told["runs"] is None
    assert parse_layout(told) is None


def test_too_deep_and_too_wide_combinations_are_not_told() -> None:
    """Bounded, whatever the job builds."""
    deep: Any = Rows(1)
    for _ in range(9):
        deep = Subset(deep, [0])
    assert datasets.layout(deep) is None
    assert datasets.layout(ConcatDataset([Rows(1) for _ in range(100)])) is None
