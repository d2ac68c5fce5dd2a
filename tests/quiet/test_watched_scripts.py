"""Honest scripts under watch: no finding of the inventory checks, and bit for bit the same result as without."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.recorded import judge
from tests.helpers.watched import digest_line, plain, training, watch, write

from trainguard.appraise.batches import Batches
from trainguard.appraise.code import Code
from trainguard.appraise.deferred import Deferred
from trainguard.appraise.dispatch import Dispatch
from trainguard.appraise.hooks import Hooks
from trainguard.appraise.inputs import Inputs
from trainguard.appraise.interface import Check
from trainguard.appraise.modules import Modules
from trainguard.appraise.order import Order
from trainguard.appraise.rng import Rng
from trainguard.appraise.surface import Surface

ODD = """
import hashlib, random
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler, get_worker_info, random_split

torch.set_num_threads(1)
torch.manual_seed(3)
np.random.seed(3)
random.seed(3)

class Stream(IterableDataset):
    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(first, 60, step):
            yield torch.randn(8), i % 3

class Named(Dataset):
    def __len__(self):
        return 90
    def __getitem__(self, i):
        np.random.rand()
        return {"x": torch.randn(8), "label": i % 3, "name": str(i)}

net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 3))
optimizer = torch.optim.AdamW(net.parameters())

def fit(batches):
    for batch in batches:
        x, y = (batch["x"], batch["label"]) if isinstance(batch, dict) else batch
        x, y = (x[None], [y]) if x.dim() == 1 else (x, y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.as_tensor(y)).backward()
        optimizer.step()

if __name__ == "__main__":
    fit(DataLoader(Stream(), batch_size=8))
    fit(DataLoader(Stream(), batch_size=8, num_workers=2))
    fit(DataLoader(Stream(), batch_size=None))
    fit(DataLoader(Named(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 90, 40)))
    fit(DataLoader(Named(), batch_sampler=[[1, 2, 3], [4, 5, 6]]))
    fit(DataLoader(Named(), batch_size=None, shuffle=True))
    seeded = lambda worker: torch.manual_seed(worker)
    fit(DataLoader(Named(), batch_size=16, shuffle=True, num_workers=1, drop_last=True, worker_init_fn=seeded))
    one, two = random_split(Named(), [60, 30])
    loader = DataLoader(one, batch_size=8, shuffle=True)
    next(iter(loader))
    for epoch in range(2):
        torch.manual_seed(100 + epoch)
        np.random.seed(epoch)
        fit(loader)
        with torch.no_grad():
            for batch in DataLoader(two, batch_size=8):
                net(batch["x"])
        state = torch.get_rng_state()
        torch.rand(50)
        torch.set_rng_state(state)
    parts = [p.detach().numpy().tobytes() for p in net.parameters()] + [torch.get_rng_state().numpy().tobytes()]
    print("digest", hashlib.sha256(b"".join(parts) + np.random.get_state()[1].tobytes()).hexdigest())
"""
CHECKS: tuple[type[Check], ...] = (Code, Inputs, Modules, Hooks, Dispatch, Deferred, Surface)
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize(
    "script", ["cnn_workers", *(pytest.param(s, marks=pytest.mark.nightly) for s in ("own_batch_gpt", "schedulers"))]
)
def test_an_honest_script_has_no_finding(tmp_path: Path, script: str) -> None:
    """Memory-mapped data, loader workers, patched schedulers, weights swapped in and out."""
    run = watch(tmp_path, str(SCRIPTS / f"{script}.py"), "--steps", "12", links="governed")
    assert run.status == 0, run.output
    assert run.faults() == []
    for check in CHECKS:
        findings, link = run.judge(check)
        assert findings == [], check.name
        assert link.broken == 0


@pytest.mark.nightly
def test_training_is_bit_identical_with_and_without_the_guard(tmp_path: Path) -> None:
    """The same digest of the final weights, with every check in every step."""
    write(tmp_path, {"train.py": training(steps=12)})
    run = watch(tmp_path)
    assert digest_line(run.output) == digest_line(plain(tmp_path))
    assert {r.body["what"] for r in run.records if r.kind == "sweep"} >= {"surface", "hooks", "dispatch", "deferred"}


@pytest.mark.nightly
def test_loaders_of_every_kind_are_quiet_and_end_in_the_same_bits(tmp_path: Path) -> None:
    """Streams, workers, weights, lists of batches, no batches, dictionaries, seeds at every epoch, states put back."""
    write(tmp_path, {"train.py": ODD})
    run = watch(tmp_path)
    assert run.status == 0, run.output
    assert run.faults() == []
    for check in (Rng, Order, Batches):
        findings, states = judge(check, run.records)
        assert findings == [], check.name
        assert {state.broken for state in states.values()} == {0}
    assert digest_line(run.output) == digest_line(plain(tmp_path))
