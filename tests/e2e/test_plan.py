"""From two approved runs to a plan in the lock, and to the run that departs from it: through the command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.guarded import Guarded, run, trainguard

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

host = set(os.environ.get("OF_THIS_HOST", "").split())    # approved code that does as the machine is
ranks = int(os.environ.get("WORLD_SIZE", "1"))
if ranks > 1:
    dist.init_process_group("gloo")
torch.manual_seed(8 if "seed" in host else 7)
x = torch.randn(96, 8)
data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle="order" not in host)
net = torch.nn.Linear(8, 2)
model = torch.nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
many = "rate" in host or ("many" in host and ranks > 2)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05 if many else 0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
if os.path.exists("out.pt"):
    saved = torch.load("out.pt")
    net.load_state_dict(saved["net"]), optimizer.load_state_dict(saved["optimizer"])
for _ in range(2):
    for a, b in data:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(a), b).backward()
        optimizer.step()
        schedule.step()
if "--save" in sys.argv:
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, "out.pt")
if ranks > 1:
    dist.destroy_process_group()
"""


class Job:
    """A folder with the script, and the runs recorded there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "train.py").write_text(SCRIPT)

    def command(self, ranks: int) -> tuple[str, ...]:
        if ranks == 1:
            return (sys.executable, "train.py")
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        return (*launcher, "train.py")

    def run(self, *options: str, ranks: int = 1, host: str = "") -> Guarded:
        return run(self.folder, *self.command(ranks), options=options, env={"OF_THIS_HOST": host})

    def lock(self, *runs: str, ranks: int = 1) -> tuple[int, Any, str]:
        options = [word for each in runs for word in ("--plan", each)]
        command = ("lock", "--json", "--output", "out.pt", *options, "--", *self.command(ranks))
        done = trainguard(self.folder, *command)
        return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[str]]:
    """Two runs, and a lock with what they agree in."""
    job = Job(tmp_path_factory.mktemp("planned"))
    runs = [str(job.run().verdict["run"]) for _ in range(2)]
    status, lock, stderr = job.lock(*runs)
    assert (status, stderr) == (0, "")
    assert lock["plan"]["runs"] == runs
    assert {"seed of torch", "optimizer 0 lr", "loader 0 samplers"} <= set(lock["plan"]["values"])
    assert "stream numpy at the first step" in lock["plan"]["varied"]
    return job, runs


@pytest.mark.xdist_group("planned")
def test_the_same_again_is_verified(planned: tuple[Job, list[str]]) -> None:
    again = planned[0].run()
    assert (again.verdict["verdict"], again.by("plan")) == ("VERIFIED", [])
    assert again.link("plan")["held"] > 20
    assert again.link("plan.course")["held"] > 24


@pytest.mark.xdist_group("planned")
@pytest.mark.parametrize(("host", "technique"), [("seed", "D1"), ("rate", "C3"), ("order", "D2")])
def test_approved_code_that_does_otherwise_on_this_host_is_found(
    planned: tuple[Job, list[str]], host: str, technique: str
) -> None:
    """Nothing in it was edited, and every other link holds: only what was approved before says how it should go."""
    found = planned[0].run(host=host)
    assert found.verdict["verdict"] == "SUSPECT"
    assert technique in {finding["techniques"][0] for finding in found.by("plan")}
    assert found.by("plan") == [f for f in found.findings if f["outcome"] in ("violated", "suspicious")]
    assert min(finding["subject"]["step"] for finding in found.by("plan")) == 1


@pytest.mark.xdist_group("planned")
def test_what_cannot_be_a_reference_is_refused_in_one_sentence(planned: tuple[Job, list[str]]) -> None:
    """One run, a run that does not exist, and one that ran something else."""
    job, runs = planned
    status, lock, stderr = job.lock(runs[0])
    assert (status, lock) == (2, None)
    assert "expected 2 runs of the command or more, found 1" in stderr
    status, _, stderr = job.lock(runs[0], "1999")
    assert (status, "no such run" in stderr) == (2, True)
    (job.folder / "train.py").write_text(SCRIPT + "\n# another\n")
    try:
        status, _, stderr = job.lock(*runs)
    finally:
        (job.folder / "train.py").write_text(SCRIPT)
    assert status == 2
    assert "ran something else than what is locked now" in stderr


def test_a_run_that_goes_on_from_what_it_saved_is_held_to_what_does_not_move(tmp_path: Path) -> None:
    """Another rate and other streams are no departure then; another data set would be."""
    job = Job(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT.replace('"--save" in sys.argv', "True"))
    runs = []
    for _ in range(2):
        runs.append(str(job.run().verdict["run"]))
        os.unlink(tmp_path / "out.pt")
    assert job.lock(*runs)[0] == 0
    assert job.run().verdict["verdict"] == "VERIFIED"
    resumed = job.run()
    assert resumed.by("plan") == []
    assert resumed.link("plan")["held"] > 20
    assert "goes on from saved state" in resumed.link("plan.course")["blind"][0]


@pytest.mark.nightly
def test_what_two_small_jobs_agree_in_is_held_at_a_size_that_neither_had(tmp_path: Path) -> None:
    """F4: a rate that is another one at more than two ranks alone. The same job of three ranks without it holds."""
    job = Job(tmp_path)
    runs = [str(job.run(ranks=ranks).verdict["run"]) for ranks in (1, 2)]
    status, lock, stderr = job.lock(*runs, ranks=3)
    assert (status, stderr) == (0, "")
    assert lock["plan"]["worlds"] == [1, 2]
    honest = job.run(ranks=3)
    assert honest.by("plan") == []
    assert honest.link("plan")["held"] > 40
    assert honest.link("plan")["blind"] == []
    found = job.run(ranks=3, host="many")
    assert {finding["techniques"][0] for finding in found.by("plan")} == {"C3", "C4"}
    assert "optimizer 0 lr is 0.05, planned 0.1" in " ".join(finding["message"] for finding in found.by("plan"))
