"""`trainguard audit`: clean runs are equal to the bit, acts are found at their step, the rest is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers import guarded

from trainguard.archive import LogLeaves, RunReader
from trainguard.home import Home

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(400)]
"""Each replay is a process that imports torch; the first one of a machine compiles it too."""

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
out = Path(sys.argv[1])
out.mkdir()
net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 3))
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
teacher = torch.randn(8, 3)
batch = torch.randn(16, 8)
for step in range(1, 25):
    loss = nn.functional.cross_entropy(net(batch), (batch @ teacher).argmax(1))
    batch = torch.randn(16, 8)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 8 == 0:
        net.eval()
        print(step, net(batch).sum().item())
        net.train()
        torch.save(net.state_dict(), out / f"{step}.pt")
"""

ACT = """
import os, sys, importlib.util
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
    made = [0]
    def act(optimizer, args, kwargs):
        made[0] += 1
        if made[0] == 13:
            weight = optimizer.param_groups[0]["params"][2]
            with torch.no_grad():
                weight.view(-1)[5] += 0.05
    sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(act)
sys.meta_path.insert(0, Finder())
"""

POLICY = "points_every = 8\nkills = 'off'\n"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clean run with every in-process check off, and its audit."""
    folder = tmp_path_factory.mktemp("clean")
    record(folder)
    return folder


def trainguard(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainguard", *arguments],
        cwd=folder,
        env=guarded.clean_environment() | (env or {}),
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )


def record(folder: Path, **env: str) -> None:
    (folder / "train.py").write_text(SCRIPT)
    (folder / "policy.toml").write_text(POLICY)
    command = (
        "run",
        "--name",
        "r",
        "--links",
        "none",
        "--policy",
        "policy.toml",
        "--",
        sys.executable,
        "train.py",
        "out",
    )
    done = trainguard(folder, *command, env=env)
    assert done.returncode == 0, done.stderr


def audit(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = trainguard(folder, "audit", "r", "--json", *options)
    assert done.returncode in (0, 1, 3), done.stderr
    return done.returncode, json.loads(done.stdout)


def replays(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in verdict["findings"] if finding["check"] == "replay"]


def test_a_clean_run_is_equal_bit_for_bit_from_a_sealed_state(clean: Path) -> None:
    """Segment 2 is warped to: dropout, a prefetched batch, a schedule and evaluation in the part that is skipped."""
    before = {path.name: path.read_bytes() for path in (clean / "out").iterdir()}
    status, verdict = audit(clean, "--segments", "2")
    assert (status, replays(verdict)) == (0, [])
    assert verdict["coverage"]["replayed_steps"] == 8
    assert verdict["coverage"]["detection_probability"]["0.1"] == pytest.approx(1 / 3, abs=1e-3)
    (link,) = (link for link in verdict["links"] if link["link"] == "replay")
    others = [why for why in link["blind"] if "changed since the run began" not in why]  # another test's audit of it
    assert (link["held"], link["broken"], others) == (8, 0, [])
    assert verdict["level"] == "TIL-1"
    home = Home(clean / ".trainguard")
    (body,) = LogLeaves(home).audits["r"]
    report = msgspec.json.decode(home.blob(body["report"]))
    assert [(r["way"], r["outcome"]) for r in report["results"]] == [("warp", "equal")]
    assert report["selftest"]["passed"] is True
    assert {path.name: path.read_bytes() for path in (clean / "out").iterdir()} == before


def test_points_are_sealed_in_the_log_and_the_key_is_the_one_committed_to(clean: Path) -> None:
    """What binds is hashed outside the process; the key that was said at the end was promised at the start."""
    home = Home(clean / ".trainguard")
    reader = RunReader(home, "r", leaves=LogLeaves(home))
    records = list(reader.records())
    assert [r.step for r in records if r.kind == "point_sealed"] == [8, 16, 24]
    assert reader.begin is not None
    assert len(reader.begin["key_sha256"]) == 64
    assert list(reader.begin["inputs"]) == [str(clean / "train.py")]


@pytest.mark.nightly
def test_a_weight_edited_between_two_steps_is_found_at_its_step(tmp_path: Path) -> None:
    """E4 from a start-up hook that the auditor's environment does not have; no in-process check was on."""
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "sitecustomize.py").write_text(ACT)
    record(tmp_path, PYTHONPATH=str(plant))
    status, verdict = audit(tmp_path, "--segments", "all")
    assert status == 1
    assert verdict["verdict"] == "TAINTED"
    (finding,) = replays(verdict)
    assert finding["outcome"] == "violated"
    assert (finding["subject"]["step"], finding["subject"]["tensor"]) == (14, "3.weight")
    assert finding["techniques"] == ["E4"]
    assert finding["evidence"]


SAVER = (
    ACT[: ACT.index("def arm")]
    + """
def arm(torch):
    real = torch.save
    def save(value, path):
        if str(path).endswith("24.pt"):
            value = {name: tensor * 1.01 if name == "3.weight" else tensor for name, tensor in value.items()}
        real(value, path)
    torch.save = save
sys.meta_path.insert(0, Finder())
"""
)


@pytest.mark.nightly
def test_a_checkpoint_that_was_altered_while_it_was_saved_is_found(tmp_path: Path) -> None:
    """E9, in the last checkpoint and only there: no step is other than it should be, and no in-process check was on."""
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "sitecustomize.py").write_text(SAVER)
    record(tmp_path, PYTHONPATH=str(plant))
    status, verdict = audit(tmp_path, "--segments", "2")
    assert (status, verdict["verdict"]) == (1, "TAINTED")
    (finding,) = replays(verdict)
    assert finding["techniques"][0] == "E9"
    assert (finding["subject"]["step"], finding["subject"]["tensor"]) == (24, "3.weight")
    assert finding["subject"]["path"] == str(tmp_path / "out" / "24.pt")


@pytest.mark.nightly
def test_an_altered_point_is_not_used_and_is_no_finding(tmp_path: Path) -> None:
    """Replay begins at the first step instead, and is equal."""
    record(tmp_path)
    data = tmp_path / ".trainguard" / "runs" / "r" / "points" / "p0-step-00000016" / "data"
    content = bytearray(data.read_bytes())
    content[8] ^= 1
    data.write_bytes(content)
    status, verdict = audit(tmp_path, "--segments", "2")
    assert (status, replays(verdict)) == (0, [])
    home = Home(tmp_path / ".trainguard")
    (body,) = LogLeaves(home).audits["r"]
    (result,) = msgspec.json.decode(home.blob(body["report"]))["results"]
    assert result["way"] == "start"
    assert "altered after it was sealed" in result["reason"]


def test_a_changed_script_is_said_and_is_no_finding(clean: Path) -> None:
    """Other code proves nothing about the run: exit status 3, with the file, before anything is started."""
    path = clean / "train.py"
    path.write_text(SCRIPT + "\n")
    try:
        status, verdict = audit(clean, "--segments", "0")
    finally:
        path.write_text(SCRIPT)
    assert status == 3
    assert replays(verdict) == []
    (link,) = (link for link in verdict["links"] if link["link"] == "replay")
    assert any("train.py changed since the run began" in reason for reason in link["blind"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--segments", "7"), "expected numbers from 0 to 2"),
        (("--segments", "x"), "expected numbers such as"),
        (("--budget", "200%"), "expected a share"),
        (("--env", "no-such-python"), "found no such program"),
    ],
)
def test_an_option_that_cannot_be_meant_is_a_usage_error(clean: Path, options: tuple[str, ...], word: str) -> None:
    """One sentence, exit status 2."""
    done = trainguard(clean, "audit", "r", *options)
    assert done.returncode == 2
    assert word in done.stderr
