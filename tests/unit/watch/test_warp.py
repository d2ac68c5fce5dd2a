"""What a warp knows of the files that a script writes on the way and reads later."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainguard.watch.warp import Warp


@pytest.fixture
def warp(tmp_path: Path) -> Warp:
    """A warp on its way, twelve steps in, that tells a list what it has to say."""
    told: list[tuple[str, dict[str, Any]]] = []
    client = SimpleNamespace(send=lambda kind, body, *_: told.append((kind, body)), told=told)
    made = Warp(client, {"from": 16, "until": 24, "roots": [str(tmp_path)]})  # type: ignore[arg-type]
    made.engine = SimpleNamespace(tally=SimpleNamespace(steps=12))
    made.forward = True
    return made


def carried(warp: Warp) -> list[dict[str, Any]]:
    return [body for _, body in warp.client.told if "carried" in body]  # type: ignore[attr-defined]


def opened(warp: Warp, path: Path, mode: str) -> None:
    """As Python's audit event says it."""
    warp.guard("open", (str(path), mode, os.O_WRONLY | os.O_CREAT if mode == "w" else os.O_RDONLY))


def test_a_file_written_on_the_way_and_read_after_landing_is_told_once_with_its_step(
    warp: Warp, tmp_path: Path
) -> None:
    """Also where its folder was renamed meanwhile, as trainers do when a checkpoint is whole."""
    opened(warp, tmp_path / "tmp-checkpoint" / "optimizer.pt", "w")
    warp.guard("os.rename", (str(tmp_path / "tmp-checkpoint"), str(tmp_path / "checkpoint"), -1, -1))
    path = tmp_path / "checkpoint" / "optimizer.pt"
    opened(warp, path, "r")
    assert carried(warp) == []
    warp.forward = False
    opened(warp, path, "r")
    opened(warp, path, "r")
    assert carried(warp) == [{"carried": os.path.realpath(path), "steps": 12}]


def test_a_file_written_again_after_landing_is_what_the_script_makes_of_it(warp: Warp, tmp_path: Path) -> None:
    """Nor is one that was there before, or that nobody wrote."""
    path = tmp_path / "best.pt"
    opened(warp, path, "w")
    warp.forward = False
    opened(warp, path, "w")
    opened(warp, path, "r")
    opened(warp, tmp_path / "other.pt", "r")
    assert carried(warp) == []
