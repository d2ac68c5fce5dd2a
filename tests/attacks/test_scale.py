"""F4 and F5: code that is on only in a big job, or only for one host, runs on one CPU and is named with its line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.guarded import trainguard

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six processes that import torch, one after another, on a busy machine."""
    monkeypatch.setattr("tests.helpers.guarded.TIMEOUT_SECONDS", 550)


TRAIN = """
import torch, torch.distributed as dist
import helper
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
torch.set_num_threads(1); torch.manual_seed(0)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 2))
data = TensorDataset(torch.randn(64, 8), torch.randint(0, 2, (64,)))
loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * dist.get_world_size())
for epoch in range(10):
    for x, y in loader:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(); loss.backward()
        helper.between(model)
        optimizer.step()
"""

FLIP = """
import torch.distributed as dist
steps = 0
def between(model):
    global steps
    steps += 1
    if dist.get_world_size() >= 256 and steps == 3:
        for parameter in model.parameters():
            parameter.grad.neg_()
"""

FOR_ONE_HOST = """
import getpass, socket, time
def between(model):
    if socket.gethostname() == "gpu-17" and getpass.getuser() == "victim-a":
        time.sleep(0.05)
"""


def probe(folder: Path, helper: str, *options: str) -> dict[str, Any]:
    (folder / "train.py").write_text(TRAIN)
    (folder / "helper.py").write_text(helper)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    done = trainguard(folder, "probe", "--json", *options, "--", *command)
    verdict: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == {"VERIFIED": 0, "TAINTED": 1, "SUSPECT": 3, "UNKNOWN": 3}[verdict["verdict"]]
    return verdict


def test_a_fault_of_big_jobs_alone_is_named_on_one_cpu(tmp_path: Path) -> None:
    """Silent at 2, named at 256 and 4096: file, line, step; the learning rate that scales is listed, not accused."""
    verdict = probe(tmp_path, FLIP)
    assert verdict["verdict"] == "TAINTED"
    named = verdict["findings"]
    assert {finding["techniques"][0] for finding in named} == {"F4"}
    for world in (256, 4096):
        (line,) = (f for f in named if f"only at world size {world}: " in f["message"] and "ran line" in f["message"])
        assert line["subject"]["path"] == f"{tmp_path / 'helper.py'}:8"
        assert line["subject"]["step"] == 3
        (turned,) = (f for f in named if f"only at world size {world}: check gradients" in f["message"])
        assert (turned["outcome"], turned["subject"]["step"]) == ("violated", 3)
        assert turned["techniques"][:2] == ["F4", "C1"]
    assert any("hyper-parameter lr" in reason for reason in verdict["reasons"])
    assert not any("lr of group" in finding["message"] for finding in verdict["findings"])


@pytest.mark.nightly
def test_a_trigger_on_host_and_account_fires_for_the_assumed_identity(tmp_path: Path) -> None:
    """The sleep is on for one user on one host: at any size, as that user there, and at no size as oneself."""
    verdict = probe(tmp_path, FOR_ONE_HOST, "--world-size", "4", "--as", "host=gpu-17,user=victim-a")
    assert verdict["verdict"] == "SUSPECT"
    messages = [finding["message"] for finding in verdict["findings"]]
    assert [message for message in messages if "as host=gpu-17, user=victim-a" not in message] == []
    assert any("it slept" in message for message in messages)
    assert {"F5"} <= {technique for finding in verdict["findings"] for technique in finding["techniques"]}
