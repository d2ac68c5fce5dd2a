"""What the load gate costs a process: per file it opens, per name an unpickler resolves, and per checkpoint.

    python bench/bench_loads.py

Each figure stands beside the same call without the gate, in the same run. CPU time of the calling thread. The other
side is a thread of this process, not another process as in `trainguard run`: so the time spent waiting is overstated.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainguard.cli._gate import Gate
from trainguard.home import Home
from trainguard.policy import Policy
from trainguard.watch import audit, loads

COUNT = 2000
TRIALS = 5


class Client:
    """Nobody listens."""

    settings: dict[str, Any]

    def send(self, kind: str, body: dict[str, Any], step: int | None = None) -> None:
        """Nothing."""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_bytes(b"label 1\n" * 500)
        for number in range(COUNT):
            (folder / f"{number}.pkl").write_bytes(pickle.dumps({"step": number}))
        for mode in ("log", "stop"):
            gate = Gate(Home(folder / "state"), "bench", Policy(load=mode), lambda *_, **__: None, lambda _: False)
            gate.start()
            state = loads.Loads(Client(), gate.settings)  # type: ignore[arg-type]
            bench(folder, state, mode)
            gate.close()
            print(f"{mode}: outside, {gate._spent / COUNT * 1e6:.0f} µs of CPU for each file vetted")


def bench(folder: Path, state: loads.Loads, mode: str) -> None:
    """One policy."""
    text = str(folder / "text")

    def plain() -> None:
        os.close(os.open(text, os.O_RDONLY))

    opened = best(lambda: [plain() for _ in range(COUNT)])
    hooked = best(lambda: [(plain(), state.on_open((text, "rb", os.O_RDONLY))) for _ in range(COUNT)])
    print(f"{mode}: a file that is no model: open {opened:.1f} µs, the gate adds {hooked - opened:.1f} µs")
    named = best(lambda: [state.on_find_class(("collections", "OrderedDict")) for _ in range(COUNT)])
    print(f"{mode}: a name an unpickler resolves: {named:.2f} µs")
    before, wall = time.thread_time(), time.perf_counter()
    for number in range(COUNT):
        state.on_open((str(folder / f"{number}.pkl"), "rb", os.O_RDONLY))
    spent, passed = time.thread_time() - before, time.perf_counter() - wall
    print(f"{mode}: a new small pickle: {spent / COUNT * 1e6:.0f} µs of CPU, {passed / COUNT * 1e6:.0f} µs of waiting")


def best(action: Callable[[], object]) -> float:
    """Least microseconds of CPU for one of COUNT."""
    times = []
    for _ in range(TRIALS):
        before = time.thread_time()
        action()
        times.append(time.thread_time() - before)
    return min(times) / COUNT * 1e6


if __name__ == "__main__":
    audit.install(lambda place, error: sys.exit(f"{place}: {error!r}"))
    main()
