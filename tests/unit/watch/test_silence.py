"""Weights that move from batch to batch while no step is reported, and evaluations, which look alike from afar."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainguard.watch import silence


class Client:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, kind: str, body: dict[str, Any], step: int | None = None) -> None:
        self.sent.append({**body, "kind": kind, "step": step})


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A small model of which the engine saw seven steps."""
    model = torch.nn.Linear(3, 2)
    entries = [SimpleNamespace(param=p, reason=None) for p in model.parameters()]
    track = SimpleNamespace(ref=lambda: model, entries=entries)
    guard = SimpleNamespace(tracks={1: track}, tally=SimpleNamespace(steps=7), torch=torch)
    monkeypatch.setattr(silence.engine, "current", lambda: guard)
    monkeypatch.setattr(silence, "_compiled", lambda: False)
    client = Client()
    return SimpleNamespace(model=model, guard=guard, client=client, silence=silence.Silence(client))  # type: ignore[arg-type]


def batches(job: SimpleNamespace, count: int, between: Callable[[int], None]) -> None:
    for number in range(count):
        job.silence.batch()
        between(number)


def test_weights_that_move_with_the_batches_while_steps_are_silent_are_told_once(job: SimpleNamespace) -> None:
    """Within ten batches; gradients that move too make it sooner."""

    def train(_: int) -> None:
        job.model.zero_grad()
        job.model(torch.randn(4, 3)).square().mean().backward()
        with torch.no_grad():
            for p in job.model.parameters():
                p -= 0.1 * p.grad

    batches(job, 40, train)
    (told,) = job.client.sent
    assert (told["what"], told["step"], told["gradients"]) == ("silence", 7, True)
    assert told["batches"] <= 10


def test_weights_alone_are_enough_after_more_looks(job: SimpleNamespace) -> None:
    """Where gradients are cleared before the next batch comes."""

    def nudge(_: int) -> None:
        with torch.no_grad():
            for p in job.model.parameters():
                p += 0.01

    batches(job, 40, nudge)
    (told,) = job.client.sent
    assert (told["moved"], told["gradients"]) == (silence.MOVED, False)


def test_steps_that_are_seen_are_no_silence(job: SimpleNamespace) -> None:
    """Four batches to a step: accumulation."""

    def accumulate(number: int) -> None:
        if number % 4 == 3:
            job.guard.tally.steps += 1
        with torch.no_grad():
            job.model.weight += 0.1

    batches(job, 60, accumulate)
    assert job.client.sent == []


def test_an_evaluation_with_averages_or_snapshots_is_no_silence(job: SimpleNamespace) -> None:
    """Other weights are put in place now and then, and stand still for some batches."""

    def swap(number: int) -> None:
        if number % 5 == 0:
            with torch.no_grad():
                job.model.weight.mul_(-1)

    batches(job, 100, swap)
    assert job.client.sent == []
