"""The demo's environment shares the installed bytes, takes sabotage, and leaves the installed files as they are."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from trainguard.errors import Unavailable
from trainguard.testing.shared_environment import SharedEnvironment

MODULE = "click/globals.py"


def installed() -> Path:
    return Path(str(importlib.metadata.distribution("click").locate_file(MODULE)))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path: Path) -> SharedEnvironment:
    environment = SharedEnvironment(tmp_path / "environment")
    assert environment.build(["click"]) > 20
    return environment


def loaded(environment: SharedEnvironment) -> str:
    """What an interpreter of the environment finds in the module."""
    program = "import click.globals as g; print(g.__file__); print(getattr(g, 'PLANTED', None))"
    done = subprocess.run([environment.python, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    file, value = done.stdout.split()
    assert file.startswith(str(environment.root))
    return value


def plant(text: str) -> str:
    return text + "\nPLANTED = 1\n"


def test_an_edit_is_seen_inside_only_and_is_put_back(place: SharedEnvironment):
    """The installed file keeps its bytes, although both names were one file."""
    before = digest(installed())
    assert loaded(place) == "None"
    with place.edited(MODULE, plant):
        assert loaded(place) == "1"
        assert digest(installed()) == before
        assert place.record_agrees("click")
    assert loaded(place) == "None"
    assert digest(installed()) == before


def test_an_edit_with_record_left_alone_is_what_a_record_check_finds(place: SharedEnvironment):
    """So the naive control that stays green in the demo is one that can turn red."""
    with place.edited(MODULE, plant, record=False):
        assert not place.record_agrees("click")
    assert place.record_agrees("click")


def test_edited_bytecode_runs_while_every_source_stays_the_same(place: SharedEnvironment):
    """Plain Python takes the planted bytecode: the act of the demo is real."""
    before, sources = digest(installed()), place.source_digest("click")
    place.bytecode(MODULE)
    with place.edited_bytecode(MODULE, plant):
        assert loaded(place) == "1"
        assert place.source_digest("click") == sources
        assert place.record_agrees("click")
    assert loaded(place) == "None"
    assert digest(installed()) == before


def test_a_failure_in_between_still_puts_everything_back(place: SharedEnvironment):
    """An act that breaks off leaves no sabotage behind for the next one."""
    with pytest.raises(RuntimeError, match="broke off"), place.edited(MODULE, plant):
        raise RuntimeError("broke off")
    assert loaded(place) == "None"


def test_removing_it_leaves_the_installed_files(place: SharedEnvironment):
    """Hard links go, the files stay."""
    before = digest(installed())
    place.remove()
    assert not place.root.exists()
    assert digest(installed()) == before


def test_a_package_that_is_not_there_is_said(tmp_path: Path):
    """One sentence with the next step."""
    with pytest.raises(Unavailable, match="no-such-package: not installed"):
        SharedEnvironment(tmp_path / "e").build(["no-such-package"])
