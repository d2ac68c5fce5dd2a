"""The scripts that honest-run tests use are what users write: they know no guard, and their README knows them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "scripts"
EXAMPLE = Path(__file__).parents[2] / "examples" / "charlm" / "train.py"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", [*SCRIPTS, EXAMPLE], ids=lambda path: path.stem)
def test_a_script_has_no_word_of_the_guard(script: Path) -> None:
    """A script that could tell whether it is watched would prove nothing about scripts that cannot."""
    assert "trainguard" not in script.read_text().lower()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_keeps_the_common_habits(script: Path) -> None:
    """Steps and seed as options, one thread, a digest printed at the end: what the honest-run tests count on."""
    text = script.read_text()
    for habit in ('"--steps"', '"--seed"', "torch.set_num_threads(1)", 'print("digest"'):
        assert habit in text


def test_the_readme_lists_exactly_the_scripts_there_are() -> None:
    """One row in the table for every script, and no row for one that is gone."""
    rows = re.findall(r"^\| `(\w+\.py)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == [script.name for script in SCRIPTS]
