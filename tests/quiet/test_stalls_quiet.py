"""N5, and the whole of S7: a rank that is short of processors beside one that sleeps; no label is mixed up."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.helpers.supervised import supervise
from tests.helpers.watched import write

from trainguard.appraise.kills import Kills
from trainguard.appraise.stalls import Stalls

pytestmark = pytest.mark.torch

TRAIN = """
import os, random, sys, time
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
if rank == 1:  # as a scheduler would, from outside: one processor, shared with a hog, at a low priority
    processor = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processor})
    os.nice(15)
    if os.fork() == 0:
        end = time.monotonic() + float(sys.argv[1])
        while time.monotonic() < end and os.getppid() != 1:
            pass
        os._exit(0)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(128, 128))
optimizer = torch.optim.AdamW(model.parameters())
draw = random.Random(5)
if rank == 0 and "sleep" in sys.argv:
    import attack
    attack.plant(optimizer, draw)
began, step = time.monotonic(), 0
stop = torch.zeros(1)
while not stop:
    step += 1
    optimizer.zero_grad()
    for _ in range(3):
        model(torch.randn(256, 128)).square().mean().backward()
    optimizer.step()
    stop.fill_(float(time.monotonic() - began > float(sys.argv[1])))
    dist.all_reduce(stop)
os._exit(0)
"""

ATTACK = """
import time
def plant(optimizer, draw):
    def slow(*_):
        if draw.random() < 0.1:
            time.sleep(draw.uniform(0.05, 0.5))
    optimizer.register_step_pre_hook(slow)
"""


def job(folder: Path, *arguments: str) -> tuple[str, ...]:
    write(folder, {"train.py": TRAIN, "attack.py": ATTACK})
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return (*launcher, "train.py", *arguments)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinity")
@pytest.mark.nightly
def test_random_sleeps_in_the_optimizer_beside_a_crowded_rank(tmp_path: Path) -> None:
    """S7: phase, rank, line and device-hours of the one; the other is named with its reason and accused of nothing."""
    run = supervise(tmp_path, job(tmp_path, "14", "sleep"), env={"OMP_NUM_THREADS": "1"})
    findings, link = run.judge(Stalls)
    assert {(f.subject.rank, f.subject.path, f.outcome) for f in findings} == {
        (0, f"{tmp_path}/attack.py:6", "suspicious")
    }
    (balance,) = [f for f in findings if " slept " in f.message]
    assert "attack.py:6 (slow), in optimizer" in balance.message
    assert "device-hours lost (this rank alone)" in balance.message
    assert "all 2 ranks waiting for it" in balance.message
    assert "rank 1 is slow for another reason: co-tenant load" in balance.message
    assert any(note.startswith("rank 1: co-tenant load") and "nice" in note for note in link.blind)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinity")
@pytest.mark.nightly
def test_a_straggler_from_co_tenant_load_is_accused_of_nothing(tmp_path: Path) -> None:
    """N5: the same job without the sleeps."""
    run = supervise(tmp_path, job(tmp_path, "8"), env={"OMP_NUM_THREADS": "1"})
    findings, link = run.judge(Stalls)
    assert findings == []
    assert any(note.startswith("rank 1: co-tenant load") for note in link.blind)
    assert [f for f in run.judge(Kills)[0] if f.outcome != "not_checked"] == []


def test_an_honest_loader_with_retries_and_pauses_is_quiet(tmp_path: Path) -> None:
    """Loader workers, a dataset that waits for its storage, a retry with back-off, a checkpoint now and then."""
    train = """
import time, torch
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(1)
class Stored(Dataset):
    def __len__(self): return 64
    def __getitem__(self, index):
        if index % 16 == 0:
            time.sleep(0.06)
        return torch.randn(16)
def retry(action):
    for pause in (0.05, 0.1):
        try:
            return action()
        except OSError:
            time.sleep(pause)
model = torch.nn.Linear(16, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for workers in (0, 1):
    for step, batch in enumerate(DataLoader(Stored(), batch_size=4, num_workers=workers)):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if step == 8:
            retry(lambda: open("/nonexistent"))
        if step % 8 == 0:
            torch.save(model.state_dict(), "model.pt")
"""
    write(tmp_path, {"train.py": train})
    run = supervise(tmp_path)
    assert run.ended.status == 0
    findings, link = run.judge(Stalls)
    assert findings == []
    assert (link.held > 0, link.broken, link.required) == (True, 0, False)
