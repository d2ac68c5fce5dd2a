"""Layers whose gradient is by design not all of the derivative, or not one at all: held or blind, never accused."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.recorded import judge
from tests.helpers.training import Run, train
from torch import nn
from torch.nn import functional

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.truth import Truth
from trainguard.finding import Finding, LinkState

pytestmark = [pytest.mark.torch, pytest.mark.slow]

WORDS = 5


def tokens(h: torch.Tensor) -> torch.Tensor:
    """Sixteen of WORDS words from a row of numbers; 0 is the padding."""
    return (h.detach() * 2).round().long().abs() % WORDS


class Layer(nn.Module):
    """Sixteen numbers to sixteen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)


class Padded(Layer):
    """Words whose padding counts in a mean, as after pooling without a mask."""

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16, padding_idx=0, scale_grad_by_freq=scale)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.linear(h) + self.words(tokens(h)).mean(1)  # type: ignore[no-any-return]


class Sequence(Layer):
    """Words through a recurrent layer that runs over the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(WORDS, 8, padding_idx=0), nn.LSTM(8, 16, batch_first=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.linear(h) + self.rnn(self.words(tokens(h)))[1][0][-1]  # type: ignore[no-any-return]


class Packed(Sequence):
    """The same, packed by length."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        lengths = torch.arange(len(h)) % 16 + 1
        packed = nn.utils.rnn.pack_padded_sequence(
            self.words(tokens(h)), lengths, batch_first=True, enforce_sorted=False
        )
        return self.linear(h) + self.rnn(packed)[1][0][-1]  # type: ignore[no-any-return]


class Bag(Layer):
    """Bags that leave the padding out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 16, padding_idx=0)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.linear(h) + self.words(tokens(h))  # type: ignore[no-any-return]


class Scaled(Padded):
    """Gradients divided by how often a word came."""

    def __init__(self) -> None:
        super().__init__(scale=True)


class Quantized(Layer):
    """Training that is aware of quantization: the backward lets the gradient through."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        weight = torch.fake_quantize_per_tensor_affine(self.linear.weight, 0.05, 0, -128, 127)
        return functional.linear(h, weight, self.linear.bias)


class Forward(Layer):
    """A directional derivative by dual numbers."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.linear(h) + torch.func.jvp(self.linear, (h,), (torch.ones_like(h),))[1]  # type: ignore[no-any-return]


def smoothed(x: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        x = x * 0.5 + x.mean() * 0.5
    return x


class Scripted(Layer):
    """TorchScript takes its gradient by itself, from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.smoothed = torch.jit.script(smoothed)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.smoothed(self.linear(h), 2)  # type: ignore[no-any-return]


def trained(layer: type[Layer], zeroed: int | None = None) -> tuple[list[Finding], LinkState]:
    """What the check says of 14 steps with this layer; zeroed: a word whose gradient is lost from step 8 on."""

    def lose(run: Run) -> None:
        if zeroed is not None and run.step == 7:
            words = run.net[3].words.weight  # type: ignore[index, union-attr]
            words.register_hook(lambda grad: grad.index_fill(0, torch.tensor([zeroed]), 0.0))

    def start(run: Run) -> None:
        run.net[3] = layer()  # type: ignore[index]
        run.optimizer = torch.optim.AdamW(run.net.parameters(), lr=3e-3)

    run = train(14, start=start, after_step=lose, truth_every=1)
    if zeroed is None:
        assert judge(Gradients, run.records)[0] == []
    findings, states = judge(Truth, run.records)
    return findings, states["truth"]


@pytest.mark.parametrize("layer", [Padded, Sequence, Packed, Bag])
def test_padding_that_gets_no_gradient_holds(layer: type[Layer]) -> None:
    """Moving the padding's row would move the loss; torch leaves its gradient out on purpose."""
    findings, link = trained(layer)
    assert findings == []
    assert link.held >= 5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled, "the backward of aten::embedding is an estimator"),
        (Quantized, "the backward of aten::fake_quantize_per_tensor_affine"),
        (Forward, "forward-mode derivatives"),
        (Scripted, "torch::jit::(anonymous namespace)::DifferentiableGraphBackward"),
    ],
)
def test_a_backward_that_is_no_derivative_by_design_is_blind(layer: type[Layer], reason: str) -> None:
    findings, link = trained(layer)
    assert (findings, link.held) == ([], 0)
    assert link.blind
    assert link.blind[0].startswith(reason)


def test_a_word_that_is_no_padding_and_gets_no_gradient_is_found() -> None:
    """C5: the same on another row, by a hook that comes later."""
    findings, _ = trained(Padded, zeroed=1)
    assert findings
    assert all("3.words.weight" in finding.message for finding in findings)
