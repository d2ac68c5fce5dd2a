"""`trainguard.open_checkpoint`: what was vetted is what is loaded, and what is refused was never touched."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file as save_safetensors
from tests.helpers import checkpoints

import trainguard
from trainguard.errors import Misuse, Unavailable
from trainguard.home import Home
from trainguard.loading import (
    LoadRefused,
    ModuleShadowed,
    NotWhatWasSealed,
    SealMissing,
    UnsafeCheckpoint,
    UnvettedCheckpoint,
    checkpoint,
)
from trainguard.loading.hold import hold
from trainguard.loading.names import check_place, find
from trainguard.scan import ScanPolicy
from trainguard.testing.forge import forge

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees another's keys."""
    monkeypatch.setenv("TRAINGUARD_HOME", str(tmp_path / "state"))


def save_argparse(path: Path) -> Any:
    """What torch's own restricted unpickler refuses: arguments beside weights, in pickle protocol 4."""
    value = {"args": argparse.Namespace(lr=0.1), "rng": numpy.random.RandomState(1).get_state(), "w": torch.ones(2)}
    torch.save(value, path, pickle_protocol=4)
    return value


def test_torch_files_of_both_formats_come_back_as_they_were_saved(tmp_path: Path) -> None:
    """Zip and legacy, with arrays and plain values."""
    value = {"w": torch.arange(6.0).reshape(2, 3).t(), "steps": [1, 2], "rng": numpy.arange(3)}
    for zipped in (True, False):
        torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        opened = trainguard.open_checkpoint(tmp_path / "a.pt")
        assert torch.equal(opened["w"], value["w"])
        assert opened["steps"] == [1, 2]
        assert numpy.array_equal(opened["rng"], value["rng"])


def test_training_state_that_torch_refuses_is_opened_with_its_exact_names(tmp_path: Path) -> None:
    """Users need no weights_only=False."""
    value = save_argparse(tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError), pytest.warns(UserWarning, match="protocol"):
        torch.load(tmp_path / "a.pt", weights_only=True)
    opened = trainguard.open_checkpoint(tmp_path / "a.pt")
    assert opened["args"] == value["args"]
    assert numpy.array_equal(opened["rng"][1], value["rng"][1])


def test_pickle_joblib_numpy_safetensors_and_json_files_open(tmp_path: Path) -> None:
    """Each by the loader its content asks for."""
    array = numpy.arange(6.0).reshape(2, 3)
    with (tmp_path / "a.pkl").open("wb") as file:
        pickle.dump({"x": array}, file)
    joblib.dump({"x": array}, tmp_path / "a.joblib")
    numpy.save(tmp_path / "a.npy", array)
    objects = numpy.array([1, "a", None], dtype=object)
    numpy.savez(tmp_path / "a.npz", plain=array, objects=objects)
    save_safetensors({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text('{"hidden": 8}')
    opened = {path.suffix: trainguard.open_checkpoint(path) for path in sorted(tmp_path.glob("a.*"))}
    assert numpy.array_equal(opened[".pkl"]["x"], array)
    assert numpy.array_equal(opened[".joblib"]["x"], array)
    assert numpy.array_equal(opened[".npy"], array)
    assert list(opened[".npz"]["objects"]) == [1, "a", None]
    assert torch.equal(opened[".safetensors"]["w"], torch.ones(3))
    assert opened[".json"] == {"hidden": 8}


def test_a_folder_opens_as_a_dict_by_file_name(tmp_path: Path) -> None:
    """As the transformers Trainer leaves one; text that holds no data is vetted and left out."""
    folder = checkpoints.save_folder(tmp_path / "step-9", 9)
    (folder / "README.md").write_text("# a model\n")
    opened = trainguard.open_checkpoint(folder)
    assert sorted(opened) == sorted(p.name for p in folder.iterdir() if p.name != "README.md")
    assert opened["scheduler.pt"] == {"last_epoch": 9, "base_lrs": [1e-3]}


def test_a_distributed_checkpoint_opens_as_the_state_dict_it_was(tmp_path: Path) -> None:
    """Tensors from their pieces, other values through the vetted names, nesting restored."""
    state = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "opt": {"lr": 0.1, "l": [1, torch.ones(2)]}}
    dcp.save(state, checkpoint_id=tmp_path / "ckpt" / "dcp", no_dist=True)
    opened = trainguard.open_checkpoint(tmp_path / "ckpt" / "dcp")
    assert torch.equal(opened["model"]["w"], state["model"]["w"])  # type: ignore[index]
    assert opened["opt"]["lr"] == 0.1
    assert torch.equal(opened["opt"]["l"][1], torch.ones(2))
    assert torch.equal(trainguard.open_checkpoint(tmp_path / "ckpt")["dcp"]["model"]["w"], opened["model"]["w"])


@pytest.mark.slow
def test_no_forgery_is_loaded_and_none_runs(tmp_path: Path) -> None:
    """Every published way of hiding code: refused with one sentence, and its marker never made."""
    for forged in forge(tmp_path / "forged", tmp_path / "marker"):
        with pytest.raises((LoadRefused, Unavailable)) as caught:
            trainguard.open_checkpoint(forged.path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_a_side_file_with_code_keeps_the_whole_folder_closed(tmp_path: Path) -> None:
    """S2: clean weights, payload in rng_state.pth; and in the metadata of a distributed checkpoint."""
    payload = f"\x80\x02cposix\nmkdir\nX{chr(len(str(tmp_path / 'm')))}\0\0\0{tmp_path / 'm'}\x85R.".encode("latin-1")
    folder = checkpoints.save_folder(tmp_path / "step-9", 9)
    (folder / "rng_state.pth").write_bytes(payload)
    with pytest.raises(UnsafeCheckpoint, match=r"rng_state\.pth at byte .*posix\.mkdir"):
        trainguard.open_checkpoint(folder)
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(payload)
    with pytest.raises(UnsafeCheckpoint, match=r"\.metadata"):
        trainguard.open_checkpoint(tmp_path / "dcp")
    assert not (tmp_path / "m").exists()


def test_what_nobody_vetted_is_refused_with_the_line_that_would_trust_it(tmp_path: Path) -> None:
    """And opens once it is trusted by name."""
    with (tmp_path / "a.pkl").open("wb") as file:
        pickle.dump({"text": string.Template("$a")}, file)
    with pytest.raises(UnvettedCheckpoint) as caught:
        trainguard.open_checkpoint(tmp_path / "a.pkl")
    assert "string.Template instance" in str(caught.value)
    trusting = ScanPolicy(trust=("string.Template instance",))
    opened = trainguard.open_checkpoint(tmp_path / "a.pkl", policy=trusting)
    assert opened["text"].substitute(a=1) == "1"


def test_a_file_swapped_while_it_is_vetted_is_not_what_gets_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place and by rename: the held copy is what was judged, and nobody can write to that."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(2)}, path)
    vet_file = checkpoint.vet_file

    def swap(descriptor: int, *arguments: Any, **options: Any) -> Any:
        torch.save({"w": torch.ones(2)}, path)
        with pytest.raises(OSError, match=r"not permitted|denied"):
            os.pwrite(descriptor, b"x", 0)
        return vet_file(descriptor, *arguments, **options)

    monkeypatch.setattr(checkpoint, "vet_file", swap)
    assert torch.equal(trainguard.open_checkpoint(path)["w"], torch.zeros(2))


def test_a_sealed_checkpoint_opens_and_a_changed_one_names_its_tensor(tmp_path: Path) -> None:
    """S11: a layer scaled after sealing; size and keys as they were."""
    home = Home(tmp_path / "state")
    folder = checkpoints.save_folder(tmp_path / "step-9", 9)
    checkpoints.seal(home, folder, 9)
    opened = trainguard.open_checkpoint(folder, seal="required")
    assert "model.sig" not in opened
    assert trainguard.open_checkpoint(folder / "scheduler.pt", seal="required") == opened["scheduler.pt"]
    optimizer = torch.load(folder / "optimizer.pt")
    optimizer["state"][2]["exp_avg"].zero_()
    torch.save(optimizer, folder / "optimizer.pt")
    with pytest.raises(NotWhatWasSealed, match=r"exp_avg") as caught:
        trainguard.open_checkpoint(folder)
    assert caught.value.findings[0].outcome == "violated"
    with pytest.raises(NotWhatWasSealed):
        trainguard.open_checkpoint(folder / "scheduler.pt")
    assert "optimizer.pt" in trainguard.open_checkpoint(folder, seal="ignore")


def test_bytes_that_are_put_back_before_they_are_verified_are_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seal is compared with what is held, not with what lies there by then."""
    home = Home(tmp_path / "state")
    path = checkpoints.save_file(tmp_path / "a.pt", 3)
    checkpoints.seal(home, path, 3)
    good = path.read_bytes()
    torch.save({"w": torch.zeros(2)}, path)
    verify_sealed = checkpoint.verify_sealed

    def restore(*arguments: Any, **options: Any) -> Any:
        path.write_bytes(good)
        return verify_sealed(*arguments, **options)

    monkeypatch.setattr(checkpoint, "verify_sealed", restore)
    with pytest.raises(NotWhatWasSealed, match="changed while it was opened"):
        trainguard.open_checkpoint(path)


def test_a_seal_that_is_required_must_be_there_and_be_ours(tmp_path: Path) -> None:
    """Nothing sealed here; sealed by somebody else; no key to check with."""
    path = checkpoints.save_file(tmp_path / "a.pt", 3)
    with pytest.raises(Unavailable, match="no key to verify with"):
        trainguard.open_checkpoint(path, seal="required")
    checkpoints.seal(Home(tmp_path / "state"), checkpoints.save_file(tmp_path / "b.pt", 4), 4)
    with pytest.raises(SealMissing, match="has no seal"):
        trainguard.open_checkpoint(path, seal="required")
    assert trainguard.open_checkpoint(path)["step"] == 3
    checkpoints.seal(Home(tmp_path / "other"), path, 3)
    with pytest.raises(NotWhatWasSealed, match="not by the expected signer"):
        trainguard.open_checkpoint(path)
    key = tmp_path / "other" / "keys" / "attestation.pub"
    assert trainguard.open_checkpoint(path, key=key)["step"] == 3
    with pytest.raises(Misuse, match="expected 'if-present'"):
        trainguard.open_checkpoint(path, seal="always")  # type: ignore[arg-type]


def test_a_module_that_stands_in_for_a_library_is_refused_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ShadowPickle: the name is on the list, and here it leads elsewhere."""
    for name in ("colorsys", "torchmetrics"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ModuleShadowed, match=f"{name}: the checkpoint needs it from"):
            check_place(name)
    assert not (tmp_path / "marker").exists()
    for name in ("torch", "numpy", "collections", "builtins", "argparse"):
        check_place(name)


def test_a_name_that_was_not_vetted_cannot_be_resolved() -> None:
    """The second layer: the unpickler knows the vetted names and no other."""
    allowed = {"builtins.set": set}
    assert find(allowed, "__builtin__", "set") is set
    with pytest.raises(LoadRefused, match=r"posix\.mkdir"):
        find(allowed, "posix", "mkdir")


def test_what_is_no_checkpoint_is_one_clear_sentence(tmp_path: Path) -> None:
    """A missing file, a FIFO, links in circles, an empty folder, an empty file, text."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.pt").touch()
    (tmp_path / "notes.txt").write_text("hello\n")
    for name, kind, message in (
        ("missing", Misuse, "no such file"),
        ("fifo", Misuse, "expected a checkpoint in a regular file, found a FIFO"),
        ("loop", Unavailable, "cannot be opened: Too many levels of symbolic links"),
        ("empty", Misuse, "empty folder"),
        ("nothing.pt", Unavailable, "empty file"),
        ("notes.txt", Misuse, "found text"),
    ):
        with pytest.raises(kind, match=message) as caught:
            trainguard.open_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_that_changes_while_it_is_copied_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one state and half of another is nobody's checkpoint."""
    path = checkpoints.save_file(tmp_path / "a.pt", 3)
    send = os.sendfile

    def send_and_change(*arguments: Any) -> int:
        count = send(*arguments)
        with path.open("ab") as file:
            file.write(b"more")
        return count

    monkeypatch.setattr(os, "sendfile", send_and_change)
    with pytest.raises(Unavailable, match="changed while it was read"):
        hold(path)


def test_importing_trainguard_brings_in_neither_torch_nor_the_loader(tmp_path: Path) -> None:
    """The public function comes with its first use."""
    code = (
        "import json, sys, trainguard; before = sorted(sys.modules);"
        "trainguard.open_checkpoint; print(json.dumps([before, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    before, after = json.loads(done.stdout)
    assert "trainguard.loading" not in before
    assert "trainguard.loading" in after
    assert "torch" not in after
