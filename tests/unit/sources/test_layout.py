"""From an index of a loader to a row of a data set."""

from __future__ import annotations

import pytest

from trainguard.sources.layout import parse_layout


def leaf(number: int) -> dict[str, object]:
    return {"class": "Rows", "number": number}


def test_indices_of_a_subset_of_a_concatenation_lead_to_rows() -> None:
    """random_split over two files, as torch puts it together."""
    inner = {"class": "ConcatDataset", "ends": [3, 8], "of": [leaf(0), leaf(1)]}
    layout = parse_layout({"class": "Subset", "runs": [[6, 2], [0, 1], [2, 2]], "of": [inner]})
    assert layout is not None
    found = [layout.find(index) for index in range(6)]
    assert found == [(1, 3), (1, 4), (0, 0), (0, 2), (1, 0), None]
    assert layout.find(-1) is None
    assert layout.leaves == {0, 1}


def test_an_index_behind_the_end_of_a_concatenation_leads_nowhere() -> None:
    """It is not taken for the last part's."""
    layout = parse_layout({"class": "ConcatDataset", "ends": [2, 4], "of": [leaf(0), leaf(1)]})
    assert layout is not None
    assert [layout.find(index) for index in (3, 4)] == [(1, 1), None]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"of": []},
        {"of": [leaf(0)]},
        {"of": [leaf(0), leaf(1)], "ends": [2]},
        {"of": [leaf(0), leaf(1)], "ends": [4, 2]},
        {"of": [leaf(0)], "runs": [[0]]},
        {"of": [leaf(0)], "runs": [[-1, 2]]},
        {"of": [None], "ends": [1]},
    ],
)
def test_what_is_not_a_layout_is_none(value: object) -> None:
    """A judge never raises for a body that is not as specified."""
    assert parse_layout(value) is None


def test_a_layout_that_never_ends_is_none() -> None:
    """Depth is bounded."""
    value: dict[str, object] = leaf(0)
    for _ in range(50):
        value = {"class": "Subset", "runs": [[0, 1]], "of": [value]}
    assert parse_layout(value) is None
