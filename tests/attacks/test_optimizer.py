"""C4, C5, C9 through the optimizer: a planted step() that does something else, found by recomputing the update."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
from tests.helpers import newton, optimizers
from tests.helpers.recorded import judge, recording
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


def test_weights_that_other_processes_share_are_blind_and_convict_nobody() -> None:
    """Lock-free training by several processes: what another one adds during the update is its honest work."""

    def share(run: Run) -> None:
        run.net.share_memory()
        real = run.optimizer._init_group  # type: ignore[attr-defined]

        def during(*args: Any, **more: Any) -> Any:
            with torch.no_grad():  # within the step, as another process might
                for weight in run.net.parameters():
                    weight.add_(1e-3)
            return real(*args, **more)

        run.optimizer._init_group = during  # type: ignore[attr-defined]

    findings, states = judge(Optimizer, train(6, start=share).records)
    assert findings == []
    assert states["optimizer"].state == "blind"
    assert "other processes write to them" in states["optimizer"].blind[0]


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


# -- optimizers without a formula: the live code does what its source says -----------------------------------------


def matrices(params: list[Any]) -> list[Any]:
    """What Muon takes."""
    return [p for p in params if p.ndim == 2]


def factor(message: str) -> float:
    """The effective learning rate that a message names."""
    found = re.search(r"learning rate is ([0-9.]+) times that of its source", message)
    assert found is not None, message
    return float(found[1])


def with_closure(make: Any, steps: int = 6) -> list[Any]:
    """Records of a small fit whose steps are given a closure."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = make(list(net.parameters()))
    x, y = torch.randn(16, 8), torch.randn(16, 3)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    with recording() as recorder:
        closure()
        for _ in range(steps):
            optimizer.step(closure)
    return recorder.records


def test_a_custom_optimizer_whose_method_was_replaced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """C1: nobody has a formula for it, but its source says what it does."""
    honest = optimizers.Lion.update

    def turned(self: Any, p: Any, group: Any) -> None:
        honest(self, p, {**group, "lr": -group["lr"]})

    monkeypatch.setattr(optimizers.Lion, "update", turned)
    run = train(6, make=lambda params: optimizers.Lion(params))
    findings, states = judge(Optimizer, run.records)
    assert states["optimizer"].held == 0
    assert findings[0].outcome == "violated"
    assert findings[0].techniques == ("C1",)
    assert findings[0].subject.step == 1
    assert "opposite direction to that of its source" in findings[0].message


@pytest.mark.parametrize("place", ["global", "function", "constant", "code", "defaults"])
def test_wherever_the_kernel_was_changed_the_twin_does_not_follow(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the optimizer's module, in a helper's, in a function's code or defaults: by one part in a hundred."""
    honest, blend = newton.softened, optimizers.blend
    if place == "global":
        monkeypatch.setattr(optimizers, "softened", lambda x: honest(x) * 1.01)
    elif place == "function":
        monkeypatch.setattr(optimizers.newton, "softened", lambda x: honest(x) * 1.01)
    elif place == "constant":
        monkeypatch.setattr(newton, "STRENGTH", 10.0)
    elif place == "code":
        monkeypatch.setattr(blend, "__code__", (lambda a, b, share: a + 1.01 * share * (b - a)).__code__)
    else:
        monkeypatch.setattr(newton.softened, "__defaults__", (1.01,))
    kind = optimizers.Lamb if place in ("function", "constant", "defaults") else optimizers.Lion
    make = (lambda params: kind(params, lr=0.3)) if kind is optimizers.Lamb else kind
    findings, states = judge(Optimizer, train(6, make=make).records)
    if place == "defaults":  # softened has none, so these change nothing
        assert (findings, states["optimizer"].held) == ([], 6)
        return
    assert findings
    assert findings[0].outcome == "violated"
    assert findings[0].techniques[0] in ("C3", "C4")


def test_a_rate_hidden_in_the_kernel_of_muon_is_named_with_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """C3: 1.05 times, on every step."""
    module = importlib.import_module("torch.optim._muon")
    honest = module._adjust_lr
    monkeypatch.setattr(module, "_adjust_lr", lambda lr, *rest: honest(lr, *rest) * 1.05)
    run = train(6, make=lambda params: torch.optim.Muon(matrices(params), lr=1e-2))
    findings, _ = judge(Optimizer, run.records)
    assert findings[0].techniques == ("C3", "C4")
    assert factor(findings[0].message) == pytest.approx(1.05, rel=1e-3)


def test_a_sign_turned_inside_lbfgs_is_found_though_its_closure_is_called_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C1: every trial point lies on the other side."""
    honest = torch.optim.LBFGS._add_grad
    monkeypatch.setattr(torch.optim.LBFGS, "_add_grad", lambda self, t, d: honest(self, -t, d))
    findings, _ = judge(Optimizer, with_closure(lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=4)))
    assert findings[0].outcome == "violated"
    assert findings[0].subject.step == 1
    assert findings[0].techniques[0] in ("C1", "C4")


def test_one_tensor_of_many_is_repeated_where_all_would_be_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models: the rotation decides which; torch's Muon treats every tensor by itself, so one convicts."""
    monkeypatch.setattr("trainguard.watch.shadow.ALL_ELEMENTS", 100)
    make = lambda params: torch.optim.Muon(matrices(params), lr=1e-2)  # noqa: E731
    honest = train(9, make=make)
    findings, states = judge(Optimizer, honest.records)
    assert (findings, states["optimizer"].state, states["optimizer"].held) == ([], "held", 9)
    scopes = {r.body["optimizer"]["shadow"]["scope"] for r in honest.records if r.kind == "step"}
    assert scopes == {"0.weight", "3.weight", "5.weight"}
    module = importlib.import_module("torch.optim._muon")
    adjusted = module._adjust_lr
    monkeypatch.setattr(module, "_adjust_lr", lambda lr, *rest: adjusted(lr, *rest) * 0.9)
    findings, _ = judge(Optimizer, train(4, make=make).records)
    assert factor(findings[0].message) == pytest.approx(0.9, rel=1e-3)


def test_an_update_that_depends_on_all_tensors_is_not_convicted_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next checked step is repeated whole; where even that is too much, the link is blind and says why."""
    monkeypatch.setattr("trainguard.watch.shadow.ALL_ELEMENTS", 100)
    findings, states = judge(Optimizer, train(6, make=lambda params: optimizers.Lamb(params)).records)
    assert findings == []
    assert states["optimizer"].held == 5
    monkeypatch.setattr("trainguard.watch.shadow.COUPLED_ELEMENTS", 200)
    findings, states = judge(Optimizer, train(6, make=lambda params: optimizers.Lamb(params)).records)
    assert findings == []
    assert states["optimizer"].state == "blind"
    assert any("depends on others" in reason for reason in states["optimizer"].blind)
