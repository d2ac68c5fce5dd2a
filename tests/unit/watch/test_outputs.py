"""Saved model files are seen by the kernel's word, from outside the job."""

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainguard.watch.outputs import Outputs, is_model_file

PICKLE = pickle.dumps({"a": 1}, protocol=2)


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[Outputs]:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "before.pt").write_bytes(PICKLE)
    watched = Outputs(tmp_path)
    assert watched.open()
    yield watched
    watched.close()


def settled(outputs: Outputs, count: int, seconds: float = 5) -> list[str]:
    """Names of what settles, waiting until there are `count`."""
    found: list[Path] = []
    deadline = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < deadline:
        outputs.read()
        found += outputs.settled()
        time.sleep(0.05)
    return sorted(path.name for path in found)


def test_a_saved_file_is_reported_once_for_each_save(outputs: Outputs) -> None:
    """Not what was there before, and again when it is saved again."""
    target = outputs.root / "deep" / "er" / "model.pt"
    target.write_bytes(PICKLE)
    assert settled(outputs, 1) == ["model.pt"]
    target.write_bytes(PICKLE)
    assert settled(outputs, 1) == ["model.pt"]
    assert settled(outputs, 1, seconds=0.8) == []


def test_an_atomic_save_is_reported_under_its_final_name(outputs: Outputs) -> None:
    """Write beside, rename into place: the temporary name is gone by the time it would settle."""
    (outputs.root / "tmp").write_bytes(PICKLE)
    (outputs.root / "tmp").rename(outputs.root / "last.pt")
    assert settled(outputs, 1) == ["last.pt"]


def test_a_new_folder_is_watched_too(outputs: Outputs) -> None:
    """`out/step-10/model.pt`, made in one go."""
    (outputs.root / "out" / "step-10").mkdir(parents=True)
    (outputs.root / "out" / "step-10" / "model.pt").write_bytes(PICKLE)
    assert settled(outputs, 1) == ["model.pt"]


def test_other_files_are_not_model_files(outputs: Outputs) -> None:
    """Logs, pictures and empty files are the job's own business."""
    (outputs.root / "log.txt").write_text("loss 1.0")
    (outputs.root / "plot.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (outputs.root / "empty.pt").touch()
    assert settled(outputs, 1, seconds=0.9) == []


@pytest.mark.torch
def test_what_torch_and_safetensors_write_is_a_model_file(tmp_path: Path) -> None:
    """Zip and legacy torch files, and safetensors."""
    import torch
    from safetensors.torch import save_file

    tensors = {"w": torch.ones(3)}
    torch.save(tensors, tmp_path / "zip.pt")
    torch.save(tensors, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "model.safetensors")
    assert all(is_model_file(path) for path in tmp_path.iterdir())


def test_links_and_pipes_are_never_opened_for_long(tmp_path: Path) -> None:
    """A symbolic link is not followed, a FIFO does not block."""
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/hostname")
    assert not is_model_file(tmp_path / "fifo")
    assert not is_model_file(tmp_path / "link")
