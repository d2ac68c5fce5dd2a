"""`trainguard audit --follow`: a run is audited while it goes on, and what is found is told before it has ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.e2e.test_audit import POLICY, replays, trainguard
from tests.helpers import guarded

from trainguard.archive import LogLeaves, RunReader
from trainguard.home import Home

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]
"""Each replay is one process a rank, on a machine with two processors."""

SCRIPT = """
import os, sys, time
from pathlib import Path
began = time.monotonic()
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 3)))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
torch.manual_seed(100 + dist.get_rank())
teacher = torch.randn(8, 3, generator=torch.Generator().manual_seed(7))
pause = (time.monotonic() - began) / 8 if "PACED" in os.environ else 0.0
last = int(sys.argv[1])
for step in range(1, last + 1):
    batch = torch.randn(16, 8)
    loss = nn.functional.cross_entropy(model(batch), (batch @ teacher).argmax(1))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    time.sleep(pause)
if dist.get_rank() == 0:
    torch.save(model.state_dict(), "model.pt")
dist.destroy_process_group()
"""
"""A step takes an eighth of what starting a process takes, on however busy a machine; a replay does not wait."""

ACT = """
import sys, importlib.util
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            arm(module)
        spec.loader.exec_module = exec_module
        return spec
def arm(torch):
    from torch.nn.parallel import DistributedDataParallel as Wrapper
    made, seen = Wrapper.__init__, [0]
    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        import torch.distributed as dist
        def hook(state, bucket):
            seen[0] += 1
            part = bucket.buffer()
            if seen[0] >= 27 and dist.get_rank() == 1:
                part.neg_()
            part.div_(dist.get_world_size())
            return dist.all_reduce(part, async_op=True).get_future().then(lambda done: done.value()[0])
        self.register_comm_hook(None, hook)
    Wrapper.__init__ = init
sys.meta_path.insert(0, Finder())
"""
"""From step 27 on rank 1 gives the reduction its gradient turned, and says what its backward left."""

LAST = 160


@contextmanager
def going_on(folder: Path, last: int, ranks: int = 2, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A run, just started, with every in-process check off."""
    (folder / "train.py").write_text(SCRIPT)
    (folder / "policy.toml").write_text(POLICY)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone")
    words = ("run", "--name", "r", "--links", "none", "--policy", "policy.toml", "--", *launcher, "train.py", str(last))
    run = subprocess.Popen(
        [sys.executable, "-m", "trainguard", *words], cwd=folder, env=guarded.clean_environment() | env,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield run
    finally:
        run.terminate()
        run.communicate(timeout=300)


def follow(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, verdict document, what was said on the way."""
    done = subprocess.run(
        [sys.executable, "-m", "trainguard", "audit", "r", "--follow", "--budget", "100%", "--json", *options],
        cwd=folder, env=guarded.clean_environment(), capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1, 3), done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def steps_made(folder: Path) -> int:
    """Steps of rank 0 that the log proves by now."""
    return max(record.step or 0 for record in RunReader(Home(folder / ".trainguard"), "r").records())


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_turns_its_gradient_is_named_while_the_run_goes_on(tmp_path: Path, ranks: int) -> None:
    """S9: from step 27 on rank 1 turns its part and says nothing of it. Its name and the step are in the log before
    the run has ended, within a hundred steps; no in-process check was on."""
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "sitecustomize.py").write_text(ACT)
    with going_on(tmp_path, LAST, ranks, PYTHONPATH=str(plant), PACED="1") as run:
        status, verdict, said = follow(tmp_path)
        made, goes_on = steps_made(tmp_path), run.poll() is None
        assert goes_on, said
        assert (status, verdict["verdict"]) == (1, "TAINTED"), said
    (finding,) = replays(verdict)
    assert (finding["outcome"], finding["subject"]["step"], finding["subject"]["rank"]) == ("violated", 27, 1)
    assert finding["techniques"][0] == "F2"
    assert "rank 1 gave -1 times its gradient to the reduction" in finding["message"]
    print(f"{ranks} ranks: an act at step 27 was named by step {made}")
    assert made <= 27 + 100, f"named only after step {made}\n{said}"


def test_a_clean_run_that_is_followed_is_equal_and_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """Every segment is replayed while the run goes on or right after it: no finding, and the model is the same to the
    bit as that of a run that nobody followed."""
    followed, alone = tmp_path / "followed", tmp_path / "alone"
    for folder in (followed, alone):
        folder.mkdir()
    with going_on(alone, 60) as run:
        run.communicate(timeout=600)
    with going_on(followed, 60, PACED="1") as run:
        status, verdict, said = follow(followed)
        run.communicate(timeout=600)
    assert (status, replays(verdict)) == (0, []), said
    assert verdict["coverage"]["replayed_steps"] == 60
    assert (followed / "model.pt").read_bytes() == (alone / "model.pt").read_bytes()
    home = Home(followed / ".trainguard")
    (body,) = LogLeaves(home).audits["r"]
    report = msgspec.json.decode(home.blob(body["report"]))
    sizes = [draw["size"] for draw in report["draws"]]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 1  # decided on while the log grew, not together at the end
    assert trainguard(followed, "verdict", "r").returncode != 1
