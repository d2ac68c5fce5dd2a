"""Honest scripts with one step in three on tape: no finding, and bit for bit the same result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import clean_environment
from tests.helpers.recorded import judge

from trainguard.appraise.loss import Loss
from trainguard.appraise.truth import Truth
from trainguard.testing.guarded import run_guarded

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SCRIPTS = Path(__file__).parents[1] / "scripts"
DAY = {"tied_weights": 9}
"""Script → steps: two micro-batches, clipping, evaluation in between; two optimizers and two passes to a step."""
NIGHT = {
    "gan_two_optimizers": 9,
    "accum_amp": 8,
    "cnn_workers": 12,
    "ddp_two_ranks": 9,
    "ema_swap": 25,
    "hf_trainer": 8,
    "lightning_fit": 12,
    "mlp_adadelta": 30,
    "reinforce_loop": 10,
    "resume": 12,
    "schedulers": 20,
    "own_batch_gpt": 9,
}
BLIND = {"compile_inductor": 8, "fsdp2_two_ranks": 8, "wgan_clamp": 8}
"""Compiled code; shards; a critic whose loss has kinks at its clamped weights."""


def recorded(folder: Path, script: str, steps: int) -> tuple[list, str]:  # type: ignore[type-arg]
    """Records, and the digest line, which must be that of the same run without a guard."""
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if script.endswith("two_ranks") else []
    command = [sys.executable, *ranks, str(SCRIPTS / f"{script}.py"), "--steps", str(steps)]
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    records, done = run_guarded(
        command, cwd=folder / "a", links="all", truth_every=3, env={"OMP_NUM_THREADS": "1"}, timeout_seconds=300
    )
    assert done.returncode == 0, done.stdout
    assert [
        r.body for r in records if r.kind in ("note", "bye") and (r.body.get("fault") or r.body.get("faults"))
    ] == []
    plain = subprocess.run(
        command, cwd=folder / "b", env=clean_environment(), capture_output=True, text=True, check=True
    )
    digests = [
        [line for line in text.splitlines() if line.startswith("digest ")] for text in (done.stdout, plain.stdout)
    ]
    assert digests[0] == digests[1]
    return records, done.stdout


@pytest.mark.parametrize(
    ("script", "steps"), [*DAY.items(), *(pytest.param(*each, marks=pytest.mark.nightly) for each in NIGHT.items())]
)
def test_an_honest_gradient_is_the_derivative_of_its_loss(tmp_path: Path, script: str, steps: int) -> None:
    """Held, far within the tolerance."""
    records, _ = recorded(tmp_path, script, steps)
    for check in (Truth, Loss):
        findings, states = judge(check, records)
        assert [f.message for f in findings] == []
        assert states[check.name].broken == 0
    assert judge(Truth, records)[1]["truth"].held >= 2


@pytest.mark.nightly
@pytest.mark.parametrize(("script", "steps"), BLIND.items())
def test_what_cannot_be_replayed_is_blind_with_its_reason(tmp_path: Path, script: str, steps: int) -> None:
    """No finding, and the result is the same."""
    records, output = recorded(tmp_path, script, steps)
    if "skipped:" in output:
        pytest.skip(output)
    for check in (Truth, Loss):
        findings, states = judge(check, records)
        assert findings == []
        assert states[check.name].broken == 0
        assert not states[check.name].required
    assert judge(Truth, records)[1]["truth"].state in ("blind", "held")
