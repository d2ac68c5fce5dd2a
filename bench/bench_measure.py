"""What it costs to measure this interpreter's own environment, as ratios to reading it with the usual tools.

    python bench/bench_measure.py [--rounds N]

One run, one machine: `find | xargs sha256sum` and a bare stat of every file are measured beside us, because seconds on
a shared machine mean little by themselves. CPU seconds include those of child processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trainguard.measure import measure

BUDGET_FILES = 33_000
BUDGET_COLD_CPU_S = 2.0
BUDGET_WARM_CPU_S = 0.45


def cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def best_of(rounds: int, action: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of the round that took the least CPU."""
    results = []
    for _ in range(rounds):
        cpu, wall = cpu_seconds(), time.perf_counter()
        action()
        results.append((cpu_seconds() - cpu, time.perf_counter() - wall))
    return min(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        job, state = Path(name) / "job", Path(name) / "state"
        job.mkdir()
        (job / "train.py").write_text("print(1)\n")
        command, env = [sys.executable, "train.py"], dict(os.environ)

        def cold() -> object:
            return measure(command, cwd=job, env=env, cache=None, read_flags=False)

        def warm() -> object:
            return measure(command, cwd=job, env=env, cache=state, read_flags=False)

        measurement = measure(command, cwd=job, env=env, cache=state, read_flags=False)
        roots = [tree.root for tree in measurement.trees.values() if tree.name.startswith(("stdlib", "site-packages"))]
        prune = ["-path", f"{roots[0]}/site-packages", "-prune", "-o"]
        find = ["find", *roots, *prune, "-type", "f", "-print0"]
        sums = f"{' '.join(find)} | xargs -0 sha256sum > /dev/null"
        count = subprocess.run(find, capture_output=True, check=True).stdout.count(b"\0")
        baseline = best_of(rounds, lambda: subprocess.run(["sh", "-c", sums], check=True))
        stats = best_of(
            rounds, lambda: subprocess.run([*find[:-1], "-printf", "%s%T@%C@"], check=True, capture_output=True)
        )
        cold_cost, warm_cost = best_of(rounds, cold), best_of(rounds, warm)
    share = BUDGET_FILES / (measurement.file_count + sum(len(tree.bytecode) for tree in measurement.trees.values()))
    rows = {"find | xargs sha256sum": baseline, "find -printf (stat only)": stats, "cold": cold_cost, "warm": warm_cost}
    print(f"{count} files on disk, {measurement.file_count} measured and {len(measurement.distributions)} packages")
    for label, (cpu, wall) in rows.items():
        print(f"  {label:26} {cpu:6.2f} CPU-s  {wall:6.2f} s   ×{cpu / baseline[0]:.2f} of sha256sum")
    print(
        json.dumps(
            {
                "bench": "measure",
                "cold_cpu_s_per_33k": round(cold_cost[0] * share, 3),
                "warm_cpu_s_per_33k": round(warm_cost[0] * share, 3),
                "cold_of_sha256sum": round(cold_cost[0] / baseline[0], 3),
                "warm_of_sha256sum": round(warm_cost[0] / baseline[0], 3),
                "budget_cold_cpu_s": BUDGET_COLD_CPU_S,
                "budget_warm_cpu_s": BUDGET_WARM_CPU_S,
            }
        )
    )


if __name__ == "__main__":
    main()
