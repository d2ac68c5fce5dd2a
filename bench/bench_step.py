"""What the guard costs a training step: CPU seconds of blocks with and without it, by turns, in one process.

    python bench/bench_step.py [1 10]

For models of about 1 and 10 million parameters (100 takes minutes), links "all" and "governed". Prints, per step: CPU
of the bare loop, what the guard adds by its own account (CPU time of the thread inside it), and how many steps were
checked. The difference of the blocks is printed too; on a busy machine it is mostly noise, and everything is slower:
compare the shares, and the reference (one BLAKE2b of 5 kB) with that of another day.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

from trainguard.watch import engine

WIDTHS = {1: (4, 144), 10: (6, 376), 100: (8, 1024)}
"""Millions of parameters → blocks, width."""
BLOCKS, STEPS = 6, 20


class Sink:
    """Takes frames as the client does: one JSON document each."""

    def __init__(self, links: str) -> None:
        self.settings: dict[str, Any] = {
            "key": "5a" * 32,
            "links": links,
            "budget_percent": 0.5,  # of the time with and without the guard: 1 % of that with it
            "credit_seconds": 0.0 if links == "governed" else 1.0,
            "always_steps": 0,
            "tensors": 4,
            "elements": 32,
        }
        self.alive = True
        self.frames = self.bytes = 0
        self.encode = json.JSONEncoder(separators=(",", ":"), default=str, check_circular=False).encode

    def send(self, kind: str, body: Any, step: int | None = None) -> None:
        self.frames += 1
        self.bytes += len(self.encode({"k": kind, "q": self.frames, "b": body, "s": step}).encode())

    def fault(self, place: str, error: BaseException) -> None:
        raise RuntimeError(place) from error


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 6 * width), nn.Linear(6 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def measure(million: int, links: str) -> None:
    blocks, width = WIDTHS[million]
    torch.manual_seed(0)
    net = nn.Sequential(*[Block(width) for _ in range(blocks)])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    x = torch.randn(64, width)

    def block() -> float:
        began = time.process_time()
        for _ in range(STEPS):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return (time.process_time() - began) / STEPS

    sink = Sink(links)
    engine._engine = None
    engine.attach(sink)  # type: ignore[arg-type]
    guard = engine._engine
    assert guard is not None
    guard.idlers = []  # sweeps have a bench of their own (inventories.py)
    own: list[tuple[int, bool]] = []
    spend = guard.governor.spend

    def booked(own_ns: int, wall_ns: int, full: bool) -> None:
        own.append((own_ns, full))
        spend(own_ns, wall_ns, full)

    guard.governor.spend = booked  # type: ignore[method-assign]
    for _ in range(8 if links == "governed" else 1):  # until the level has settled
        block()
    own.clear()
    on, off = [], []
    for _ in range(BLOCKS):
        engine._engine = guard
        for track in guard.tracks.values():  # it did not see the steps of the block before
            track.memory["weights"]["pending"] = None
        on.append(block())
        engine._engine = None
        off.append(block())
    full = [ns for ns, checked in own if checked]
    idle = [ns for ns, checked in own if not checked]
    numel = sum(p.numel() for p in net.parameters())
    bare = statistics.median(off)
    mean = statistics.mean(ns for ns, _ in own) / 1e9
    print(
        f"{numel / 1e6:6.1f} M {len(list(net.parameters())):3} tensors  {links:8}  bare {bare * 1e3:8.2f} ms  "
        f"own {mean * 1e3:6.3f} ms = {mean / bare:6.2%}  "
        f"checked step {_micro(full)}  unchecked {_micro(idle)}  checked {len(full)}/{len(own)}  "
        f"blocks differ by {(statistics.median(on) / bare - 1):+.1%}  {sink.bytes / max(1, sink.frames):.0f} B/frame"
    )


def _micro(values: list[int]) -> str:
    return f"{statistics.median(values) / 1e3:6.0f} us" if values else "     – us"


def reference() -> float:
    """Microseconds of CPU that one BLAKE2b of 5 kB takes now: how slow the machine is."""
    data = bytes(5056)
    began = time.thread_time()
    for _ in range(2000):
        hashlib.blake2b(data).digest()
    return (time.thread_time() - began) / 2000 * 1e6


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"reference: {reference():.1f} us")
    for size in [int(word) for word in sys.argv[1:]] or [1, 10]:
        for mode in ("all", "governed"):
            measure(size, mode)
