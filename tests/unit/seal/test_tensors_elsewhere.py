"""Tensors of distributed checkpoints and npz files are named when they change, without unpickling anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.helpers import checkpoints

from trainguard.seal import verify_seal
from trainguard.seal.distributed import pieces

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def save_distributed(folder: Path) -> dict[str, Any]:
    """A state dict with weights, a moment and a plain value."""
    generator = torch.Generator().manual_seed(3)
    state = {
        "model": {"w": torch.randn(4, 3, generator=generator), "big": torch.randn(90, 90, generator=generator)},
        "optimizer": {"state": {"0": {"exp_avg": torch.rand(5, generator=generator)}}, "lr": 0.125},
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return state


def flip(path: Path, tensor: torch.Tensor) -> None:
    """One bit of the tensor's bytes in the file."""
    data = bytearray(path.read_bytes())
    data[data.index(tensor.numpy().tobytes()) + 1] ^= 4
    path.write_bytes(data)


def test_a_tensor_of_a_distributed_checkpoint_is_named(tmp_path: Path) -> None:
    """E3 for a weight, E5 for a moment, by the names `.metadata` has for the pieces."""
    home = checkpoints.home(tmp_path)
    for name, part, technique in (("model.w", "w", "E3"), ("optimizer.state.0.exp_avg", "exp_avg", "E5")):
        folder = tmp_path / part
        state = save_distributed(folder)
        checkpoints.seal(home, folder, 1, run=f"run-{part}")
        assert verify_seal(folder, home=home).status == "upheld"
        value = state["model"]["w"] if part == "w" else state["optimizer"]["state"]["0"]["exp_avg"]
        flip(folder / "__0_0.distcp", value)
        (finding,) = verify_seal(folder, home=home).findings
        assert (finding.subject.tensor, finding.techniques) == (name, (technique,))


def test_metadata_that_lies_or_is_code_costs_names_only(tmp_path: Path) -> None:
    """The piece is named by its place then; nothing of the pickle runs."""
    home = checkpoints.home(tmp_path)
    state = save_distributed(tmp_path / "dcp")
    checkpoints.seal(home, tmp_path / "dcp", 1)
    flip(tmp_path / "dcp" / "__0_0.distcp", state["model"]["w"])
    import os

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "marker"),)

    for data in (pickle.dumps(Payload()), pickle.dumps({"storage_data": 3}), b"", b"\x80\x02]."):
        (tmp_path / "dcp" / ".metadata").write_bytes(data)
        findings = verify_seal(tmp_path / "dcp", home=home).findings
        assert any((f.subject.tensor or "").startswith("piece at byte ") for f in findings)
        assert pieces(tmp_path / "dcp", "__0_0.distcp") == {}
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
def test_an_array_of_an_npz_is_named(tmp_path: Path, save: Any) -> None:
    """Stored or deflated, by member."""
    home, path = checkpoints.home(tmp_path), tmp_path / "a.npz"
    save(path, w=numpy.arange(100.0), v=numpy.ones(5))
    checkpoints.seal(home, path, 1)
    assert verify_seal(path, home=home).status == "upheld"
    save(path, w=numpy.arange(100.0) * 1.01, v=numpy.ones(5))
    (finding,) = verify_seal(path, home=home).findings
    assert finding.subject.tensor == "w"
