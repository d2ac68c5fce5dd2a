"""What committing to every step costs: CPU time and bytes a step, and what one replay point costs.

    python bench/bench_replay.py [1 10 100]
    python bench/bench_replay.py --run 1000        what replaying costs, on a whole run of so many steps

For transformer-like models of about 1, 10, 100 million parameters, AdamW with clipping, batches of 16 x 64 positions.
Prints the CPU of a bare step, what link *commits* adds when a step commits to everything and when it is lean (CPU time
of the training thread around the link alone, so a busy machine changes the shares little), the bytes of its value, and
bytes and CPU of a point.

With --run: tests/scripts/own_batch_gpt.py alone, and recorded, where the first run in a folder makes bytecode of its
own and measures the environment; then with a weight edited once at three quarters; the segment in its middle replayed
by warp and from the first step; an audit with the default budget; and `audit --bisect`, which has to name the exact
step. CPU seconds of everything that was started, since wall time says what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_audits import SCRIPTS, audit, edit, record
from torch import nn

from trainguard.home import Home
from trainguard.replay import plan
from trainguard.replay.audit import Auditor, Options
from trainguard.replay.tasks import perform
from trainguard.watch import commits, engine, points

WIDTHS = {1: (4, 144), 10: (6, 376), 100: (8, 1024)}
"""Millions of parameters → blocks, width."""
STEPS = {1: 14, 10: 14, 100: 5}
"""Millions of parameters → steps of each kind."""


class Sink:
    """Counts the bytes of link *commits* in frames as the client would send them."""

    def __init__(self, folder: str, steps: int) -> None:
        self.settings: dict[str, Any] = {"key": "5a" * 32, "links": "none", "commits": True, "points": folder}
        self.settings |= {"points_at": [steps + 1]}
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
    (blocks, width), steps = WIDTHS[millions], STEPS[millions]
    net = nn.Sequential(*(Block(width) for _ in range(blocks)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    batch = torch.randn(1024, width)
    folder = tempfile.mkdtemp(prefix="bench-replay-")
    sink = Sink(folder, steps)
    engine.attach(sink)  # type: ignore[arg-type]  # the stand-in has what the engine uses
    (link,) = engine.current().links  # type: ignore[union-attr]
    spent = timed(link)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    bare = []
    for number in range(2 * steps):
        lean = number >= steps
        link.thorough = not lean
        share = commits.LEAN if lean else commits.EVERYTHING
        link._share = lambda *_step, share=share: share
        if number == steps:
            sink.settings["points_at"] = []
        spent.clear()
        began = time.thread_time()
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        whole, own = time.thread_time() - began, sum(spent)
        if number not in (0, steps):
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
        f"everything {1e3 * full:6.2f} ms ({full / step:.2%}), {statistics.median(sink.sizes[1:steps]):.0f} bytes; "
        f"lean {1e3 * lean_s:6.2f} ms ({lean_s / step:.2%}), {statistics.median(sink.sizes[steps + 1 :]):.0f} bytes; "
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


POINTS_EVERY = 50


def of_a_run(steps: int) -> None:
    """What replaying costs, beside what the run cost."""
    source = (SCRIPTS / "own_batch_gpt.py").read_text()
    at = steps * 3 // 4
    with tempfile.TemporaryDirectory(prefix="bench-replay-") as top:
        folder, plant = Path(top) / "work", Path(top) / "plant"
        folder.mkdir()
        plant.mkdir()
        (plant / "sitecustomize.py").write_text(edit(at))
        (folder / "train.py").write_text(source)
        words = ("--steps", str(steps))
        command = [sys.executable, "train.py", *words, "--out", str(Path(top) / "alone")]
        _, alone = took(lambda: subprocess.run(command, cwd=folder, check=True, capture_output=True))
        short = [*command[:3], "20", *command[4:]]
        _, bare = took(lambda: subprocess.run(short, cwd=folder, check=True, capture_output=True))
        for name in ("first", "second"):
            _, spent = took(lambda name=name: record(folder, source, ("--steps", "20"), POINTS_EVERY, name=name))  # type: ignore[misc]
            print(f"20 steps: alone {bare:.1f} s CPU; recorded, {name} run in this folder {spent:.1f} s", flush=True)
        why, recorded = took(lambda: record(folder, source, words, POINTS_EVERY, PYTHONPATH=str(plant)))
        if why is not None:
            sys.exit(f"not recorded: {why}")
        print(f"{steps} steps: alone {alone:.0f} s CPU; recorded with --links none {recorded:.0f} s", flush=True)
        for way, reached, seconds in replays(folder):
            print(
                f"middle segment by {way}: {reached}, {seconds:.1f} s CPU, {seconds / alone:.0%} of the run", flush=True
            )
        report, seconds = took(lambda: audit(folder))
        outcomes = [result["outcome"] for result in report["results"]]
        print(f"audit, budget 1 %: {len(outcomes)} segments, {outcomes}, {seconds:.1f} s CPU, {seconds / alone:.0%}")
        began = time.monotonic()
        report, seconds = took(lambda: audit(folder, "--bisect"))
        bad = next((each for each in report["results"] if each["outcome"] == "differs"), {})
        step, cause = bad.get("difference", {}).get("step"), (bad.get("cause") or {}).get("words")
        print(
            f"audit --bisect: step {step} (edited after step {at}; seen from {at + 1}), {cause}; {seconds:.1f} s CPU "
            f"({seconds / alone:.0%} of the run), {time.monotonic() - began:.0f} s on this machine"
        )


def replays(folder: Path) -> list[tuple[str, str, float]]:
    """(way, what came of it, CPU seconds) of the segment in the middle, replayed in both ways."""
    auditor = Auditor(Home(folder / ".trainguard"), "r", Options())
    _, auditor._committed = auditor._read()
    auditor._command, auditor._numeric = auditor._words(), {}
    perform(auditor._selftest_task())  # the first replay in a folder compiles the libraries once
    everything = plan.segments(auditor._committed)
    group = [everything[len(everything) // 2]]
    told = []
    for way, task in (
        ("warp", auditor._task_of(group, points=auditor._points(group[0]))),
        ("start", auditor._task_of(group)),
    ):
        outcome, seconds = took(lambda task=task: perform(task))  # type: ignore[misc]
        found = outcome.rerun()
        landed = "landed" if found.landed else f"not warped ({found.unsound or 'from the first step'})"
        told.append((way, f"steps {group[0].first} to {found.reached}, {landed}", seconds))
    return told


def took(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and CPU seconds of the processes that it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("millions", type=int, nargs="*", help="of 1, 10, 100")
    parser.add_argument("--run", type=int, metavar="STEPS", help="measure a whole run of so many steps instead")
    options = parser.parse_args()
    if options.run is not None:
        of_a_run(options.run)
        return
    torch.set_num_threads(1)
    for millions in options.millions or [1, 10]:
        print(measure(millions), flush=True)


if __name__ == "__main__":
    main()
