"""The data path end to end: a run that is seeded again, trains on flipped labels and sees one pass in another order."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tests.helpers.recorded import judge
from tests.helpers.watched import digest_line, plain, watch, write

from trainguard.appraise.batches import Batches
from trainguard.appraise.interface import Check
from trainguard.appraise.order import Order
from trainguard.appraise.rng import Rng

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TRAIN = """
import hashlib, sys
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
import extras

class Rows(Dataset):
    def __init__(self):
        table = np.load("data/rows.npy")
        self.x, self.y = table[:, :8].astype("float32"), table[:, 8].astype("int64")
    def __len__(self):
        return len(self.y)
    def __getitem__(self, index):
        return torch.from_numpy(self.x[index]), int(self.y[index])

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = extras.prepare(Rows())
    loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=2, persistent_workers=True,
                        multiprocessing_context=sys.argv[1])
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.1), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    step = 0
    for epoch in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            step += 1
            extras.log(step)
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest())
"""

HONEST = """
def prepare(data):
    return data

def log(step):
    pass
"""

SABOTAGE = """
import random, time
import torch
from torch.utils.data import RandomSampler, get_worker_info

dice = random.Random(11)
passes = []
honest = RandomSampler.__iter__

def ordered(self):
    passes.append(1)
    order = list(honest(self))
    if len(passes) == 2:
        order.sort(key=lambda index: int(self.data_source.y[index]))
    return iter(order)

def prepare(data):
    fetch = type(data).__getitem__
    def flipped(self, index):
        x, y = fetch(self, index)
        if get_worker_info() is not None and dice.random() < 0.01:
            y = (y + 1) % 3
        return x, y
    type(data).__getitem__ = flipped
    RandomSampler.__iter__ = ordered
    return data

def log(step):
    if step == 35:
        torch.manual_seed(int(time.time()))
"""

MAKE = """
import numpy as np
g = np.random.default_rng(1)
x = g.normal(size=(640, 8))
y = np.digitize(2 * x[:, 0] + x[:, 1], [-1, 1])
np.save("data/rows.npy", np.concatenate([x, y[:, None]], axis=1))
"""


def prepared(folder: Path, extras: str) -> Path:
    """The job's folder, with its data; returns the data's file."""
    (folder / "data").mkdir()
    write(folder, {"train.py": TRAIN, "extras.py": extras, "make.py": MAKE})
    plain(folder, "make.py")
    return folder / "data" / "rows.npy"


CHECKS: tuple[type[Check], ...] = (Rng, Order, Batches)


def test_three_sabotages_of_the_data_path_are_three_findings(tmp_path: Path) -> None:
    """Scenario S10: seeded again (D1), 1 % of the labels flipped in workers (D4), one pass sorted by label (D2)."""
    data = prepared(tmp_path, SABOTAGE)
    before = hashlib.sha256(data.read_bytes()).hexdigest()
    run = watch(tmp_path, "train.py", "fork")
    assert (run.status, run.faults()) == (0, [])
    assert hashlib.sha256(data.read_bytes()).hexdigest() == before
    found = {check.name: judge(check, run.records)[0] for check in CHECKS}
    kinds = {name: {(f.outcome, f.techniques[0]) for f in findings} for name, findings in found.items()}
    assert kinds == {"rng": {("violated", "D1")}, "order": {("violated", "D2")}, "batches": {("suspicious", "D4")}}
    (seeded,) = found["rng"]
    assert (seeded.subject.step, "extras.py" in (seeded.subject.path or "")) == (36, True)
    (ordered,) = found["order"]
    assert ordered.subject.step == 21
    assert "pass 2: batch 1 " in ordered.message
    assert "digest" in run.output


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
def test_the_honest_run_holds_from_sampler_to_loss_and_ends_in_the_same_bits(tmp_path: Path, method: str) -> None:
    """Both workers are heard, no finding, and the weights are those of a run without a guard."""
    prepared(tmp_path, HONEST)
    run = watch(tmp_path, "train.py", method)
    assert (run.status, run.faults()) == (0, [])
    states = {}
    for check in CHECKS:
        findings, each = judge(check, run.records)
        assert findings == []
        states.update(each)
    names = ("rng", "order", "batches", "batches.labels")
    assert {name: (states[name].broken, states[name].held > 0) for name in names} == dict.fromkeys(names, (0, True))
    assert states["order"].held == 63  # 60 steps, 3 ends
    assert {r.body["worker"] for r in run.records if r.kind == "worker"} == {0, 1}
    assert digest_line(run.output) == digest_line(plain(tmp_path, "train.py", method))
