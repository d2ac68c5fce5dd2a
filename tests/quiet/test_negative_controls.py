"""What must not end in an accusation: honest bugs, approved changes, noise (threat model, N1 to N7).

N1 (a flipped bit) is in tests/attacks/test_replicas.py, N4 (memory, lost peers) in tests/attacks/test_kills.py, N5 (a
crowded rank) in test_stalls_quiet.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import Guarded, run, trainguard

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]
PYTHON = sys.executable

TRAIN = """
import json, torch
import torch.nn.functional as F
torch.set_num_threads(1)
torch.manual_seed(0)
noise = torch.Generator().manual_seed(5)
class Noisy(torch.nn.Module):
    def forward(self, x):
        return x * (1 + {noise} * torch.randn(x.shape, generator=noise))
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), Noisy(), torch.nn.Linear(32, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(1, 31):
    if step % 5 == 1:
        rate = json.load(open("config.json"))["lr"]
        for group in optimizer.param_groups:
            group["lr"] = rate
    optimizer.zero_grad()
    for micro in range(4):
        loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 4, (8,)))
        (loss / {share}).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step == {edit}:
        import os
        os.system("sed -i s/0.001/0.0005/ config.json")
"""


def job(folder: Path, *, share: int = 4, noise: float = 0.0, edit: int = 0, approve: tuple[str, ...] = ()) -> Guarded:
    """A training with a config, locked as it is and run against that lock."""
    (folder / "train.py").write_text(TRAIN.format(share=share, noise=noise, edit=edit))
    (folder / "config.json").write_text('{"lr": 0.001}')
    locked = trainguard(folder, "lock", *(f"--approve={each}" for each in approve), "--", PYTHON, "train.py")
    assert locked.returncode == 0, locked.stderr
    return run(folder, PYTHON, "train.py")


@pytest.mark.nightly
def test_an_honest_bug_in_approved_code_is_no_finding(tmp_path: Path) -> None:
    """N2: the loss of four micro-batches is divided by 16. The code says so and was approved: design, not sabotage."""
    done = job(tmp_path, share=16)
    assert done.techniques() == set()
    assert done.verdict["verdict"] == "VERIFIED", done.verdict["reasons"]


@pytest.mark.nightly
def test_noise_of_kernels_is_no_finding(tmp_path: Path) -> None:
    """N7: results that differ in the seventh digit from call to call, as on a device whose sums have no order."""
    done = job(tmp_path, noise=1e-7)
    assert done.techniques() == set()
    assert done.verdict["verdict"] == "VERIFIED", done.verdict["reasons"]


@pytest.mark.nightly
def test_a_config_edited_in_mid_run_names_file_and_step_and_nobody(tmp_path: Path) -> None:
    """N6 without approval: an input changed while the run read it. Suspicion about a file, at most; no account."""
    done = job(tmp_path, edit=12)
    bad = [f for f in done.findings if f["outcome"] != "not_checked"]
    assert bad
    assert {f["check"] for f in bad} <= {"inputs", "hyperparameters"}
    assert any("config.json" in f["message"] for f in bad)
    assert not any("uid" in f["message"] or "account" in f["message"] for f in bad)
