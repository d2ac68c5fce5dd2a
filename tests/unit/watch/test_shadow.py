"""Shadows: what a twin may use, what is refused with its reason, and that nothing of the job is touched."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from tests.helpers import optimizers
from tests.helpers.recorded import judge
from tests.helpers.threads import alone
from tests.helpers.training import train

from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.updates import REFERENCES
from trainguard.watch import shadow

pytestmark = pytest.mark.torch


def shadows(run: Any) -> list[Any]:
    """What each step said of its shadow."""
    return [r.body["optimizer"].get("shadow") for r in run.records if r.kind == "step"]


def test_the_guard_and_the_judge_name_the_same_classes() -> None:
    """An optimizer is either recomputed by a formula or repeated from its source."""
    assert set(shadow.REFERENCES) == set(REFERENCES)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("Lion", lambda params: optimizers.Lion(params)),
        ("Noisy", lambda params: optimizers.Noisy(params, lr=1e-2)),
        ("Ahead", lambda params: optimizers.Ahead(torch.optim.Adam(params, lr=1e-2))),
    ],
)
def test_training_is_bit_identical_and_no_generator_moves(name: str, make: Any) -> None:
    """Also where the step draws random numbers, and where an optimizer holds another."""
    state = random.getstate()
    with alone():
        guarded, plain = train(8, make=make), train(8, make=make, guarded=False)
    assert all(torch.equal(a, b) for a, b in zip(guarded.weights, plain.weights, strict=True))
    assert random.getstate() == state
    findings, states = judge(Optimizer, guarded.records)
    assert findings == []
    assert states["optimizer"].state == "held"
    assert [s["scope"] for s in shadows(guarded)[:8:7]] == ["all", "all"] if name != "Ahead" else True


def test_a_step_that_draws_is_not_repeated_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may draw from the same generator meanwhile: the twin is not even begun, so nothing has to be put back."""
    stop = threading.Event()
    begun: list[Any] = []
    monkeypatch.setattr(shadow.Run, "go", lambda run: begun.append(run))
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        run = train(3, make=lambda params: optimizers.Noisy(params, lr=1e-2))
    finally:
        stop.set()
        thread.join()
    assert all("draws random numbers" in s["off"] for s in shadows(run))
    assert begun == []


def test_state_in_a_class_and_classes_made_in_functions_are_refused_with_their_reason() -> None:
    """Blind, never held; the reason is in the record."""
    run = train(3, make=lambda params: optimizers.Counted(params, lr=1e-2))
    assert {s["off"] for s in shadows(run)} == {"it keeps state in its class"}
    rate = 1e-2

    class Inner(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"] = rate
            return super().step(closure)

    findings, states = judge(Optimizer, train(3, make=lambda params: Inner(params, lr=1e-2)).records)
    assert findings == []
    assert states["optimizer"].state == "blind"
    assert "Inner" in states["optimizer"].blind[0]


def test_too_large_a_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded in memory; nothing is kept of it."""
    monkeypatch.setattr(shadow, "COPY_BYTES", 500)
    run = train(2, make=lambda params: optimizers.Lion(params))
    assert {s["off"] for s in shadows(run)} == {"copies would take more than 0 MiB"}


def test_beyond_its_share_of_the_budget_no_step_is_repeated() -> None:
    """The first two are; then only as the budget grows."""
    run = train(40, make=lambda params: optimizers.Lion(params), links="governed", budget_percent=0.0, credit_seconds=0)
    made = [r for r in run.records if r.kind == "step" and "shadow" in r.body.get("optimizer", {})]
    checked = [r for r in run.records if r.kind == "step" and r.body["checked"]]
    assert len(checked) >= 20
    assert len(made) == 2


def test_a_source_that_was_changed_after_it_was_loaded_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash is not the one that link *code* recorded."""
    from types import SimpleNamespace

    monkeypatch.setattr(shadow, "code", SimpleNamespace(current=lambda: SimpleNamespace(known={})))
    run = train(2, make=lambda params: optimizers.Lion(params))
    assert "not the one that was loaded" in shadows(run)[0]["off"]


def reversed_rule(p: torch.Tensor, grad: torch.Tensor, rate: float) -> None:
    """Of another module than the optimizer's."""
    p.add_(grad.sign(), alpha=rate)


def test_a_rule_that_an_optimizer_keeps_as_an_attribute_is_followed_in_its_own_module() -> None:
    """One that was put there from elsewhere is not: what it does would be called right."""
    findings, states = judge(Optimizer, train(8, make=lambda params: optimizers.Ruled(params)).records)
    assert (findings, states["optimizer"].state) == ([], "held")

    def swap(run: Any) -> None:
        run.optimizer.rule = reversed_rule

    run = train(4, make=lambda params: optimizers.Ruled(params), start=swap)
    assert {s["off"] for s in shadows(run)} == {"its result depends on self.rule, which cannot be copied"}
    assert judge(Optimizer, run.records)[1]["optimizer"].state == "blind"
