"""A small training in this process, with places where a test can put its hand in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.helpers.recorded import recording
from torch import nn

from trainguard.evidence import Evidence

Hand = Callable[["Run"], None]


@dataclass
class Run:
    """What a hand is given: the training at some step."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    step: int = 0
    """Number of the step that is under way, from 1."""
    losses: list[float] = field(default_factory=list)
    records: list[Evidence] = field(default_factory=list)

    @property
    def weights(self) -> list[torch.Tensor]:
        """Copies of all parameters."""
        return [p.detach().clone() for p in self.net.parameters()]


def small_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Six tensors; dropout draws from the generator at every step."""
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    ).to(dtype)


def train(
    steps: int,
    *,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    start: Hand | None = None,
    after_backward: Hand | None = None,
    before_step: Hand | None = None,
    after_step: Hand | None = None,
    dtype: torch.dtype = torch.float32,
    guarded: bool = True,
    **settings: Any,
) -> Run:
    """Fit a fixed random teacher; `after_backward` acts before clipping, `before_step` after it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = nn.Linear(8, 3).to(dtype)
    if not guarded:
        return _loop(steps, teacher, make, schedule, clip, start, after_backward, before_step, after_step, dtype)
    with recording(**settings) as recorder:
        run = _loop(steps, teacher, make, schedule, clip, start, after_backward, before_step, after_step, dtype)
    run.records = recorder.records
    return run


def _loop(
    steps: int,
    teacher: nn.Module,
    make: Any,
    schedule: Any,
    clip: float | None,
    start: Hand | None,
    after_backward: Hand | None,
    before_step: Hand | None,
    after_step: Hand | None,
    dtype: torch.dtype,
) -> Run:
    net = small_net(dtype)
    optimizer = make(list(net.parameters())) if make else torch.optim.AdamW(net.parameters(), lr=3e-3)
    run = Run(net, optimizer, schedule(optimizer) if schedule else None)
    if start:
        start(run)
    for run.step in range(1, steps + 1):
        x = torch.randn(16, 8, dtype=dtype)
        with torch.no_grad():
            y = teacher(x)
        loss = (net(x) - y).float().pow(2).mean()
        run.optimizer.zero_grad()
        loss.backward()
        run.losses.append(loss.item())
        if after_backward:
            after_backward(run)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if before_step:
            before_step(run)
        run.optimizer.step()
        if run.scheduler is not None:
            run.scheduler.step()
        if after_step:
            after_step(run)
    return run


def looks_fine(run: Run) -> bool:
    """The naive control: the loss falls as one would expect, and no number is out of range."""
    early, late = run.losses[: len(run.losses) // 4], run.losses[-len(run.losses) // 4 :]
    return all(map(_finite, run.losses)) and sum(late) / len(late) < sum(early) / len(early)


def _finite(value: float) -> bool:
    return value == value and abs(value) < 1e3
