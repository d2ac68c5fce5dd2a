"""C3, C4, C5 through the parameter groups: rates, betas and members changed behind the script's back."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.recorded import judge, recording
from tests.helpers.training import Run, looks_fine, train

from trainguard.appraise.hyperparameters import Hyperparameters
from trainguard.appraise.optimizer import Optimizer
from trainguard.watch import writers

pytestmark = pytest.mark.torch

Schedule = Callable[[torch.optim.Optimizer], Any]
SCHEDULES: dict[str, Schedule | None] = {
    "constant": None,
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 400),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 50, 0.5),
}


@pytest.fixture(autouse=True)
def _no_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's own source sets no hyper-parameter (this file, which does, is the attacker's)."""
    monkeypatch.setattr(writers, "places", dict)


def quiet_controls(run: Run) -> None:
    """Loss and the optimizer's arithmetic are clean: the update is right for the rate it was given."""
    assert looks_fine(run)
    findings, states = judge(Optimizer, run.records)
    assert findings == []
    assert states["optimizer"].state == "held"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_wrapper_that_lowers_the_rate_during_the_step_is_found_at_its_first_step(name: str) -> None:
    """C3 toy: lr x 0.7 after step 100, put back after the call, so that logs of the script show nothing."""

    def start(run: Run) -> None:
        real = run.optimizer.step

        def step(*args: Any) -> None:
            rates = [group["lr"] for group in run.optimizer.param_groups]
            for group in run.optimizer.param_groups if run.step > 100 else ():
                group["lr"] *= 0.7
            real(*args)
            for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or torch warns
        run.optimizer.step = step  # type: ignore[method-assign]

    run = train(120, schedule=SCHEDULES[name], start=start)
    quiet_controls(run)
    findings, _ = judge(Hyperparameters, run.records)
    assert findings[0].subject.step == 101
    assert findings[0].techniques == ("C3",)
    assert findings[0].outcome == "violated"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_hook_that_lowers_the_rate_inside_the_step_is_found_by_the_update(name: str) -> None:
    """The same by hooks of the instance: the groups look right before and after, the weights do not."""

    def start(run: Run) -> None:
        def before(optimizer: Any, *_: Any) -> None:
            if run.step > 100:
                optimizer.param_groups[0]["lr"] *= 0.7

        def after(optimizer: Any, *_: Any) -> None:
            if run.step > 100:
                optimizer.param_groups[0]["lr"] /= 0.7

        run.optimizer.register_step_pre_hook(before)
        run.optimizer.register_step_post_hook(after)

    run = train(110, schedule=SCHEDULES[name], start=start)
    assert looks_fine(run)
    findings, _ = judge(Optimizer, run.records)
    assert findings[0].subject.step == 101
    assert findings[0].techniques == ("C3", "C4")
    told = float(findings[0].message.split("learning rate is ")[1].split()[0])
    assert told == pytest.approx(0.7, rel=1e-3)


def test_one_group_lowered_once_and_left_so_is_found() -> None:
    """C3 per group, by a thread or anything else, with no scheduler."""

    def change(run: Run) -> None:
        if run.step == 30:
            run.optimizer.param_groups[0]["lr"] = 2e-3

    findings, _ = judge(Hyperparameters, train(40, after_step=change).records)
    assert [(f.subject.step, f.techniques) for f in findings] == [(31, ("C3",))]


@pytest.mark.parametrize("shown", [True, False])
def test_a_rate_set_by_hand_beside_a_waiting_scheduler_needs_a_line_of_the_script(
    shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight averaging's way: the script sets the rate, and a scheduler that was made at the start takes over later."""
    monkeypatch.setattr(writers, "places", lambda: {"lr": ["/job/train.py:78"]} if shown else {})

    def by_hand(run: Run) -> None:
        if run.step % 5 == 0:
            run.optimizer.param_groups[0]["lr"] = 3e-3 / (1 + run.step)

    def at_the_end(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    findings, states = judge(Hyperparameters, train(20, schedule=at_the_end, before_step=by_hand).records)
    if shown:
        assert findings == []
        assert states["hyperparameters"].state == "held"
    else:
        assert {(f.outcome, f.techniques) for f in findings} == {("violated", ("C3",))}


@pytest.mark.parametrize("kind", ["exponential", "averaging"])
def test_a_scheduler_that_takes_the_place_of_another_is_found_by_its_rates(kind: str) -> None:
    """Averaging callbacks anneal with a scheduler of their own; the first one is gone, or waits."""

    def anneal(run: Run) -> None:
        if run.step == 12:
            run.scheduler = (
                torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
                if kind == "exponential"
                else torch.optim.swa_utils.SWALR(run.optimizer, swa_lr=1e-3)
            )

    schedule = SCHEDULES["cosine"]
    findings, states = judge(Hyperparameters, train(24, schedule=schedule, after_step=anneal).records)
    assert (findings, states["hyperparameters"].state) == ([], "held")


def test_a_scheduler_stepped_twice_is_found_although_the_rate_is_its_own() -> None:
    """C3: the schedule runs ahead by one."""

    def twice(run: Run) -> None:
        if run.step == 60:
            run.scheduler.step()

    run = train(80, schedule=SCHEDULES["cosine"], after_step=twice)
    findings, _ = judge(Hyperparameters, run.records)
    assert [(f.subject.step, f.techniques[0]) for f in findings] == [(61, "C3")]
    assert "2 times between two updates" in findings[0].message


@pytest.mark.parametrize(("top", "twice_at"), [(1, None), (3, None), (1, 40), (3, 40)])
def test_a_rate_that_rests_at_the_top_of_a_warm_up_hides_no_doubled_step_and_makes_none(
    top: int, twice_at: int | None
) -> None:
    """The rate is told when it changes, so the next report counts the scheduler's steps of several updates."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 20) if step < 20 + top else 0.55 + 0.45 * math.cos((step - 19 - top) / 40)

    def twice(run: Run) -> None:
        if run.step == twice_at:
            run.scheduler.step()

    run = train(60, schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor), after_step=twice)
    findings, _ = judge(Hyperparameters, run.records)
    assert [(f.subject.step, f.techniques[0]) for f in findings] == ([(twice_at + 1, "C3")] if twice_at else [])


def test_a_jump_in_a_smooth_schedule_is_suspicious_even_where_the_script_sets_rates_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """nanoGPT's way: the script writes the rate at every step, and something multiplies it afterwards."""
    monkeypatch.setattr(writers, "places", lambda: {"lr": ["/job/train.py:78"]})

    def by_hand(run: Run) -> None:
        rate = 3e-3 * (1 - run.step / 400)
        run.optimizer.param_groups[0]["lr"] = rate * (0.7 if run.step > 100 else 1.0)

    run = train(120, before_step=by_hand)
    quiet_controls(run)
    findings, _ = judge(Hyperparameters, run.records)
    assert [(f.subject.step, f.outcome, f.techniques) for f in findings] == [(101, "suspicious", ("C3",))]
    assert findings[0].subject.path == "/job/train.py:78"


@pytest.mark.parametrize("warm", [0, 8])
def test_a_schedule_by_hand_that_begins_again_is_held(warm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cycles of 40 steps: the rate jumps to where it began, or to its peak."""
    monkeypatch.setattr(writers, "places", lambda: {"lr": ["/job/train.py:78"]})

    def by_hand(run: Run) -> None:
        at = (run.step - 1) % 40
        factor = (at + 1) / warm if at < warm else 0.5 * (1 + math.cos(math.pi * (at - warm) / (40 - warm)))
        run.optimizer.param_groups[0]["lr"] = 3e-3 * factor

    findings, states = judge(Hyperparameters, train(100, before_step=by_hand).records)
    assert (findings, states["hyperparameters"].state) == ([], "held")


@pytest.mark.parametrize("period", [25, 60])
def test_a_cosine_that_goes_on_past_its_period_rises_again_and_is_held(period: int) -> None:
    """From a rate of nothing every rise is infinite."""

    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period)

    findings, states = judge(Hyperparameters, train(130, schedule=cosine).records)
    assert (findings, states["hyperparameters"].state) == ([], "held")


@pytest.mark.parametrize("least", [0.0, 0.1])
def test_restarts_that_fall_between_two_steps_are_held(least: float) -> None:
    """Cosine with hard restarts as a lambda, as libraries have it: a cycle of 36.7 steps begins just below the peak."""

    def restarting(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        def factor(step: int) -> float:
            if step < 10:
                return step / 10
            return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * (((step - 10) / 36.7) % 1.0)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    findings, states = judge(Hyperparameters, train(130, schedule=restarting).records)
    assert (findings, states["hyperparameters"].state) == ([], "held")


@pytest.mark.parametrize(("key", "value"), [("betas", (0.5, 0.999)), ("eps", 1e-3), ("weight_decay", 0.0)])
def test_other_hyperparameters_that_change_for_no_reason_are_found(key: str, value: Any) -> None:
    """C4, in the group itself."""

    def change(run: Run) -> None:
        if run.step == 25:
            run.optimizer.param_groups[0][key] = value

    findings, _ = judge(Hyperparameters, train(30, after_step=change).records)
    assert [(f.subject.step, f.techniques, f.outcome) for f in findings] == [(26, ("C4",), "violated")]
    assert key in findings[0].message


def test_a_tensor_taken_out_of_its_group_is_found() -> None:
    """C5: the optimizer forgets a matrix."""

    def change(run: Run) -> None:
        if run.step == 25:
            del run.optimizer.param_groups[0]["params"][2]

    run = train(40, after_step=change)
    assert looks_fine(run)
    findings, _ = judge(Hyperparameters, run.records)
    assert (findings[0].subject.step, findings[0].techniques, findings[0].outcome) == (26, ("C5",), "violated")


def test_a_matrix_that_needs_no_gradient_any_more_is_suspicious() -> None:
    """C5: frozen mid-run, named."""

    def change(run: Run) -> None:
        if run.step == 40:
            run.net[3].weight.requires_grad_(False)  # type: ignore[index]
            run.net[3].weight.grad = None  # type: ignore[index]

    findings, _ = judge(Hyperparameters, train(80, after_step=change).records)
    assert [(f.subject.tensor, f.techniques[0]) for f in findings] == [("3.weight", "C5")]


LIBRARY = """
import torch
class Ramp:
    def __init__(self, optimizer, key):
        self.held, self.key = [optimizer], key
    def advance(self):
        for group in self.held[0].param_groups:
            group[self.key] = group[self.key] * 0.97
class Decaying(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= 0.97
        return super().step(closure)
# param_groups
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package with a schedule of its own, and an optimizer that has one inside."""
    (tmp_path / "a_library_of_schedules.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("a_library_of_schedules")
    del sys.modules["a_library_of_schedules"]


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("held", [True, False])
def test_a_librarys_schedule_explains_the_optimizer_it_holds_and_no_other(library: Any, key: str, held: bool) -> None:
    """That the package is loaded, and has such a line, explains nothing."""

    def advance(run: Run) -> None:
        if held:
            run.scheduler.advance()
        else:
            run.optimizer.param_groups[0][key] *= 0.97

    made: list[Any] = []

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        made.append(library.Ramp(optimizer if held else other, key))
        return SimpleNamespace(step=lambda: None, advance=made[0].advance)

    findings, states = judge(Hyperparameters, train(30, schedule=schedule, after_step=advance).records)
    if held:
        assert (findings, states["hyperparameters"].state) == ([], "held")
    else:
        assert {f.outcome for f in findings} == {"violated"}


def test_an_optimizer_whose_class_has_a_schedule_inside_is_held(library: Any) -> None:
    """Optimizers without a scheduler: the line is in their class."""
    run = train(30, make=lambda params: library.Decaying(params, lr=0.05))
    findings, states = judge(Hyperparameters, run.records)
    assert (findings, states["hyperparameters"].state) == ([], "held")


def test_rates_of_two_optimizers_set_by_hand_are_explained_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are told with each."""
    monkeypatch.setattr(writers, "places", lambda: {"lr": ["/job/train.py:78"]})
    nets = [torch.nn.Linear(4, 2) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    with recording() as recorder:
        for number in range(1, 12):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.param_groups[0]["lr"] = 0.1 / number
                optimizer.zero_grad()
                net(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
    findings, states = judge(Hyperparameters, recorder.records)
    assert (findings, states["hyperparameters"].state) == ([], "held")
