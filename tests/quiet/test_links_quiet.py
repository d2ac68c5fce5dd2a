"""Honest scripts under the arithmetic links: no finding, every link held, and bit for bit the same result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from tests.helpers.guarded import clean_environment
from tests.helpers.recorded import judge

from trainguard.appraise.batches import Batches
from trainguard.appraise.gradients import Gradients
from trainguard.appraise.hyperparameters import Hyperparameters
from trainguard.appraise.interface import Check
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.order import Order
from trainguard.appraise.replicas import Replicas
from trainguard.appraise.rng import Rng
from trainguard.appraise.weights import Weights
from trainguard.evidence import Evidence
from trainguard.policy import Approval, Policy
from trainguard.testing.guarded import run_guarded

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CHECKS: tuple[type[Check], ...] = (Rng, Gradients, Hyperparameters, Optimizer, Weights)
DATA_PATH: tuple[type[Check], ...] = (Order, Batches)
"""Held where a script reads through torch's loader; blind, and not required, where it makes its batches itself."""
SCRIPTS = Path(__file__).parents[1] / "scripts"

QUIET = {
    "own_batch_gpt": 12,
    "mlp_adadelta": 30,
    "cnn_workers": 10,
    "gan_two_optimizers": 20,
    "ema_swap": 25,
    "tied_weights": 15,
    "schedulers": 20,
    "resume": 12,
    "accum_amp": 8,
    "reinforce_loop": 10,
    "lightning_fit": 12,
    "hf_trainer": 8,
    "fsdp2_two_ranks": 8,
}
"""Script → steps: enough for a schedule to move, a checkpoint to be written, an epoch to end."""


SAME_BITS = {"own_batch_gpt", "gan_two_optimizers"}
"""Also run without the guard; the others are in the tests of their kind."""

NIGHTLY = {
    "accum_amp",
    "cnn_workers",
    "ema_swap",
    "fsdp2_two_ranks",
    "gan_two_optimizers",
    "hf_trainer",
    "lightning_fit",
    "mlp_adadelta",
    "reinforce_loop",
    "resume",
    "schedulers",
    "tied_weights",
    "wgan_clamp",
}
"""Scripts whose habits others have too; `make nightly` runs them, so that `make test` stays short."""


def by_night(scripts: Iterable[str]) -> list[ParameterSet]:
    """Parameters, the longer ones marked for the night."""
    return [pytest.param(s, marks=[pytest.mark.nightly] if s in NIGHTLY else []) for s in scripts]


def command(script: str, *arguments: str) -> list[str]:
    """How the script is started; two ranks where it needs them."""
    path = str(SCRIPTS / f"{script}.py")
    if script.endswith("two_ranks"):
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", path, *arguments]
    return [sys.executable, path, *arguments]


def digest(output: str) -> str:
    """The line with the digest of the final parameters."""
    (line,) = [line for line in output.splitlines() if line.startswith("digest ")]
    return line


def recorded(folder: Path, *parts: str) -> tuple[list[Evidence], str]:
    """Records and digest line of a guarded run, which must end well and without a fault inside the guard."""
    folder.mkdir(exist_ok=True)
    records, done = run_guarded(parts, cwd=folder, links="all", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout
    faults = [r.body for r in records if r.kind in ("note", "bye") and (r.body.get("fault") or r.body.get("faults"))]
    assert faults == []
    return records, digest(done.stdout)


def plain(folder: Path, *parts: str) -> str:
    """Digest line of the same run without the guard."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(parts, cwd=folder, env=clean_environment(), capture_output=True, text=True, check=True)
    return digest(done.stdout)


@pytest.mark.parametrize("script", by_night(QUIET))
def test_an_honest_script_holds_every_link(tmp_path: Path, script: str) -> None:
    """Every check in every step, no finding, nothing broken; the bits are those of a run without the guard."""
    parts = command(script, "--steps", str(QUIET[script]))
    records, guarded = recorded(tmp_path / "a", *parts)
    if script in SAME_BITS:
        assert guarded == plain(tmp_path / "b", *parts)
    for check in CHECKS:
        findings, states = judge(check, records)
        assert [(f.check, f.message) for f in findings] == []
        assert states[check.name].broken == 0
        assert states[check.name].state == "held"
    assert judge(Replicas, records)[0] == []


@pytest.mark.nightly
def test_two_ranks_that_reduce_their_gradients_hold(tmp_path: Path) -> None:
    """Reduction truth: the gradient used is the mean of what both ranks had, then clipped; no_sync now and then."""
    parts = command("ddp_two_ranks", "--steps", "12")
    records, guarded = recorded(tmp_path / "a", *parts)
    assert guarded == plain(tmp_path / "b", *parts)
    for check in CHECKS:
        findings, states = judge(check, records)
        assert findings == []
        assert states[check.name].state == "held"
    findings, states = judge(Replicas, records)
    assert findings == []
    assert (states["replicas"].state, states["replicas"].held > 5) == ("held", True)
    assert {r.body["gradients"]["world"] for r in records if r.kind == "step"} == {2}


@pytest.mark.nightly
def test_weights_clamped_by_hand_are_one_line_to_approve(tmp_path: Path) -> None:
    """Not silent, but named; silent once the line is approved."""
    parts = command("wgan_clamp", "--steps", "10")
    records, guarded = recorded(tmp_path / "a", *parts)
    assert guarded == plain(tmp_path / "b", *parts)  # watched by a dispatch mode on top
    findings, _ = judge(Weights, records)
    assert [(f.outcome, f.techniques[0]) for f in findings] == [("suspicious", "E4")]
    place = findings[0].subject.path or ""
    assert "wgan_clamp.py:" in place
    policy = Policy(approve=(Approval(check="weights", place=place),))
    findings, states = judge(Weights, records, policy)
    assert findings == []
    assert states["weights"].state == "explained"


@pytest.mark.nightly
def test_what_cannot_be_recomputed_is_blind_with_its_reason(tmp_path: Path) -> None:
    """L-BFGS has no formula, so its steps are repeated from its source; updates by hand make no step at all."""
    records, _ = recorded(tmp_path / "a", *command("lbfgs", "--steps", "4"))
    findings, states = judge(Optimizer, records)
    assert findings == []
    assert (states["optimizer"].state, states["optimizer"].held) == ("held", 4)
    records, _ = recorded(tmp_path / "b", *command("manual_sgd", "--steps", "4"))
    for check in CHECKS:
        findings, states = judge(check, records)
        assert findings == []
        assert states[check.name].state == "blind"
