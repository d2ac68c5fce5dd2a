"""A small training that reads its data through torch's loader, with places where a test can put its hand in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tests.helpers.recorded import recording
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainguard.evidence import Evidence

ROWS = 320
BATCH = 16


class Table(Dataset[tuple[torch.Tensor, int]]):
    """Rows of eight numbers in three classes that can be learnt."""

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(rows, 8, generator=generator)
        self.y = torch.bucketize(self.x[:, 0] * 2 + self.x[:, 1], torch.tensor([-1.0, 1.0]))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index], int(self.y[index])


def fit(
    loader: Iterable[Any] | None = None,
    *,
    passes: int = 3,
    before_pass: Callable[[int], None] | None = None,
    change: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy,
    outputs: int = 3,
    after_step: Callable[[int], None] | None = None,
    dropout: float = 0.1,
    **settings: Any,
) -> list[Evidence]:
    """Records of a training over `passes` passes; `change` acts on a batch between loader and model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with recording(**settings) as recorder:
        if loader is None:
            loader = DataLoader(Table(), batch_size=BATCH, shuffle=True)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, outputs))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        step = 0
        for number in range(passes):
            if before_pass is not None:
                before_pass(number)
            for x, y in loader:
                step += 1
                if change is not None:
                    x, y = change(step, x, y)
                optimizer.zero_grad()
                loss(net(x), y).backward()
                optimizer.step()
                if after_step is not None:
                    after_step(step)
    return recorder.records
