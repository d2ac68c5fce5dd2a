"""Audits of honest runs: every segment that differs here is a false alarm. And how often a drawing finds one bad act.

    python bench/bench_audits.py [--only TEXT] [--every 10] [--length 1] [--draws 12]

Each training is recorded with every check in its process off, and audited twice with the run's own environment: all
segments from the first step, and the later half from a sealed state. Prints one line for each audit and the sums.

`--draws N` then records one short run with a weight edited in three of its twenty segments (E4), audits it N times with
a budget of three segments, and sets how often an act was found beside the formula. The segment that is always replayed
is left out of both, since an attacker knows of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainguard.appraise.replay import detection
from trainguard.home import Home
from trainguard.replay.audit import Auditor, Options
from trainguard.replay.tasks import outcome_path, perform, write_outcome

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "scripts"
TRAININGS: dict[str, tuple[Path, tuple[str, ...]]] = {
    "charlm": (
        ROOT / "examples" / "charlm" / "train.py",
        (
            "--width",
            "64",
            "--layers",
            "2",
            "--context",
            "32",
            "--corpus",
            "100000",
            "--save-every",
            "50",
            "--steps",
            "400",
        ),
    ),
    "own_batch_gpt": (SCRIPTS / "own_batch_gpt.py", ("--steps", "400")),
    "cnn_workers": (SCRIPTS / "cnn_workers.py", ("--steps", "400")),
    "hf_trainer": (SCRIPTS / "hf_trainer.py", ("--steps", "300")),
    "lightning_fit": (SCRIPTS / "lightning_fit.py", ("--steps", "400")),
    "ddp_two_ranks": (SCRIPTS / "ddp_two_ranks.py", ("--steps", "600")),
}
"""Name → script, and words with `--steps N` last."""

EDIT = """
import sys, importlib.util
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            made = [0]
            def act(optimizer, args, kwargs):
                made[0] += 1
                if made[0] in STEPS:
                    weight = optimizer.param_groups[0]["params"][0]
                    with module.no_grad():
                        weight.view(-1)[5] += 0.05
            sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(act)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def edit(*after: int) -> str:
    """A start-up file that edits one weight after each of these steps."""
    return EDIT.replace("STEPS", repr(after))


SHORT = """
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
net = torch.nn.Linear(8, 3)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
for step in range(100):
    optimizer.zero_grad()
    net(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
"""


def trainguard(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Any verb there, without settings of ours."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TRAINGUARD_")}
    return subprocess.run(
        [sys.executable, "-m", "trainguard", *words],
        cwd=folder, env=plain | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"} | env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def record(folder: Path, script: str, words: tuple[str, ...], every: int, *, name: str = "r", **env: str) -> str | None:
    """Record a run; why it could not be, or None."""
    (folder / "policy.toml").write_text(f"points_every = {every}\nkills = 'off'\n")
    (folder / "train.py").write_text(script)
    options = ("--name", name, "--links", "none", "--policy", "policy.toml")
    done = trainguard(folder, "run", *options, "--", sys.executable, "train.py", *words, **env)
    return None if done.returncode == 0 else done.stderr[-400:]


def audit(folder: Path, *options: str) -> dict[str, Any]:
    """The report of one audit, with its exit status."""
    done = trainguard(folder, "audit", "r", "--json", *options)
    reports = sorted((folder / ".trainguard" / "audits" / "r").glob("*/report.json"), key=lambda p: p.stat().st_mtime)
    report: dict[str, Any] = json.loads(reports[-1].read_bytes()) if reports else {"results": [], "why": done.stderr}
    return report | {"status": done.returncode}


def clean(name: str, every: int, length: float) -> tuple[int, int, int]:
    """Segments equal, differing and not replayed, over both audits of one training."""
    script, words = TRAININGS[name]
    words = (*words[:-1], str(int(int(words[-1]) * length)))
    sums = [0, 0, 0]
    with tempfile.TemporaryDirectory(prefix="bench-audits-") as top:
        folder = Path(top)
        why = record(folder, script.read_text(), words, every)
        if why is not None:
            print(f"{name}: not recorded: {why}", flush=True)
            return 0, 0, 0
        total = 0
        for way in ("all", "half"):
            began = time.monotonic()
            chosen = "all" if way == "all" else ",".join(str(number) for number in range(total // 2, total))
            report = audit(folder, "--segments", chosen)
            results = report["results"]
            total = total or len(results)
            counts = [sum(r["outcome"] == kind for r in results) for kind in ("equal", "differs", "not replayed")]
            sums = [a + b for a, b in zip(sums, counts, strict=True)]
            ways = sorted({r["way"] for r in results})
            reasons = sorted({str(r["reason"]) for r in results if r["reason"]})[:2]
            seconds = time.monotonic() - began
            print(
                f"{name:14} {way:4} {counts[0]:3} equal {counts[1]} differ {counts[2]} not replayed, "
                f"by {'/'.join(ways)}, exit {report['status']}, {seconds:.0f} s {'; '.join(reasons)[:300]}",
                flush=True,
            )
    return sums[0], sums[1], sums[2]


class Once:
    """Performs tasks on this machine, each once: audits of one run ask for few different ones."""

    name = "local"
    ahead = False

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def perform(self, tasks: Any, folder: Path) -> None:
        for task in tasks:
            if task.id not in self.kept:
                self.kept[task.id] = perform(task)
            write_outcome(outcome_path(folder, task), self.kept[task.id])


EDITED = (34, 63, 89)
"""Steps at which the acts show."""


def draws(count: int) -> None:
    """How often a drawing finds three bad segments of twenty. Draw, comparison, confirmation and log are those of any
    audit; a replay that an earlier audit made already is not made again."""
    with tempfile.TemporaryDirectory(prefix="bench-audits-") as top:
        folder = Path(top)
        plant = folder / "plant"
        plant.mkdir()
        (plant / "sitecustomize.py").write_text(edit(*(step - 1 for step in EDITED)))
        why = record(folder, SHORT, (), 5, PYTHONPATH=str(plant))
        if why is not None:
            print(f"draws: not recorded: {why}")
            return
        os.chdir(folder)
        executor = Once()
        hits = found = wrong = 0
        for turn in range(count):
            auditor = Auditor(Home(folder / ".trainguard"), "r", Options(budget=0.15, explain_seconds=0.0))
            auditor._executor = executor
            report = auditor.run()
            chosen, segments = report.plan.chosen, report.plan.segments
            bad = {s.number for s in segments if any(s.first <= step <= s.last for step in EDITED)}
            hit = bool(bad & set(chosen))
            hits += hit
            found += report.exit_status == 1
            wrong += report.exit_status != (1 if hit else 0)
            print(f"draw {turn}: segments {sorted(chosen)} of {len(segments)}, exit {report.exit_status}", flush=True)
        chance = detection(len(segments) - 1, len(chosen) - 1, len(bad) / (len(segments) - 1))
        spread = (count * chance * (1 - chance)) ** 0.5
        print(
            f"draws: a bad segment drawn {hits} of {count} times, found {found}; formula {chance:.3f} each: "
            f"{count * chance:.1f} +- {spread:.1f}; audits whose exit status is not the draw's: {wrong}; "
            f"{len(executor.kept)} replays"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--every", type=int, default=10, help="steps between sealed states")
    parser.add_argument("--length", type=float, default=1.0, help="times the usual number of steps")
    parser.add_argument("--draws", type=int, default=0)
    args = parser.parse_args()
    sums = [0, 0, 0]
    for name in TRAININGS:
        if args.only in name:
            sums = [a + b for a, b in zip(sums, clean(name, args.every, args.length), strict=True)]
    print(f"all: {sums[0]} segments equal bit for bit, {sums[1]} differ (false alarms), {sums[2]} not replayed")
    if args.draws:
        draws(args.draws)


if __name__ == "__main__":
    main()
