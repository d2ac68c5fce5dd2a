"""What committing to every step costs: CPU time and bytes a step, and what one replay point costs.

    python bench/bench_replay.py [1 10]

For transformer-like models of about 1 and 10 million parameters, AdamW with clipping, batches of 16 x 64 positions.
Prints the CPU of a bare step, what link *commits* adds when a step commits to everything and when it is lean (CPU time
of the training thread around the link alone, so a busy machine changes the shares little), the bytes of its value, and
bytes and CPU of a point.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from torch import nn

from trainguard.watch import commits, engine, points

WIDTHS = {1: (4, 144), 10: (6, 376), 100: (8, 1024)}
"""Millions of parameters → blocks, width."""
STEPS = 14


class Sink:
    """Counts the bytes of link *commits* in frames as the client would send them."""

    def __init__(self, folder: str) -> None:
        self.settings: dict[str, Any] = {"key": "5a" * 32, "links": "none", "commits": True, "points": folder}
        self.settings |= {"points_at": [STEPS + 1]}
        self.alive = True
        self.sizes: list[int] = []

    def send(self, kind: str, body: Any, step: int | None = None) -> None:
        for row in body.get("rows", ()) if kind == "steps" else ():
            if len(row) == 7:
                self.sizes.append(len(json.dumps(row[6], separators=(",", ":"))))

    def fault(self, place: str, error: BaseException) -> None:
        raise RuntimeError(place) from error


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 6 * width), nn.Linear(6 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def measure(millions: int) -> str:
    """One line for one size."""
    blocks, width = WIDTHS[millions]
    net = nn.Sequential(*(Block(width) for _ in range(blocks)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    batch = torch.randn(1024, width)
    folder = tempfile.mkdtemp(prefix="bench-replay-")
    sink = Sink(folder)
    engine.attach(sink)  # type: ignore[arg-type]  # the stand-in has what the engine uses
    (link,) = engine.current().links  # type: ignore[union-attr]
    spent = timed(link)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    bare = []
    for number in range(2 * STEPS):
        lean = number >= STEPS
        link.thorough = not lean
        link._share = lambda _number, lean=lean: commits.LEAN if lean else commits.EVERYTHING
        if number == STEPS:
            sink.settings["points_at"] = []
        spent.clear()
        began = time.thread_time()
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        whole, own = time.thread_time() - began, sum(spent)
        if number not in (0, STEPS):
            seconds[lean].append(own)
            bare.append(whole - own)
    engine.current().flush()  # type: ignore[union-attr]
    engine._engine = None
    parameters = sum(weight.numel() for weight in net.parameters())
    step = statistics.median(bare)
    full, lean_s = (statistics.median(seconds[each]) for each in (False, True))
    shutil.rmtree(folder)
    return (
        f"{parameters / 1e6:5.1f} M in {sum(1 for _ in net.parameters())} tensors: step {1e3 * step:7.1f} ms CPU; "
        f"everything {1e3 * full:6.2f} ms ({full / step:.2%}), {statistics.median(sink.sizes[1:STEPS]):.0f} bytes; "
        f"lean {1e3 * lean_s:6.2f} ms ({lean_s / step:.2%}), {statistics.median(sink.sizes[STEPS + 1 :]):.0f} bytes; "
        f"point {12 * parameters / 1e6:.0f} MB {1e3 * POINT[0]:.0f} ms CPU"
    )


POINT: list[float] = [0.0]


def timed(link: Any) -> list[float]:
    """Seconds of every call of the link, and of writing a point apart from them."""
    spent: list[float] = []

    def wrap(function: Any) -> Any:
        def timing(*arguments: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments)
            finally:
                spent.append(time.thread_time() - began)

        return timing

    write = points.write

    def writing(*arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return write(*arguments)
        finally:
            POINT[0] = time.thread_time() - began

    points.write = writing
    link.before, link.after = wrap(link.before), wrap(link.after)
    commits._Raw.over = wrap(_over)  # type: ignore[method-assign]
    return spent


_over = commits._Raw.over


def main() -> None:
    torch.set_num_threads(1)
    for millions in [int(word) for word in sys.argv[1:]] or [1, 10]:
        print(measure(millions), flush=True)


if __name__ == "__main__":
    main()
