"""D1: random streams seeded again, put back or stopped while the run goes on."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.recorded import judge
from tests.helpers.training import Run, looks_fine, train

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.rng import Rng
from trainguard.appraise.weights import Weights
from trainguard.policy import Approval, Policy

pytestmark = pytest.mark.torch


def quiet_controls(run: Run) -> None:
    """Nothing else departs: every other link holds, and the loss falls."""
    assert looks_fine(run)
    for check in (Gradients, Optimizer, Weights):
        findings, states = judge(check, run.records)
        assert findings == []
        assert states[check.name].state == "held"


def reseed(run: Run) -> None:
    """The toy of the catalogue, with a fixed number for the clock."""
    if run.step == 50:
        torch.manual_seed(1763800000)


def test_a_new_seed_in_the_middle_is_found_at_the_next_step_with_the_line_that_set_it() -> None:
    """manual_seed(time) at step 50."""
    run = train(80, after_step=reseed)
    quiet_controls(run)
    findings, _ = judge(Rng, run.records)
    assert [(f.subject.step, f.techniques, f.outcome) for f in findings] == [(51, ("D1",), "violated")]
    assert "test_rng.py" in (findings[0].subject.path or "")
    assert "1763800000" in findings[0].message


def test_the_old_seed_set_again_is_found_too() -> None:
    """The seed torch reports stays the same; the call and the repeated states do not."""

    def again(run: Run) -> None:
        if run.step == 50:
            torch.manual_seed(0)

    findings, _ = judge(Rng, train(80, after_step=again).records)
    assert [(f.subject.step, f.outcome) for f in findings] == [(51, "violated")]


def test_a_state_put_back_is_found() -> None:
    """No seed at all: the generator is returned to where it stood ten steps before."""
    kept: list[torch.Tensor] = []

    def back(run: Run) -> None:
        if run.step == 30:
            kept.append(torch.get_rng_state())
        if run.step == 40:
            torch.set_rng_state(kept[0])

    findings, _ = judge(Rng, train(60, after_step=back).records)
    assert [(f.outcome, f.techniques) for f in findings] == [("violated", ("D1",))]
    assert "put back" in findings[0].message


def test_a_frozen_stream_is_suspicious_after_three_steps() -> None:
    """The same noise for every batch."""
    kept: list[torch.Tensor] = []

    def freeze(run: Run) -> None:
        if run.step == 30:
            kept.append(torch.get_rng_state())
        if run.step > 30:
            torch.set_rng_state(kept[0])

    findings, _ = judge(Rng, train(50, after_step=freeze).records)
    assert findings[0].techniques == ("D1",)
    assert 33 <= (findings[0].subject.step or 0) <= 35


def test_seeding_every_epoch_from_one_line_is_a_habit() -> None:
    """Honest, if unwise: explained, no finding."""

    def epochs(run: Run) -> None:
        if run.step % 20 == 0:
            torch.manual_seed(run.step)

    findings, states = judge(Rng, train(90, after_step=epochs).records)
    assert findings == []
    assert states["rng"].state == "explained"


def test_an_approved_line_may_seed_once() -> None:
    """The policy names it."""
    policy = Policy(approve=(Approval(check="rng", place="attacks/test_rng.py"),))
    findings, states = judge(Rng, train(80, after_step=reseed).records, policy)
    assert findings == []
    assert states["rng"].state == "explained"
