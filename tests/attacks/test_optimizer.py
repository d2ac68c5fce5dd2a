"""C4, C5, C9 through the optimizer: a planted step() that does something else, found by recomputing the update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers.recorded import judge
from tests.helpers.training import Run, looks_fine, train

from trainguard.appraise.hyperparameters import Hyperparameters
from trainguard.appraise.optimizer import Optimizer

pytestmark = pytest.mark.torch


def planted(evil: Any, *, every: int = 1, first: int = 1) -> Any:
    """A class of torch's own name whose step() calls `evil(self, original)` on some steps."""

    class AdamW(torch.optim.AdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            if self.calls >= first and self.calls % every == 0:
                return evil(self, super().step)
            return super().step(closure)

    AdamW.__module__, AdamW.__qualname__ = "torch.optim.adamw", "AdamW"
    return lambda params: AdamW(params, lr=3e-3)


def quiet_controls(run: Run) -> None:
    """What a look at the run without the guard would use: loss, and the hyper-parameters as the optimizer says."""
    assert looks_fine(run)
    findings, states = judge(Hyperparameters, run.records)
    assert findings == []
    assert states["hyperparameters"].state == "held"


def test_every_fortieth_update_skipped_is_named_with_its_step() -> None:
    """C9: loss curve and hyper-parameters stay as they are."""
    run = train(100, make=planted(lambda self, step: None, every=40))
    quiet_controls(run)
    findings, _ = judge(Optimizer, run.records)
    assert [f.subject.step for f in findings] == [40, 80]
    assert {f.techniques[0] for f in findings} == {"C9"}
    assert "skipped" in findings[0].message


def test_noise_on_the_weights_after_the_formula_is_found() -> None:
    """C9: a thousandth of the update's size, on one step in ten."""

    def noisy(self: Any, step: Any) -> None:
        step()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    noise = torch.cos(torch.arange(p.numel(), dtype=p.dtype) * 12.9898).reshape(p.shape)
                    p.add_(noise, alpha=3e-6)

    run = train(60, make=planted(noisy, every=10))
    quiet_controls(run)
    findings, _ = judge(Optimizer, run.records)
    assert [f.subject.step for f in findings][:2] == [10, 20]
    assert findings[0].techniques == ("C9", "C4")


def test_bias_correction_left_out_is_named() -> None:
    """C4 toy: the first steps are taken as if the moments were settled."""

    def uncorrected(self: Any, step: Any) -> None:
        group = self.param_groups[0]
        before = {p: p.detach().clone() for p in group["params"]}
        step()
        with torch.no_grad():
            for p, old in before.items():
                s = self.state[p]
                p.copy_(old * (1 - group["lr"] * group["weight_decay"]))
                p.addcdiv_(s["exp_avg"], s["exp_avg_sq"].sqrt() + group["eps"], value=-group["lr"])

    run = train(30, make=planted(uncorrected, first=5))
    findings, _ = judge(Optimizer, run.records)
    assert findings[0].subject.step == 5
    assert findings[0].techniques == ("C4",)
    assert "bias correction was left out" in findings[0].message


def test_one_frozen_matrix_is_named_within_two_rounds_of_the_rotation() -> None:
    """C5: its update is undone; the state moves on as if nothing were the matter."""

    def frozen(self: Any, step: Any) -> None:
        matrix = self.param_groups[0]["params"][2]
        saved = matrix.detach().clone()
        step()
        with torch.no_grad():
            matrix.copy_(saved)

    run = train(40, make=planted(frozen, first=20))
    quiet_controls(run)
    findings, _ = judge(Optimizer, run.records)
    assert {f.subject.tensor for f in findings} == {"3.weight"}
    assert findings[0].techniques[0] == "C5"
    assert findings[0].subject.step is not None
    assert 20 <= findings[0].subject.step <= 20 + 2 * 2


def test_gradients_turned_inside_the_step_are_direction_not_arithmetic() -> None:
    """C1 one step in fifty, inside step(): the state shows which sign was used."""

    def turned(self: Any, step: Any) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad.neg_()
        step()
        for p in self.param_groups[0]["params"]:
            p.grad.neg_()

    run = train(100, make=planted(turned, every=50))
    quiet_controls(run)
    findings, _ = judge(Optimizer, run.records)
    assert [f.subject.step for f in findings] == [50, 100]
    assert findings[0].techniques == ("C1",)


def test_governed_runs_find_skipped_updates_by_the_step_counter() -> None:
    """Beyond the budget most steps are not sampled; the counter in the state still tells that one was left out."""
    run = train(400, make=planted(lambda self, step: None, every=40), links="governed", credit_seconds=0.0)
    checked = sum(r.body["checked"] is True for r in run.records if r.kind == "step")
    assert checked < 390
    findings, _ = judge(Optimizer, run.records)
    assert findings
    assert findings[0].techniques[0] == "C9"
