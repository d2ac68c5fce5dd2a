"""The support matrix: in every way of training of tests/helpers/cells.py a link holds, or says why it is blind."""

from __future__ import annotations

import pytest
from tests.helpers import cells

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:Sparse invariant checks")]


@pytest.mark.parametrize("name", [name for name in cells.CELLS if name not in cells.SLOW])
def test_honest_training_has_no_finding_and_every_link_says_how_it_stands(name: str) -> None:
    """No alarm, and what is blind is so for the reason that the table gives."""
    assert cells.agrees(name, cells.run(name)) == []


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, about its compiler
@pytest.mark.parametrize("name", cells.SLOW)
def test_compiled_training_too(name: str) -> None:
    """Compiling takes seconds."""
    assert cells.agrees(name, cells.run(name)) == []


def test_the_matrix_is_wide() -> None:
    """As many ways to train as were measured before the first line was written."""
    assert len(cells.CELLS) >= 52
