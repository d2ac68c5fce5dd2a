"""E9: the save path writes other weights than memory holds. Two independent digests of the same storages disagree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import run

TRAIN = """
import os, sys, torch
torch.manual_seed(0); torch.set_num_threads(1)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
        self.head = torch.nn.Linear(8, 8, bias=False)
        self.head.weight = self.layers[2].weight
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

real = torch.save

def altered_file(value, path):
    real(value, path)
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        weight = value["model"]["layers.1.bias"].numpy()
        at = data.index(weight.tobytes())
        data[at : at + weight.nbytes] = (weight * 1.01).tobytes()
        file.seek(0); file.write(data)

def altered_value(value, path):
    model = dict(value["model"])
    model["layers.2.weight"] = model["layers.2.weight"] * 1.01
    real({**value, "model": model}, path)

def altered_bias(value, path):
    model = dict(value["model"])
    model["layers.1.bias"] = model["layers.1.bias"] * 1.01
    real({**value, "model": model}, path)

def untied(value, path):
    # equal values in a storage of its own, as some formats want it
    model = dict(value["model"])
    model["head.weight"] = model["head.weight"].clone()
    real({**value, "model": model}, path)

ways = {"honest": real, "file": altered_file, "tied": altered_value, "bias": altered_bias, "untied": untied}
save = ways[sys.argv[1]]
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(6):
    optimizer.zero_grad(); model(torch.randn(3, 8)).pow(2).mean().backward(); optimizer.step()
    if step % 2:
        save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "tmp.pt")
        os.replace("tmp.pt", f"step-{step}.pt")
"""


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("how", ["honest", "untied", "file", "bias", "tied"])
def test_a_layer_scaled_on_its_way_to_the_file_is_named(tmp_path: Path, how: str) -> None:
    """Keys, sizes and finiteness as they were. The seal of the same file holds: it is what was written."""
    (tmp_path / "train.py").write_text(TRAIN)
    done = run(tmp_path, sys.executable, "train.py", how)
    assert done.status == (0 if how in ("honest", "untied") else done.status)
    found = sorted((f["outcome"], f["subject"]["tensor"], Path(f["subject"]["path"]).name) for f in done.by("saves"))
    tensor = "model.layers.2.weight" if how == "tied" else "model.layers.1.bias"
    outcome = {"file": "violated", "bias": "suspicious", "tied": "suspicious"}.get(how)
    assert found == [(outcome, tensor, f"step-{step}.pt") for step in (1, 3, 5) if outcome]
    assert {f["techniques"][0] for f in done.by("saves")} <= {"E9"}
    assert done.link("saves")["held"] + done.link("saves")["broken"] == 3, done.stderr
    assert done.link("seals")["broken"] == 0


DISTRIBUTED = """
import sys, torch, warnings
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
warnings.simplefilter("ignore")
torch.manual_seed(0); torch.set_num_threads(1)
how = sys.argv[1]
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
if how.startswith("sharded"):
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(4):
    optimizer.zero_grad(); model(torch.randn(3, 8)).pow(2).mean().backward(); optimizer.step()
    if step % 2:
        state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "seen": {"tokens": [torch.tensor(step)]}}
        dcp.save(state, checkpoint_id=f"step-{step}")
        if how.endswith("altered"):
            weight = model.state_dict()["2.weight"]
            weight = getattr(weight, "_local_tensor", weight).numpy()
            with open(f"step-{step}/__0_0.distcp", "r+b") as file:
                data = bytearray(file.read())
                at = data.index(weight.tobytes())
                data[at : at + weight.nbytes] = (weight * 1.01).tobytes()
                file.seek(0); file.write(data)
dist.destroy_process_group()
"""


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("how", ["honest", "sharded-honest", "sharded-altered"])
def test_a_tensor_of_a_distributed_checkpoint_altered_on_its_way_is_named(tmp_path: Path, how: str) -> None:
    """A row of archives, one for each tensor, plain and of FSDP2: each is compared with what memory held."""
    (tmp_path / "train.py").write_text(DISTRIBUTED)
    done = run(tmp_path, sys.executable, "train.py", how)
    found = {(f["outcome"], f["techniques"][0], f["subject"]["tensor"]) for f in done.by("saves")}
    assert found == ({("violated", "E9", "model.2.weight")} if how.endswith("altered") else set()), done.stderr
    link = done.link("saves")
    assert (link["held"], link["broken"]) == ((0, 2) if how.endswith("altered") else (2, 0)), link
    assert done.status == (0 if how.endswith("honest") else done.status)
