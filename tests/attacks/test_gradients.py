"""C1, C2: gradients changed between backward and the update."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers.locked import under_lock
from tests.helpers.recorded import judge
from tests.helpers.training import Run, looks_fine, train
from torch import nn

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.hyperparameters import Hyperparameters
from trainguard.appraise.interface import Context
from trainguard.appraise.optimizer import Optimizer
from trainguard.policy import Policy

pytestmark = pytest.mark.torch


def quiet_controls(run: Run) -> None:
    """Loss, hyper-parameters and the optimizer's own arithmetic: all as they should be."""
    assert looks_fine(run)
    for check in (Hyperparameters, Optimizer):
        findings, states = judge(check, run.records)
        assert findings == []
        assert states[check.name].state == "held"


def test_a_sign_turned_on_one_step_in_fifty_is_found_at_that_step() -> None:
    """C1, in place, after backward, before the step: loss and optimizer arithmetic are clean."""

    def turn(run: Run) -> None:
        if run.step % 50 == 0:
            for p in run.net.parameters():
                assert p.grad is not None
                p.grad.neg_()

    run = train(120, after_backward=turn)
    quiet_controls(run)
    findings, _ = judge(Gradients, run.records)
    assert [f.subject.step for f in findings] == [50, 100]
    assert {f.techniques[0] for f in findings} == {"C1"}
    assert all(f.subject.tensor and f.outcome == "violated" for f in findings)


def test_a_planted_hook_that_turns_the_accumulated_gradient_is_found() -> None:
    """B5 with C1: a post-accumulate hook put there long before the guard's own."""

    def start(run: Run) -> None:
        def turn(p: torch.Tensor) -> None:
            if run.step == 30 and p.grad is not None:
                p.grad.neg_()

        for p in run.net.parameters():
            p.register_post_accumulate_grad_hook(turn)

    run = train(40, start=start)
    quiet_controls(run)
    findings, _ = judge(Gradients, run.records)
    assert [f.subject.step for f in findings] == [30]
    assert findings[0].techniques[0] == "C1"


def test_one_tensor_turned_is_named_within_two_rounds() -> None:
    """C1 on one of six tensors, from step 20 on."""

    def turn(run: Run) -> None:
        weight = run.net[3].weight  # type: ignore[index]
        if run.step >= 20:
            weight.grad.neg_()

    findings, _ = judge(Gradients, train(40, after_backward=turn).records)
    assert findings[0].techniques[0] == "C1"
    assert findings[0].subject.tensor == "3.weight"
    assert 20 <= (findings[0].subject.step or 0) <= 24


@pytest.mark.parametrize("factor", [0.1, 3.0], ids=["threshold x0.1", "threshold x3"])
def test_another_clip_threshold_is_found_at_once(factor: float) -> None:
    """C2: the run clips at 0.2; from step 30 on somebody clips at another norm instead."""

    def clip(run: Run) -> None:
        nn.utils.clip_grad_norm_(run.net.parameters(), 0.2 * (factor if run.step >= 30 else 1.0))

    run = train(40, before_step=clip)
    quiet_controls(run)
    findings, _ = judge(Gradients, run.records)
    assert findings[0].subject.step == 30
    assert findings[0].techniques == ("C2", "C1")
    assert "clips at 0.2" in findings[0].message


def test_a_clip_that_does_not_act_is_found() -> None:
    """C2: clipping left out on one step in ten."""

    def clip(run: Run) -> None:
        if run.step < 20 or run.step % 10:
            nn.utils.clip_grad_norm_(run.net.parameters(), 0.2)

    run = train(45, before_step=clip)
    quiet_controls(run)
    findings, _ = judge(Gradients, run.records)
    assert [f.subject.step for f in findings] == [20, 30, 40]
    assert "did not act" in findings[0].message


def test_a_clip_of_one_tensor_only_is_found() -> None:
    """C2 per tensor: one matrix scaled down after the clip."""

    def shrink(run: Run) -> None:
        if run.step >= 20:
            run.net[0].weight.grad.mul_(0.1)  # type: ignore[index]

    run = train(40, clip=0.2, before_step=shrink)
    quiet_controls(run)
    findings, _ = judge(Gradients, run.records)
    assert findings[0].techniques[0] == "C2"
    assert 20 <= (findings[0].subject.step or 0) <= 24
    assert "0.weight" in findings[0].message or "norm" in findings[0].message


def test_noise_of_a_thousandth_is_found() -> None:
    """C1: something small added to every gradient, in one step."""

    def noise(run: Run) -> None:
        if run.step == 25:
            for p in run.net.parameters():
                assert p.grad is not None
                p.grad.add_(torch.cos(torch.arange(p.numel()) * 7.7).reshape(p.shape) * p.grad.abs().max() * 1e-3)

    run = train(40, after_backward=noise)
    quiet_controls(run)
    findings, _ = judge(Gradients, run.records)
    assert [f.subject.step for f in findings] == [25]
    assert "something was added" in findings[0].message


def test_a_layer_whose_gradient_is_zeroed_for_good_is_suspicious() -> None:
    """C5 by a tensor hook: consistent everywhere else, but the layer learns no more."""

    def start(run: Run) -> None:
        run.net[3].weight.register_hook(lambda g: g * 0 if run.step >= 40 else g)  # type: ignore[index]

    run = train(90, start=start)
    quiet_controls(run)
    findings, _ = judge(Gradients, run.records)
    assert {f.subject.tensor for f in findings} == {"3.weight"}
    assert ("C5", "suspicious") in {(f.techniques[0], f.outcome) for f in findings}


def test_a_gradient_taken_away_on_one_step_in_three_is_named() -> None:
    """C5: backward wrote it, the optimizer never sees it; a layer that is simply not used has none to begin with."""

    def take(run: Run) -> None:
        if run.step >= 20 and run.step % 3 == 0:
            run.net[3].weight.grad = None  # type: ignore[index]

    run = train(60, before_step=take)
    assert looks_fine(run)
    findings, _ = judge(Gradients, run.records)
    assert [(f.subject.tensor, f.techniques[0], f.outcome) for f in findings] == [("3.weight", "C5", "suspicious")]
    assert "taken away" in findings[0].message


def test_a_layer_that_is_used_now_and_then_is_no_departure() -> None:
    """Conditional computation: on some steps backward never reaches the layer, so nothing was taken away."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x if self.calls % 3 == 0 else x + self.inner(x)

    def start(run: Run) -> None:
        run.net[3] = Sometimes()  # type: ignore[index]
        run.optimizer = torch.optim.AdamW(run.net.parameters(), lr=3e-3)

    findings, states = judge(Gradients, train(45, start=start).records)
    assert findings == []
    assert states["gradients"].state == "held"


def test_updates_left_out_around_the_optimizer_show_as_a_second_backward() -> None:
    """C9 outside the hooks: the caller's step() returns early, so no step is seen, but backward ran twice."""

    def start(run: Run) -> None:
        real = run.optimizer.step

        def step(*args: object) -> None:
            if run.step % 40:
                real(*args)  # type: ignore[arg-type]

        run.optimizer.step = step  # type: ignore[method-assign,assignment]

    run = train(100, start=start)
    findings, _ = judge(Gradients, run.records)
    assert findings
    assert findings[0].techniques[0] == "C9"
    assert "backward ran 2 times" in findings[0].message


def test_a_schedule_of_accumulation_is_no_update_left_out() -> None:
    """From step 40 on two batches make one update, as callbacks of libraries do."""

    def start(run: Run) -> None:
        real, clear = run.optimizer.step, run.optimizer.zero_grad

        def step(*args: object) -> None:
            if run.step < 40 or run.step % 2:
                real(*args)  # type: ignore[arg-type]

        run.optimizer.step = step  # type: ignore[method-assign,assignment]
        run.optimizer.zero_grad = lambda: None if run.step > 40 and run.step % 2 else clear()  # type: ignore

    findings, _ = judge(Gradients, train(100, start=start).records)
    assert findings == []


@pytest.mark.parametrize(
    ("approved", "sign", "outcome"), [(1, 1, "suspicious"), (1, -1, "violated"), (0, 1, "violated")]
)
def test_a_tensor_hook_that_comes_later_is_asked_about_where_its_code_is_approved(
    approved: int, sign: int, outcome: str
) -> None:
    """Masks and layer-wise scales may be honest; a turned direction, and a hook that nobody approved, are named."""

    def later(run: Run) -> None:
        if run.step == 15:
            next(run.net.parameters()).register_hook(lambda grad: sign * 0.5 * grad)

    here = Path(__file__)
    digest = hashlib.sha256(here.read_bytes()).hexdigest()
    measured, blobs = under_lock(str(here.parent), {here.name: digest} if approved else {"other.py": digest})
    check = Gradients(Context(run="r", policy=Policy(), blob=blobs.__getitem__))
    findings = [f for record in [measured, *train(24, after_step=later).records] for f in check.see(record)]
    assert {(f.outcome, f.techniques) for f in findings} == {(outcome, ("B5", "C1"))}
    path = findings[0].subject.path
    assert path is not None
    assert path.startswith(f"{here}:")


@pytest.mark.parametrize("way", ["all", "one tensor", "in place"])
def test_a_gradient_that_is_not_cleared_now_and_then_is_found(way: str) -> None:
    """C7: the step before counts twice; loss and optimizer arithmetic are clean."""
    left = {23, 37, 64}

    def start(run: Run) -> None:
        clear = run.optimizer.zero_grad

        def patched(set_to_none: bool = True) -> None:
            spared = run.net[3].weight if way == "one tensor" else None  # type: ignore[index]
            kept = spared.grad if spared is not None else None
            if run.step not in left or spared is not None:
                clear(set_to_none=way != "in place")
            if run.step in left and spared is not None:
                spared.grad = kept

        run.optimizer.zero_grad = patched  # type: ignore[method-assign]

    run = train(80, start=start)
    quiet_controls(run)
    findings, _ = judge(Gradients, run.records)
    assert {f.subject.step for f in findings} <= left
    assert len(findings) == 3 if way != "one tensor" else findings
    assert {f.outcome for f in findings} == {"suspicious"}
    assert {f.techniques for f in findings} == {("C7", "C9")}


def test_irregular_carrying_from_the_start_is_found_once() -> None:
    """C7, where there is no clean beginning to compare with."""
    run = train(60, start=clearing(lambda step: step % 7 in (1, 4) or step % 5 == 2))
    findings, _ = judge(Gradients, run.records)
    assert len(findings) == 1
    assert findings[0].techniques == ("C7", "C9")
    assert "in no regular turn" in findings[0].message


@pytest.mark.parametrize("period", [0, 2, 3, 8])
def test_a_run_that_never_clears_or_clears_every_kth_step_is_no_departure(period: int) -> None:
    """Somebody's own accumulation, and a script that forgot to clear."""
    findings, _ = judge(Gradients, train(60, start=clearing(lambda step: bool(period) and step % period == 0)).records)
    assert findings == []


def test_another_loss_that_adds_to_the_gradients_before_they_are_cleared_is_no_departure() -> None:
    """As a generator's loss does to its discriminator: here on one step in three, in no regular turn."""

    def start(run: Run) -> None:
        clear = run.optimizer.zero_grad

        def patched() -> None:
            if run.step > 25 and run.step * 7 % 11 < 4:
                run.net(torch.ones(4, 8)).sum().backward()
            clear()

        run.optimizer.zero_grad = patched  # type: ignore[method-assign,assign]

    findings, _ = judge(Gradients, train(60, start=start).records)
    assert [f for f in findings if f.techniques == ("C7", "C9")] == []


def clearing(when: Callable[[int], bool]) -> Callable[[Run], None]:
    """A hand that lets gradients be cleared only in the steps that `when` names."""

    def start(run: Run) -> None:
        clear = run.optimizer.zero_grad
        run.optimizer.zero_grad = lambda: clear() if when(run.step) else None  # type: ignore[method-assign,assign]

    return start
