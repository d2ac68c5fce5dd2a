"""What the guard costs a training step: CPU seconds of blocks with and without it, by turns, in one process.

    python bench/bench_step.py [1 10]

For models of about 1 and 10 million parameters (100 takes minutes), links "all" and "governed". Prints, per step: CPU
of the bare loop, what the guard adds by its own account (CPU time of the thread inside it), how many steps were
checked, bytes of evidence, and the dearest links. "unchecked" is the median over all hook calls of an unchecked step,
timed from outside; reading the clock is in it. The difference of the blocks is printed too; on a busy machine it is
mostly noise, and everything is slower: compare the shares, and the reference (one BLAKE2b of 5 kB) with that of another
day. On the same loop, by turns with the bare one: autograd's anomaly mode, and a tracker that logs gradients
(`wandb.watch`, offline, every step) where wandb is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainguard.watch import engine

WIDTHS = {1: (4, 144), 10: (6, 376), 100: (8, 1024)}
"""Millions of parameters → blocks, width."""
BLOCKS, STEPS = 6, 20
OPTIMIZER = sys.modules["torch.optim.optimizer"]  # torch.optim deletes the names of its submodules


class Sink:
    """Takes frames as the client does: one JSON document each."""

    def __init__(self, links: str) -> None:
        self.settings: dict[str, Any] = {
            "key": "5a" * 32,
            "links": links,
            "budget_percent": 0.5,  # of the time with and without the guard: 1 % of that with it
            "commits": links == "governed",  # as a run does by default, from the same account
            "commit_percent": 0.2,
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


class Loop:
    """A model with its optimizer, and a block of steps that gives the CPU seconds of one."""

    def __init__(self, million: int) -> None:
        blocks, width = WIDTHS[million]
        torch.manual_seed(0)
        self.net = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4)
        self.x = torch.randn(64, width)

    def block(self, after: Callable[[], Any] = lambda: None) -> float:
        """CPU seconds of a step, over STEPS; `after` is called after each."""
        began = time.process_time()
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            self.net(self.x).square().mean().backward()
            self.optimizer.step()
            after()
        return (time.process_time() - began) / STEPS


class Timed:
    """The engine's hooks and links, timed from outside: nanoseconds of every step, and of each link in all."""

    def __init__(self, guard: engine.Engine) -> None:
        self.full: list[int] = []
        self.idle: list[int] = []
        self.links: dict[str, int] = {}
        self._spent = 0
        self._checked = False
        self._before, self._after, self._call = engine._before, engine._after, guard._call
        hooks = OPTIMIZER._global_optimizer_pre_hooks, OPTIMIZER._global_optimizer_post_hooks
        for table, own, ours in ((hooks[0], engine._before, self.before), (hooks[1], engine._after, self.after)):
            for key, hook in list(table.items()):
                if hook is own:
                    table[key] = ours  # type: ignore[assignment]
        guard._call = self.call  # type: ignore[method-assign]
        self.guard = guard

    def before(self, *given: Any) -> Any:
        track = self.guard.tracks.get(id(given[0]))
        self._checked = track is None or track.next_full
        began = time.thread_time_ns()
        result = self._before(*given)
        self._spent = time.thread_time_ns() - began
        return result

    def after(self, *given: Any) -> None:
        began = time.thread_time_ns()
        self._after(*given)
        self._spent += time.thread_time_ns() - began
        if engine._engine is not None:
            (self.full if self._checked else self.idle).append(self._spent)

    def call(self, link: Any, phase: str, step: Any) -> Any:
        began = time.thread_time_ns()
        result = self._call(link, phase, step)
        self.links[link.name] = self.links.get(link.name, 0) + time.thread_time_ns() - began
        return result

    def clear(self) -> None:
        """Forget what was measured."""
        self.full, self.idle, self.links = [], [], {}


def measure(million: int, links: str) -> None:
    """One line for a size and a setting."""
    loop, sink = Loop(million), Sink(links)
    OPTIMIZER._global_optimizer_pre_hooks.clear()
    OPTIMIZER._global_optimizer_post_hooks.clear()
    engine._engine, engine._hooked = None, False
    engine.attach(sink)  # type: ignore[arg-type]
    guard = engine._engine
    assert guard is not None
    guard.idlers = []  # sweeps have a bench of their own (bench_inventories.py)
    guard.always = [link for link in guard.always if link.name != "stalls"]  # it answers a supervisor; there is none
    guard.stills = [link.still for link in guard.always]
    timed = Timed(guard)
    for _ in range(8 if links == "governed" else 1):  # until the level has settled
        loop.block()
    timed.clear()
    frames, sent = sink.frames, sink.bytes
    on, off = [], []
    for _ in range(BLOCKS):
        engine._engine = guard
        for track in guard.tracks.values():  # it did not see the steps of the block before
            track.memory["weights"]["pending"] = None
        on.append(loop.block())
        engine._engine = None
        guard.look_again()
        off.append(loop.block())
    guard.flush()
    numel = sum(p.numel() for p in loop.net.parameters())
    bare = statistics.median(off)
    every = timed.full + timed.idle
    mean = statistics.mean(every) / 1e9
    print(
        f"{numel / 1e6:6.1f} M {len(list(loop.net.parameters())):3} tensors  {links:8}  bare {bare * 1e3:8.2f} ms  "
        f"own {mean * 1e3:6.3f} ms = {mean / bare:6.2%}  checked step {_micro(timed.full)}  "
        f"unchecked {_micro(timed.idle)}  checked {len(timed.full)}/{len(every)}  "
        f"blocks differ by {(statistics.median(on) / bare - 1):+.1%}  "
        f"{(sink.bytes - sent) / len(every):.0f} B a step in {sink.frames - frames} frames"
    )
    dear = sorted(timed.links.items(), key=lambda item: -item[1])[:6]
    print("        " + "  ".join(f"{name} {ns / len(every) / 1e3:.0f} us" for name, ns in dear))


def peers(million: int) -> None:
    """Anomaly mode, and a tracker's gradient logging, each by turns with the bare loop."""
    engine._engine = None
    loop = Loop(million)
    loop.block()
    bare, anomaly = [], []
    for _ in range(BLOCKS):
        bare.append(loop.block())
        with torch.autograd.detect_anomaly(check_nan=True):
            anomaly.append(loop.block())
    print(f"        anomaly mode {_ratio(anomaly, bare)}")
    try:
        import wandb
    except ImportError:
        print("        wandb.watch: skipped, wandb is not installed")
        return
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off"))
        bare, logged, watched = [], [], []
        for _ in range(BLOCKS):
            bare.append(loop.block())
            logged.append(loop.block(lambda: run.log({"loss": 1.0})))
            run.watch(loop.net, log="gradients", log_freq=1)
            watched.append(loop.block(lambda: run.log({"loss": 1.0})))
            run.unwatch(loop.net)
        run.finish()
    print(f"        wandb.log {_ratio(logged, bare)}, wandb.watch of gradients at every step {_ratio(watched, bare)}")


def _ratio(some: list[float], bare: list[float]) -> str:
    return f"{statistics.median(some) / statistics.median(bare) - 1:+.1%}"


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
        peers(size)
