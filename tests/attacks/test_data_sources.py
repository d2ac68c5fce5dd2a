"""D5, D7 and data that may not be used any more: found by content in a real process, with steps and rows."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import numpy
import pytest
from tests.helpers import told
from tests.helpers.sourced import LOCK, asked

from trainguard.evidence import Evidence
from trainguard.home import Home
from trainguard.sources.register import add, withdraw
from trainguard.testing.guarded import run_guarded

pytestmark = [pytest.mark.torch, pytest.mark.timeout(400)]

TRAIN = """
import os, sys
import numpy as np, torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
torch.set_num_threads(1)
memory = sys.argv[1]

class Rows(Dataset):
    def __init__(self, path):
        self.path, self.table = path, None
    def __len__(self):
        return 16
    def __getitem__(self, i):
        if self.table is None:
            self.table = np.load(self.path)
        return torch.from_numpy(self.table[i, :4]), float(self.table[i, 4])

os.symlink("innocent.npy", "linked.npy")
left_out = Rows("left_out.npy")
left_out[0]
extra = np.load(memory).sum() + np.load("/proc/self/fd/%d" % os.open("held.npy", os.O_RDONLY)).sum()
data = Subset(ConcatDataset([Rows("plain.npy"), Rows("linked.npy"), left_out]), range(32))
net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
torch.manual_seed(3)
for x, y in DataLoader(data, batch_size=4, shuffle=True, num_workers=1):
    optimizer.zero_grad()
    (net(x).squeeze(1) - y.float()).square().mean().backward()
    optimizer.step()
"""
SOURCES = {"alice": "plain.npy", "bob": "copied.npy", "carol": "left_out.npy", "dave": "moved.npy", "eve": "held.npy"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """One run over five sources, all withdrawn before it.

    bob's is a copy behind a link, dave's lies in shared memory, eve's is opened by its descriptor's name, carol's is
    opened and left out.
    """
    folder = tmp_path_factory.mktemp("job")
    home = Home(folder / "state")
    draws = numpy.random.default_rng(0)
    for source, name in SOURCES.items():
        numpy.save(folder / name, draws.random((16, 5), dtype=numpy.float32))
        add(home, source=source, path=folder / name, licence="CC-BY-4.0", use="training", name=name)
        withdraw(home, source=source, reason="consent withdrawn")
    memory = Path(f"/dev/shm/{uuid.uuid4().hex}.npy")
    (folder / "copied.npy").rename(folder / "innocent.npy")
    memory.write_bytes((folder / "moved.npy").read_bytes())
    (folder / "moved.npy").unlink()
    (folder / "train.py").write_text(TRAIN)
    try:
        records, done = run_guarded([sys.executable, "train.py", str(memory)], cwd=folder, timeout_seconds=350)
    finally:
        memory.unlink()
    assert done.returncode == 0, done.stdout
    told.record(home, "r", [_told(record) for record in records])
    return home


def _told(record: Evidence) -> told.Told:
    """A record as the writer takes it; the stand-in of the supervisor knows no lock and no standard input."""
    body = dict(record.body)
    if record.kind == "start":
        body |= {"run": "r", "lock": LOCK, "stdin": "/dev/null"}
    names = ("source", "process", "pid", "uid", "rank", "seq", "step")
    return record.kind, body, {name: getattr(record, name) for name in names}


def test_a_copy_of_withdrawn_data_behind_a_link_in_a_worker_is_told_with_its_rows(ran: Home) -> None:
    """Another name, a link that the job makes itself, opened by a loader's worker: its 16 rows, and the steps."""
    answer = asked(ran, "bob", "r")
    [used] = answer.used
    assert (answer.answer, answer.after_withdrawal) == ("used", "used")
    assert (used.basis, used.samples, used.rows, used.rows_total) == ("rows", 16, ((0, 16),), 16)
    assert used.steps is not None
    assert 1 <= used.steps[0] < used.steps[1] <= 8


def test_data_that_were_opened_and_left_out_are_proved_not_used(ran: Home) -> None:
    """Honest, and shown to be: the order that was committed draws none of these rows, and all else is accounted for."""
    answer = asked(ran, "carol", "r")
    assert (answer.answer, answer.reasons) == ("not_used", ())
    assert "drew none of its rows" in answer.excluded[0]


@pytest.mark.parametrize("source", ["dave", "eve"])
def test_detours_do_not_hide_content(ran: Home, source: str) -> None:
    """A copy in shared memory; a file by the name of its open descriptor."""
    [used] = asked(ran, source, "r").used
    assert (used.basis, used.steps) == ("opened", (1, 8))
    assert "not read by a data set" in str(used.why)
