"""F10: a job whose launcher starts its ranks again is measured again, and what it resumes from is verified."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import Guarded, run

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.nightly]

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
torch.manual_seed(1 + rank + 10 * attempt)
for step in range(start + 1, 25):
    loss = model(torch.randn(16, 8)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 10 and not attempt:
        if rank == 0:
            torch.save({{"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}}, "checkpoint.pt")
        dist.barrier()
        import time; time.sleep(3)
        if rank == 0:
            {between}
        sys.exit(3)
dist.destroy_process_group()
"""

TAMPER = """
            saved = torch.load("checkpoint.pt", weights_only=True)
            saved["model"]["weight"].mul_(1.01)
            torch.save(saved, "checkpoint.pt")
"""


def restarted(folder: Path, between: str = "pass", *options: str) -> Guarded:
    """Two ranks that fail once, after step 10, and go on from the checkpoint."""
    (folder / "train.py").write_text(SCRIPT.format(between=between.strip()))
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "train.py")
    return run(folder, sys.executable, *command, options=("--name", "job", "--links", "all", *options))


def attempts(folder: Path) -> list[int]:
    """Attempts that were measured."""
    lines = (folder / ".trainguard" / "runs" / "job" / "spool").read_text().splitlines()
    records = [json.loads(line) for line in lines if '"measurement"' in line]
    return [r["body"]["attempt"] for r in records if r.get("kind") == "measurement"]


def test_an_honest_restart_is_measured_again_and_quiet(tmp_path: Path) -> None:
    """Both attempts held, none of their ranks compared with one of the other attempt."""
    done = restarted(tmp_path)
    assert done.status == 0, done.stderr
    assert attempts(tmp_path) == [0, 1]
    assert done.techniques() & {"F1", "F2", "F3", "F9", "F10", "E3", "E4", "E6"} == set(), done.findings
    assert done.link("replicas")["state"] == "held"


def test_a_checkpoint_changed_between_the_attempts_is_found_when_it_is_opened(tmp_path: Path) -> None:
    """E3 within one run: the file is not what the first attempt saved and we sealed."""
    done = restarted(tmp_path, f"import subprocess; subprocess.run([sys.executable, 'tamper.py'])")
    assert done.status == 0
