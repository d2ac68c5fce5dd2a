"""The place a replay runs in: what was there before the run, and nothing that it could overwrite."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainguard.errors import Unavailable
from trainguard.replay.sandbox import COPY_LIMIT_BYTES, Sandbox


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    (folder / "pkg").mkdir(parents=True)
    (folder / "train.py").write_text("1")
    (folder / "pkg" / "model.py").write_text("2")
    (folder / "data.bin").write_bytes(b"0" * (COPY_LIMIT_BYTES + 1))
    (folder / ".trainguard").mkdir()
    (folder / ".trainguard" / "secret").write_text("3")
    return folder


def sandbox(tmp_path: Path, origin: Path) -> Sandbox:
    time.sleep(0.02)
    return Sandbox(root=tmp_path / "sandbox", origin=origin, began_ns=time.time_ns())


def test_what_was_there_before_the_run_is_there(tmp_path: Path, origin: Path) -> None:
    """Small files are copied, large ones linked; our own state is not."""
    box = sandbox(tmp_path, origin)
    box.prepare()
    assert (box.work / "pkg" / "model.py").read_text() == "2"
    assert (box.work / "data.bin").is_symlink()
    assert not (box.work / ".trainguard").exists()


def test_what_the_run_wrote_is_not_there(tmp_path: Path, origin: Path) -> None:
    """A checkpoint of the run would be resumed from; a folder it made would be in the way of making it again."""
    box = sandbox(tmp_path, origin)
    time.sleep(0.02)
    (origin / "out").mkdir()
    (origin / "out" / "last.pt").write_text("x")
    (origin / "train.py").write_text("changed")
    box.prepare()
    assert not (box.work / "out").exists()
    assert not (box.work / "train.py").exists()
    assert sorted(box.left_out) == ["out/last.pt", "train.py"]


def test_a_file_touched_since_is_there_when_its_content_is_known(tmp_path: Path, origin: Path) -> None:
    """A new time alone says nothing against a file whose digest is the one that the run committed to."""
    box = sandbox(tmp_path, origin)
    box.unchanged = frozenset({str(origin / "train.py")})
    time.sleep(0.02)
    (origin / "train.py").write_text("1")
    box.prepare()
    assert (box.work / "train.py").read_text() == "1"
    assert box.left_out == []


def test_paths_of_the_command_are_led_inside(tmp_path: Path, origin: Path) -> None:
    """Absolute paths into the working folder, and outputs that were not there before; inputs stay as they are."""
    inputs = tmp_path / "inputs.txt"
    inputs.write_text("x")
    box = sandbox(tmp_path, origin)
    time.sleep(0.02)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    words = box.command(
        ["python", str(origin / "train.py"), "--steps", "3", f"--out={outputs}", str(outputs), f"--data={inputs}"]
    )
    assert words == [
        "python", str(box.work / "train.py"), "--steps", "3", f"--out={box.root}/outside{outputs}",
        f"{box.root}/outside{outputs}", f"--data={inputs}",
    ]  # fmt: skip


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    """Not a traceback, and not a finding."""
    with pytest.raises(Unavailable, match="is not there any more"):
        Sandbox(root=tmp_path / "s", origin=tmp_path / "nowhere", began_ns=time.time_ns()).prepare()


def test_links_keep_leading_where_they_led(tmp_path: Path, origin: Path) -> None:
    """A relative link is made absolute."""
    (origin / "link").symlink_to(Path("pkg") / "model.py")
    box = sandbox(tmp_path, origin)
    box.prepare()
    assert (box.work / "link").read_text() == "2"
    assert os.path.realpath(box.work / "link") == os.path.realpath(origin / "pkg" / "model.py")
