"""E4, B7: weights and optimizer state changed between two steps."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tests.helpers.recorded import judge
from tests.helpers.training import Run, looks_fine, train

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.weights import Weights
from trainguard.policy import Approval, Policy
from trainguard.watch import writers

pytestmark = pytest.mark.torch


def quiet_controls(run: Run) -> None:
    """Loss, gradients and update arithmetic stay clean: each step is right for the weights it finds."""
    assert looks_fine(run)
    for check in (Gradients, Optimizer):
        findings, states = judge(check, run.records)
        assert findings == []
        assert states[check.name].state == "held"


def test_a_thread_that_nudges_one_weight_tensor_is_found_before_the_next_step() -> None:
    """B7 toy: it comes once, from another thread, and leaves no trace in hooks or code."""

    def nudge(run: Run) -> None:
        if run.step == 30:
            weight = run.net[3].weight.data  # type: ignore[index]
            thread = threading.Thread(target=lambda: weight.add_(1e-4))
            thread.start()
            thread.join()

    run = train(60, after_step=nudge)
    quiet_controls(run)
    findings, _ = judge(Weights, run.records)
    assert [(f.subject.step, f.subject.tensor, f.outcome) for f in findings] == [(31, "3.weight", "violated")]
    assert findings[0].techniques == ("E4", "B7")
    assert "by nobody that could be named" in findings[0].message


def test_all_weights_times_a_hundredth_more_once_is_found_with_the_factor() -> None:
    """E4, at the very end of a run too."""
    for at in (30, 39):

        def scale(run: Run, at: int = at) -> None:
            if run.step == at:
                with torch.no_grad():
                    for p in run.net.parameters():
                        p.mul_(1.01)

        run = train(40, after_step=scale)
        quiet_controls(run)
        findings, _ = judge(Weights, run.records)
        assert [(f.subject.step, f.outcome) for f in findings] == [(at + 1, "violated")]
        assert "multiplied by 1.01" in findings[0].message


def test_optimizer_state_changed_between_steps_is_named_as_state() -> None:
    """E4 on exp_avg_sq: smaller steps from then on, with weights untouched."""

    def shrink(run: Run) -> None:
        if run.step == 25:
            for held in run.optimizer.state.values():
                held["exp_avg_sq"].mul_(4.0)

    run = train(45, after_step=shrink)
    quiet_controls(run)
    findings, _ = judge(Weights, run.records)
    assert findings[0].subject.step == 26
    assert findings[0].subject.tensor is not None
    assert findings[0].subject.tensor.endswith(".exp_avg_sq")
    assert "multiplied by 4" in findings[0].message


KEPT: dict[str, torch.Tensor] = {}


def restore(run: Run) -> None:
    """Goes back to a checkpoint once, as range tests and rollbacks do."""
    if run.step == 5:
        KEPT.update({name: value.clone() for name, value in run.net.state_dict().items()})
    if run.step == 30:
        run.net.load_state_dict(KEPT)


def begin_again(run: Run) -> None:
    """A layer is begun again, once."""
    if run.step == 30:
        run.net[5].reset_parameters()  # type: ignore[index, operator]


@pytest.mark.parametrize("act", [restore, begin_again])
def test_weights_put_back_as_a_whole_are_suspicious_with_the_lines_that_may_have_done_it(act: Any) -> None:
    """Not proof: restoring and beginning again are honest work. One of the lines can be approved."""
    records = train(45, after_step=act).records
    findings, _ = judge(Weights, records)
    assert [(f.subject.step, f.outcome, f.techniques) for f in findings] == [(31, "suspicious", ("E4", "B7"))]
    assert "test_weights.py:" in findings[0].message
    assert 'check = "weights"' in findings[0].message
    policy = Policy(approve=(Approval(check="weights", place="attacks/test_weights.py"),))
    findings, states = judge(Weights, records, policy)
    assert (findings, states["weights"].state) == ([], "explained")


def test_without_such_a_line_weights_put_back_are_violated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the job's source does it."""
    monkeypatch.setattr(writers, "restorers", list)
    findings, _ = judge(Weights, train(45, after_step=begin_again).records)
    assert [(f.subject.step, f.outcome) for f in findings] == [(31, "violated")]


def clamp(run: Run) -> None:
    """A habit of some honest scripts, and a way to change weights."""
    for p in run.net.parameters():
        p.data.clamp_(-0.2, 0.2)


def test_a_line_that_writes_at_every_step_is_named_with_the_approval_to_add() -> None:
    """Suspicious, not violated: who wrote is known."""
    findings, states = judge(Weights, train(30, after_step=clamp).records)
    (finding,) = findings
    assert (finding.outcome, finding.techniques) == ("suspicious", ("E4", "B7"))
    assert "aten.clamp_" in finding.message
    assert "test_weights.py" in (finding.subject.path or "")
    assert 'check = "weights"' in finding.message
    assert states["weights"].state == "broken"


def test_the_approved_line_explains_its_departures_and_lowers_coverage_visibly() -> None:
    """Explained is neither held nor broken."""
    policy = Policy(approve=(Approval(check="weights", place="attacks/test_weights.py"),))
    findings, states = judge(Weights, train(30, after_step=clamp).records, policy)
    assert findings == []
    assert states["weights"].state == "explained"
    assert "test_weights.py" in states["weights"].explained[0]


def test_the_watched_interval_changes_no_bit() -> None:
    """The interval that names the writer runs under a dispatch mode."""
    for a, b in zip(
        train(30, after_step=clamp, clip=0.5).weights,
        train(30, after_step=clamp, clip=0.5, guarded=False).weights,
        strict=True,
    ):
        assert torch.equal(a, b)
