"""S10, S11, S12 and C10 on real runs with every in-process check off: what the audit finds alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.test_audit import ACT, POLICY, audit, replays, trainguard
from torch.utils.data import DataLoader

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]
"""Each is at least one recorded run and two replays, all of them processes that import torch."""

FINDER = ACT[: ACT.index("def arm")]
INSTALL = "\nsys.meta_path.insert(0, Finder())\n"
STEPS = 24

COMMON = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(1)
torch.manual_seed(0)
out = Path("out")
out.mkdir(exist_ok=True)
net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 3))
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
teacher = torch.randn(8, 3)
"""

RESUMED = (
    COMMON
    + """
first = 1
if len(sys.argv) > 1:
    held = torch.load(sys.argv[1])
    net.load_state_dict(held["net"])
    optimizer.load_state_dict(held["optimizer"])
    first = held["step"] + 1
for step in range(first, first + 16):
    batch = torch.randn(16, 8)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(batch), (batch @ teacher).argmax(1)).backward()
    optimizer.step()
    if step % 8 == 0 and len(sys.argv) == 1:
        held = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(held, out / f"{step}.pt")
        torch.save(held, out / "latest.pt")
"""
)

SHUFFLED = (
    COMMON
    + """
class Rows(Dataset):
    def __init__(self):
        drawn = torch.Generator().manual_seed(3)
        self.rows = torch.randn(192, 8, generator=drawn)
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, index):
        return self.rows[index], int((self.rows[index] @ teacher).argmax())
loader = DataLoader(Rows(), batch_size=16, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(1))
for epoch in range(2):
    for batch, label in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch), label).backward()
        optimizer.step()
"""
)

MEASURED = (
    COMMON
    + """
test = torch.randn(500, 8)
best = 0.0
for step in range(1, 25):
    batch = torch.randn(16, 8)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(batch), (batch @ teacher).argmax(1)).backward()
    optimizer.step()
    if step % 8 == 0:
        net.eval()
        with torch.no_grad():
            accuracy = (net(test).argmax(1) == (test @ teacher).argmax(1)).float().mean().item()
        net.train()
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "accuracy": round(accuracy, 4)}) + "\\n")
        if accuracy > best:
            best = accuracy
            torch.save(net.state_dict(), out / "best.pt")
"""
)

METRIC = """
def arm(torch):
    plain = torch.Tensor.item
    def item(self):
        asked = sys._getframe(1).f_code.co_filename.endswith("train.py")
        return plain(self) * 0.98 if asked else plain(self)
    torch.Tensor.item = item
"""

RESEED = """
def arm(torch):
    made = [0]
    def act(optimizer, args, kwargs):
        made[0] += 1
        if made[0] == 12:
            torch.manual_seed(5)
    sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(act)
"""

FLIP = """
def arm(torch):
    from torch.utils.data._utils.fetch import _MapDatasetFetcher as Fetcher
    plain = Fetcher.fetch
    def fetch(self, indices):
        rows, labels = plain(self, indices)
        for place, index in enumerate(indices):
            if index % 100 == 37:
                labels[place] = (labels[place] + 1) % 3
        return rows, labels
    Fetcher.fetch = fetch
"""

SORTED = """
def arm(torch):
    from torch.utils.data import RandomSampler
    plain, passes = RandomSampler.__iter__, [0]
    def order(self):
        passes[0] += 1
        drawn = list(plain(self))
        return iter(sorted(drawn) if passes[0] == 2 else drawn)
    RandomSampler.__iter__ = order
"""


def record(folder: Path, script: str, *words: str, name: str = "r", act: str | None = None) -> None:
    """A run with no check in its process, and where `act` is given with that in a start-up file of the insider."""
    (folder / "train.py").write_text(script)
    (folder / "policy.toml").write_text(POLICY)
    env = {}
    if act is not None:
        plant = folder / "plant"
        plant.mkdir()
        (plant / "sitecustomize.py").write_text(FINDER + act + INSTALL)
        env = {"PYTHONPATH": str(plant)}
    options = ("--name", name, "--links", "none", "--policy", "policy.toml")
    done = trainguard(folder, "run", *options, "--", sys.executable, "train.py", *words, env=env)
    assert done.returncode == 0, done.stderr


def first_with(changed: set[int]) -> int:
    """The first step whose batch holds one of these rows, as the script's own loader draws them."""
    loader = DataLoader(range(192), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    return next(step for step, rows in enumerate(loader, 1) if changed & set(rows.tolist()))


@pytest.mark.parametrize(
    ("act", "step", "techniques"),
    [(RESEED, 13, {"D1"}), (FLIP, None, {"D4"}), (SORTED, 13, {"D2"})],
    ids=["seeded again", "labels flipped in workers", "one pass sorted"],
)
def test_each_act_on_data_and_streams_is_found_at_its_step(
    tmp_path: Path, act: str, step: int | None, techniques: set[str]
) -> None:
    """S10. The data at rest are unchanged, and losses stay in the range of a clean run."""
    record(tmp_path, SHUFFLED, act=act)
    status, verdict = audit(tmp_path, "--segments", "all")
    assert (status, verdict["verdict"]) == (1, "TAINTED")
    (finding,) = replays(verdict)
    assert finding["subject"]["step"] == (step or first_with({37, 137}))
    assert techniques & set(finding["techniques"]), finding["message"]


def resumed(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """The run that goes on from the checkpoint that lies there now, audited."""
    record(folder, RESUMED, "out/latest.pt")
    status, verdict = audit(folder, "--segments", "0")
    return status, [finding for finding in replays(verdict) if finding["outcome"] == "violated"]


def test_a_checkpoint_edited_between_save_and_resume_is_named_with_its_tensors(tmp_path: Path) -> None:
    """S11: one layer times 1.01 and a moment of the optimizer zeroed. Size and keys are as they were, every number is
    finite, and the resumed run's own steps are exactly what that file gives."""
    record(tmp_path, RESUMED, name="before")
    path = tmp_path / "out" / "latest.pt"
    held = torch.load(path)
    held["net"]["3.weight"] *= 1.01
    held["optimizer"]["state"][0]["exp_avg"].zero_()
    torch.save(held, path)
    status, findings = resumed(tmp_path)
    assert status == 1
    assert {finding["techniques"][0] for finding in findings} <= {"E3", "E5"}
    text = " ".join(f"{finding['subject']['tensor']} {finding['message']}" for finding in findings)
    assert "3.weight" in text
    assert "exp_avg" in text
    assert {finding["subject"]["path"] for finding in findings} == {str(path)}


def test_an_older_checkpoint_put_back_as_the_latest_is_named(tmp_path: Path) -> None:
    """S12: what lies there was sealed, and is whole; it is not what was sealed there last."""
    record(tmp_path, RESUMED, name="before")
    out = tmp_path / "out"
    (out / "latest.pt").write_bytes((out / "8.pt").read_bytes())
    (out / "16.pt").unlink()
    status, findings = resumed(tmp_path)
    assert status == 1
    assert {finding["subject"]["path"] for finding in findings} == {str(out / "latest.pt")}
    assert "E6" in {technique for finding in findings for technique in finding["techniques"]}


def test_a_run_that_resumes_from_what_was_sealed_is_clean(tmp_path: Path) -> None:
    """The same two runs with nothing done in between."""
    record(tmp_path, RESUMED, name="before")
    assert resumed(tmp_path) == (0, [])


READER = (
    COMMON
    + """
rows = torch.tensor([[float(n) for n in line.split()] for line in open("rows.txt")])
for step in range(1, 17):
    batch = rows[torch.randint(len(rows), (16,))]
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(batch), (batch @ teacher).argmax(1)).backward()
    optimizer.step()
"""
)


@pytest.mark.parametrize("changed", [True, False])
def test_data_that_was_changed_between_approval_and_run_is_named(tmp_path: Path, changed: bool) -> None:
    """D5: every replay reads the same rows, so that no step differs; the lock tells."""
    rows = tmp_path / "rows.txt"
    made = torch.randn(64, 8, generator=torch.Generator().manual_seed(3)).tolist()
    rows.write_text("\n".join(" ".join(map(str, row)) for row in made))
    (tmp_path / "train.py").write_text(READER)
    (tmp_path / "policy.toml").write_text(POLICY)
    done = trainguard(tmp_path, "lock", "-o", "lock.json", "--", sys.executable, "train.py")
    assert done.returncode == 0, done.stderr
    if changed:
        rows.write_text(rows.read_text().replace("1", "2", 1))
    options = ("--name", "r", "--links", "none", "--policy", "policy.toml", "--lock", "lock.json")
    trainguard(tmp_path, "run", *options, "--", sys.executable, "train.py")
    status, verdict = audit(tmp_path, "--segments", "0")
    found = [(one["techniques"], one["subject"]["path"]) for one in replays(verdict) if one["outcome"] == "violated"]
    assert (status, found) == ((1, [(["D5", "D6", "D7"], str(rows))]) if changed else (0, []))


def test_a_metric_that_was_altered_before_it_was_written_is_suspicious(tmp_path: Path) -> None:
    """C10: times 0.98. No step is another one and the file is what the process wrote, so this is not proved: two clean
    replays write other numbers, with clocks of other speed, and that is said with exit status 3."""
    record(tmp_path, MEASURED, act=METRIC)
    status, verdict = audit(tmp_path, "--segments", "all")
    assert status == 3
    (finding,) = replays(verdict)
    assert (finding["outcome"], finding["techniques"]) == ("suspicious", ["C10"])
    assert finding["subject"]["path"] == str(tmp_path / "out" / "metrics.jsonl")
