"""F10: a job whose launcher starts its ranks again is measured again, and what it resumes from is verified."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import Guarded, run

from trainguard.archive import LogLeaves, RunReader
from trainguard.home import Home


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four interpreters, one after the other on two cores."""
    monkeypatch.setattr("tests.helpers.guarded.TIMEOUT_SECONDS", 250)


pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(300)]

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
torch.manual_seed(0)
model = DistributedDataParallel(nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
start = 0
if attempt:
    saved = torch.load("checkpoint.pt", weights_only=True)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    start = saved["step"]
    {again}
torch.manual_seed(1 + rank + 10 * attempt)
for step in range(start + 1, 25):
    loss = model(torch.randn(16, 8)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 10 and not attempt:
        if rank == 0:
            saved = {{"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}}
            torch.save(saved, "checkpoint.pt")
        dist.barrier()
        if rank == 0:
            {between}
        sys.exit(3)
dist.destroy_process_group()
"""


def restarted(folder: Path, *, between: str = "pass", again: str = "pass") -> Guarded:
    """A rank that fails once, after step 10, and goes on from the checkpoint. Lines to run before and after that.

    One rank: gloo ranks that are started again at once sometimes wait for addresses of the attempt before, forever.
    """
    (folder / "train.py").write_text(SCRIPT.format(between=between, again=again))
    command = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "1",
        "train.py",
    )
    return run(folder, sys.executable, *command, options=("--name", "job", "--links", "all"))


def attempts(folder: Path) -> list[int]:
    """Attempts that were measured."""
    home = Home(folder / ".trainguard")
    records = RunReader(home, "job", leaves=LogLeaves(home)).records()
    return [record.body["attempt"] for record in records if record.kind == "measurement"]


def test_an_honest_restart_is_measured_again_and_quiet(tmp_path: Path) -> None:
    """The second attempt resumes from what the first one saved; nothing of it is found."""
    done = restarted(tmp_path)
    assert done.status == 0, done.stderr
    assert attempts(tmp_path) == [0, 1]
    assert [f for f in done.findings if f["outcome"] != "not_checked"] == []


def test_a_restart_with_other_code_and_another_flag_is_found(tmp_path: Path) -> None:
    """The main script is rewritten while nobody runs, and what runs then computes with less precision."""
    rewrite = "open('train.py', 'a').write('x = 1')"
    done = restarted(tmp_path, between=rewrite, again="torch.set_float32_matmul_precision('medium')")
    assert done.status == 0, done.stderr
    found = [f for f in done.findings if "F10" in f["techniques"][:1]]
    assert {f["check"] for f in found} >= {"environment", "replicas"}
    assert any("float32_matmul_precision" in f["message"] for f in found)
    assert any("train.py" in (f["subject"]["path"] or f["message"]) for f in found)
