"""C1, B3, B5: gradients made wrong inside autograd, or by how backward is called, before any link sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers.recorded import judge
from tests.helpers.training import Run, looks_fine, train
from torch import nn

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.truth import Truth
from trainguard.finding import Finding, LinkState

pytestmark = pytest.mark.torch


class Affine(torch.autograd.Function):
    """x · wᵀ + b with a backward that can be told to lie."""

    lie = staticmethod(lambda gx, gw, gb: (gx, gw, gb))

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t() + b

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        return Affine.lie(grads[0] @ w, grads[0].t() @ x, grads[0].sum(0))


class Layer(nn.Linear):
    """A linear layer that computes by `Affine`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Affine.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call, no-any-return]


def judged(run: Run) -> tuple[list[Finding], LinkState]:
    """What the check says; the links after backward have nothing to say."""
    for check in (Gradients, Optimizer):
        assert judge(check, run.records)[0] == []
    findings, states = judge(Truth, run.records)
    return findings, states["truth"]


def checks(run: Run) -> list[dict[str, Any]]:
    """The values of link truth that are no blindness."""
    values = [r.body["truth"] for r in run.records if r.kind == "step" and "truth" in r.body]
    return [value for value in values if "blind" not in value]


def test_an_honest_run_holds_and_costs_no_bit() -> None:
    """Dropout, clipping, Adam: every comparison holds to 1e-4, and the weights are the same to the bit."""
    run = train(25, clip=0.2, truth_every=1)
    findings, link = judged(run)
    assert (findings, link.broken) == ([], 0)
    assert link.held == len(checks(run)) >= 8
    assert all(abs((v["plus"] + v["minus"]) / 2 - v["expected"]) < 1e-4 for v in checks(run))
    plain = train(25, clip=0.2, guarded=False)
    assert all(torch.equal(a, b) for a, b in zip(run.weights, plain.weights, strict=True))
    assert run.losses == plain.losses


def test_gradients_halved_by_how_backward_is_called_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """C1: `Tensor.backward` patched at step 12 to start from 0.5. All links after backward agree with each other."""
    real = torch.Tensor.backward
    now = Run(nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(torch.ones(1))]))

    def half(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        real(self, torch.tensor(0.5) if now.step >= 12 else None)

    def follow(run: Run) -> None:
        now.step = run.step

    monkeypatch.setattr(torch.Tensor, "backward", half)
    run = train(30, after_step=follow, truth_every=1)
    assert looks_fine(run)
    findings, _ = judged(run)
    assert findings[0].techniques[0] == "C1"
    assert "gradient 0.5" in findings[0].message
    assert 12 <= (findings[0].subject.step or 0) <= 15


@pytest.mark.parametrize(
    ("lie", "tensor"),
    [
        (lambda gx, gw, gb: (gx, -gw, gb), "3.weight"),
        (lambda gx, gw, gb: (gx, gw, -gb), "3.bias"),
        (lambda gx, gw, gb: (0.5 * gx, 0.5 * gw, 0.5 * gb), None),
        (
            lambda gx, gw, gb: (gx, gw + 0.1 * gw.norm() / 16 * torch.cos(torch.arange(256.0)).reshape(16, 16), gb),
            "3.weight",
        ),
        (lambda gx, gw, gb: (gx, gw * (torch.arange(16.0) < 8), gb), "3.weight"),
    ],
    ids=["sign of a weight", "sign of a bias", "all halved", "noise of a tenth", "half of it zeroed"],
)
def test_a_custom_function_that_begins_to_lie_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, lie: Any, tensor: str | None
) -> None:
    """B3: the backward of one layer's own autograd function, replaced at step 15; before, it was a derivative."""

    def start(run: Run) -> None:
        layer = Layer(16, 16)
        layer.load_state_dict(run.net[3].state_dict())  # type: ignore[index]
        run.net[3] = layer  # type: ignore[index]
        run.optimizer = torch.optim.AdamW(run.net.parameters(), lr=3e-3)

    def turn(run: Run) -> None:
        if run.step == 15:
            monkeypatch.setattr(Affine, "lie", staticmethod(lie))

    run = train(30, start=start, after_step=turn, truth_every=1)
    findings, link = judged(run)
    assert link.held >= 4
    assert findings[0].outcome == "suspicious"
    assert findings[0].techniques[0] == "C1"
    assert 15 <= (findings[0].subject.step or 0) <= 22
    assert "test_truth.py:" in (findings[0].subject.path or "")
    if tensor is not None:
        assert findings[0].subject.tensor == tensor
    else:
        assert findings[0].subject.tensor is not None


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_kernel_replaced_in_the_dispatcher_is_proof() -> None:
    """B6 with C1: torch's own tanh_backward turned for good; no code of the job takes part in the graph."""
    library = torch.library.Library("aten", "IMPL")

    def turned(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return -grad * (1 - output * output)

    def start(run: Run) -> None:
        library.impl("tanh_backward", turned, "CPU")

    try:
        run = train(16, start=start, truth_every=1)
    finally:
        library._destroy()
    findings, _ = judged(run)
    assert findings[0].outcome == "violated"
    assert {name for name, _, _ in checks(run)[-1]["odd"]} == {"0.weight", "0.bias"}


def test_a_straight_through_estimator_is_blind_not_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An honest backward that is no derivative, from the first step on: blind, with the line to approve."""

    def start(run: Run) -> None:
        run.net[3] = Layer(16, 16)  # type: ignore[index]
        run.optimizer = torch.optim.AdamW(run.net.parameters(), lr=3e-3)

    monkeypatch.setattr(Affine, "lie", staticmethod(lambda gx, gw, gb: (-gx, gw, gb)))
    findings, link = judged(train(16, start=start, truth_every=1))
    assert findings == []
    assert (link.state, link.held) == ("blind", 0)
    assert "test_truth.py:" in link.blind[0]
    assert not link.required


def test_a_value_that_autograd_cuts_off_is_no_departure() -> None:
    """detach, no_grad, arg max and a straight-through trick in plain torch: nothing is missed."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.scale = nn.Parameter(torch.ones(16))
            self.register_buffer("seen", torch.zeros(16))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            h = self.linear(x)
            with torch.no_grad():
                self.seen.mul_(0.9).add_(h.mean(0), alpha=0.1)  # type: ignore[operator]
                bound = h.abs().max()
            rounded = h + ((h * 4).round() / 4 - h).detach()
            return rounded * self.scale / (1 + bound) + self.seen + h.argmax(-1, keepdim=True) * 0.01

    def start(run: Run) -> None:
        run.net[3] = Own()  # type: ignore[index]
        run.optimizer = torch.optim.AdamW(run.net.parameters(), lr=3e-3)

    run = train(16, start=start, truth_every=1)
    findings, link = judged(run)
    assert findings == []
    assert link.held == len(checks(run)) >= 5
    assert run.net[3].calls == 16  # type: ignore[index, union-attr]


def test_weights_written_between_steps_and_kept_are_blind_and_those_put_back_are_found() -> None:
    """Slow weights copied over the fast ones are the weights that the loss is of; poison for one forward is not."""
    slow: list[torch.Tensor] = []

    def lookahead(run: Run) -> None:
        weights = [p.data for p in run.net.parameters()]
        slow.extend(w.clone() for w in weights[len(slow) :])
        if run.step % 4 == 1:
            for kept, fast in zip(slow, weights, strict=True):
                fast.copy_(kept.lerp_(fast, 0.5))

    run = train(16, after_step=lookahead, truth_every=1)
    findings, link = judge(Truth, run.records)[0], judge(Truth, run.records)[1]["truth"]
    assert (findings, link.broken) == ([], 0)
    assert link.held >= 3
    assert any("written to before it was used" in r.body.get("truth", {}).get("blind", "") for r in run.records)

    kept: list[torch.Tensor] = []

    def poison(run: Run) -> None:
        kept[:] = [p.detach().clone() for p in run.net.parameters()]
        for p in run.net.parameters():
            p.data.copy_(p.detach() * 1.5)

    def back(run: Run) -> None:
        for p, old in zip(run.net.parameters(), kept, strict=False):
            p.data.copy_(old)

    run = train(16, after_step=poison, after_backward=back, truth_every=1)
    findings, _ = judged(run)
    assert {f.outcome for f in findings} <= {"violated", "suspicious"}
    assert findings


def test_a_tape_can_be_stopped_while_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of modules are gone by then: the mode is left alone, and nothing is raised at exit."""
    from trainguard.watch import tape

    made = object.__new__(tape.Tape)
    monkeypatch.setattr(tape, "sys", None)
    assert made.stop()
    assert made.stopped
