"""What link *truth* costs and how well honest gradients agree, over the honest scripts of tests/scripts.

    python bench/bench_truth.py [--steps N] [--every N] [SCRIPT …]

For each script: optimizer steps, how many were on tape, the largest and the median disagreement over √tensors
(docs/checks/truth.md gives the tolerance), findings of *truth* and *loss*, CPU of the thread in ms from the start of a
taped interval to the end of its replay (the job's own work in it included), and why steps were blind.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from trainguard.appraise.interface import Context
from trainguard.appraise.loss import Loss
from trainguard.appraise.truth import Truth
from trainguard.evidence import Evidence
from trainguard.policy import Policy
from trainguard.testing.guarded import run_guarded

SCRIPTS = Path(__file__).parents[1] / "tests" / "scripts"
USUAL = (
    "own_batch_gpt",
    "mlp_adadelta",
    "cnn_workers",
    "ema_swap",
    "schedulers",
    "gan_two_optimizers",
    "reinforce_loop",
)


def findings(records: list[Evidence]) -> int:
    """How many findings both checks give."""
    context = Context(run="bench", policy=Policy(), blob={}.__getitem__)
    count = 0
    for kind in (Truth, Loss):
        check = kind(context)
        count += sum(1 for record in records for _ in check.see(record))
        count += sum(1 for outcome in check.end() if hasattr(outcome, "outcome"))
    return count


def measure(script: str, steps: int, every: int) -> str:
    """One line of the table."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--steps", str(steps)]
    if script.endswith("two_ranks"):
        command[1:1] = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        records, done = run_guarded(
            command, cwd=folder, links="all", truth_every=every, env={"OMP_NUM_THREADS": "1"}, timeout_seconds=3600
        )
    if done.returncode:
        return f"{script:20s} failed: {done.stdout[-300:]}"
    frames = [r.body for r in records if r.kind == "step"]
    values: list[dict[str, Any]] = [body["truth"] for body in frames if "truth" in body]
    blind = Counter(value["blind"] for value in values if "blind" in value)
    made = [value for value in values if "blind" not in value]
    apart = [abs((v["plus"] + v["minus"]) / 2 - v["expected"]) / math.sqrt(v["tensors"]) for v in made]
    price = statistics.median([v["cost_ns"] / 1e6 for v in made] or [math.nan])
    found = findings(records)
    return (
        f"{script:20s} {len(frames):6d} {len(made):6d} {max(apart, default=math.nan):9.1e} "
        f"{statistics.median(apart or [math.nan]):9.1e} {found:8d} {price:8.1f}  {dict(blind)}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=USUAL)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=3)
    args = parser.parse_args()
    print("script                steps  taped   largest    median findings   CPU ms  blind")
    for script in args.scripts:
        print(measure(script, args.steps, args.every), flush=True)


if __name__ == "__main__":
    main()
