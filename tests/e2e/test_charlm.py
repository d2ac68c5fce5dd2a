"""The example training script: it learns, it is deterministic, and a resumed run ends where an untouched one does."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "examples" / "charlm" / "train.py"
STEPS = 40
TINY = {"steps": STEPS, "layers": 1, "width": 32, "context": 32, "batch": 8, "corpus": 6000, "lr": 0.01}
"""168 windows, so 21 steps are an epoch and step 30 is in the second one."""
EVERY = {"log-every": 5, "eval-every": 10, "save-every": 10}
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(out: Path, *extra: object, launcher: tuple[str, ...] = ("-W", "error")) -> subprocess.CompletedProcess[str]:
    options = [word for name, value in (TINY | EVERY).items() for word in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, SCRIPT, *options, "--out", out, *map(str, extra)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)


def train(out: Path, *extra: object, launcher: tuple[str, ...] = ("-W", "error")) -> str:
    done = run(out, *extra, launcher=launcher)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(output: str) -> str:
    return re.search(r"^final weights sha256:([0-9a-f]{64})$", output, re.MULTILINE)[1]


class Run(NamedTuple):
    out: Path
    output: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One uninterrupted run, with a checkpoint every ten steps."""
    out = tmp_path_factory.mktemp("whole")
    return Run(out, train(out))


def test_the_loss_falls(whole: Run) -> None:
    """Forty steps end well below a blind guess over 96 characters, held-out text follows, and a sample is shown."""
    seen = [float(loss) for loss in re.findall(r"^step +\d+  loss ([\d.]+)", whole.output, re.MULTILINE)]
    held_out = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", whole.output)]
    assert len(seen) == STEPS // 5
    assert len(held_out) == STEPS // 10
    assert seen[-1] < math.log(96) - 1
    assert seen[-1] < seen[0] - 0.5
    assert held_out[-1] < held_out[0] - 0.1
    assert whole.output.partition("\n\n")[2].startswith("The ")


@pytest.mark.nightly
def test_another_seed_gives_other_weights(whole: Run, tmp_path: Path) -> None:
    """The digest at the end depends on the training, so that equal digests mean something."""
    assert weights(train(tmp_path, "--seed", 1)) != weights(whole.output)


def test_a_second_run_gives_the_same_weights_and_loader_workers_change_nothing(whole: Run, tmp_path: Path) -> None:
    """A run whose batches come from two loader processes ends with the bits of the run without any."""
    assert weights(train(tmp_path, "--workers", 2)) == weights(whole.output)


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(whole: Run, tmp_path: Path) -> None:
    """Going on from step 10, across the end of the epoch, ends with the same weights and optimizer state."""
    resumed = train(tmp_path, "--resume", whole.out / "step-000010.pt")
    assert "from step 10\n" in resumed
    assert weights(resumed) == weights(whole.output)
    assert tensors(tmp_path / "step-000040.pt") == tensors(whole.out / "step-000040.pt")


def tensors(path: Path) -> list[bytes]:
    """The bytes of every tensor of the model and of the optimizer in a checkpoint."""
    state = torch.load(path, weights_only=True)
    slots = [slot for slots in state["optimizer"]["state"].values() for slot in slots.values()]
    return [tensor.numpy().tobytes() for tensor in [*state["model"].values(), *slots]]


@pytest.mark.nightly
def test_resuming_without_saying_from_where_takes_the_newest(whole: Run, tmp_path: Path) -> None:
    """A bare --resume goes on from the last checkpoint in --out, here one of the second epoch."""
    for step in (10, 20, 30):
        shutil.copy(whole.out / f"step-{step:06d}.pt", tmp_path)
    resumed = train(tmp_path, "--resume")
    assert "from step 30\n" in resumed
    assert weights(resumed) == weights(whole.output)


@pytest.mark.nightly
def test_two_ranks_train_together_and_resume_to_the_bit(tmp_path: Path) -> None:
    """torchrun with two gloo ranks: resumed at step 10, they end with the weights of the whole run."""
    both = train(tmp_path / "whole", "--steps", 14, launcher=TWO_RANKS)
    assert "2 rank(s)" in both
    checkpoint = tmp_path / "whole" / "step-000010.pt"
    resumed = train(tmp_path / "resumed", "--steps", 14, "--resume", checkpoint, launcher=TWO_RANKS)
    assert weights(resumed) == weights(both)


def test_a_checkpoint_of_two_ranks_is_refused_by_one(whole: Run, tmp_path: Path) -> None:
    """Random states are one per rank, so another number of ranks could not go on exactly; the script says so."""
    state = torch.load(whole.out / "step-000010.pt", weights_only=True)
    state["random"] *= 2
    torch.save(state, tmp_path / "step-000010.pt")
    refused = run(tmp_path, "--resume")
    assert refused.returncode == 1
    assert "was saved by 2 rank(s), and this run has 1" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010.pt"]
