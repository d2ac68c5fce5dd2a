"""`trainguard audit` of a job with several ranks: all of them are replayed on one host, and the odd one is named."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest
from tests.e2e.test_audit import POLICY, audit, replays, trainguard

from trainguard.archive import LogLeaves
from trainguard.home import Home

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]
"""Each replay is one process a rank, on a machine with two processors."""

SCRIPT = """
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
for step in range(1, 25):
    batch = torch.randn(16, 8)
    loss = nn.functional.cross_entropy(model(batch), (batch @ teacher).argmax(1))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
dist.destroy_process_group()
"""

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
        if dist.get_world_size() < 4:
            return
        def hook(state, bucket):
            seen[0] += 1
            part = bucket.buffer()
            if seen[0] == 13 and dist.get_rank() == 2:
                part.neg_()
            part.div_(dist.get_world_size())
            return dist.all_reduce(part, async_op=True).get_future().then(lambda done: done.value()[0])
        self.register_comm_hook(None, hook)
    Wrapper.__init__ = init
sys.meta_path.insert(0, Finder())
"""


def record(folder: Path, ranks: int, **env: str) -> None:
    """One run of `ranks` ranks with every in-process check off."""
    (folder / "train.py").write_text(SCRIPT)
    (folder / "policy.toml").write_text(POLICY)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone")
    options = ("--name", "r", "--links", "none", "--policy", "policy.toml")
    done = trainguard(folder, "run", *options, "--", *launcher, "train.py", env=env)
    assert done.returncode == 0, done.stderr


def test_a_fault_that_waits_for_four_ranks_is_found_on_one_host(tmp_path: Path) -> None:
    """S6 and S9: once, and only where there are four ranks, one of them gives the reduction its gradient turned. All
    ranks go on with the same weights. No in-process check was on; a run of the same code with two ranks is clean."""
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "sitecustomize.py").write_text(ACT)
    record(tmp_path, 4, PYTHONPATH=str(plant))
    status, verdict = audit(tmp_path, "--segments", "1")
    assert (status, verdict["verdict"]) == (1, "TAINTED")
    (finding,) = replays(verdict)
    assert finding["outcome"] == "violated"
    assert (finding["subject"]["step"], finding["subject"]["rank"]) == (13, 2)
    assert finding["techniques"][0] == "F2"
    assert "rank 2 gave -1 times its gradient to the reduction" in finding["message"]
    assert "clean small test run proves nothing" in finding["message"]


def test_two_clean_ranks_are_equal_from_their_sealed_states(tmp_path: Path) -> None:
    """Every rank is warped to its own state; what they reduce then is the same to the bit."""
    record(tmp_path, 2)
    status, verdict = audit(tmp_path, "--segments", "2")
    assert (status, replays(verdict)) == (0, [])
    home = Home(tmp_path / ".trainguard")
    (body,) = LogLeaves(home).audits["r"]
    (result,) = msgspec.json.decode(home.blob(body["report"]))["results"]
    assert (result["way"], result["outcome"], result["compared"]) == ("warp", "equal", 8)
