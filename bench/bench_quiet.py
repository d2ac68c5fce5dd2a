"""Honest trainings under the whole product, lock to verdict: every finding here is a false alarm.

    python bench/bench_quiet.py [--seeds 3] [--only TEXT] [--long 2000] [--python PYTHON]

Each script of tests/scripts is locked and run guarded, once for each seed; its own last line, a digest of the weights,
is compared with a run without the guard. `--long` adds one run of that many steps. A line of one's own that writes to
weights (WGAN's clamp) is asked about once: it is approved, and the run repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[1] / "tests" / "scripts"
TWO_RANKS = ("ddp_two_ranks", "fsdp2_two_ranks")
LONG = "schedulers"


def environment(home: Path) -> dict[str, str]:
    """Ours without settings of trainguard; one home, so that caches are warm after the first run."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRAINGUARD_")}
    return env | {"TRAINGUARD_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def command(python: str, script: Path, *words: str) -> list[str]:
    """How a user starts it."""
    if script.stem in TWO_RANKS:
        return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *words]
    return [python, str(script), *words]


def last_digest(text: str) -> str:
    """The digest that a script prints of its weights."""
    lines = [line for line in text.splitlines() if "digest" in line]
    return lines[-1] if lines else ""


def one(python: str, script: Path, words: list[str], home: Path) -> dict[str, Any]:
    """Lock, run plain, run guarded; approve what is asked about once and run again."""
    with tempfile.TemporaryDirectory(prefix="quiet-") as folder:

        def call(*argv: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(argv, cwd=folder, env=environment(home), capture_output=True, text=True, timeout=1800)

        job = command(python, script, *words)
        guard = [python, "-m", "trainguard"]
        plain = call(*job)
        for path in Path(folder).iterdir():
            if path.is_file():
                path.unlink()
        approved: list[str] = []
        for _ in range(2):
            locked = call(*guard, "lock", *(f"--approve={each}" for each in approved), "--", *job)
            if locked.returncode not in (0,):
                return {
                    "verdict": "NO LOCK",
                    "findings": [locked.stderr.strip()[:200]],
                    "same": False,
                    "approved": approved,
                }
            done = call(*guard, "run", "--json", "--", *job)
            verdict = json.loads(done.stdout.splitlines()[-1])
            bad = [f for f in verdict["findings"] if f["outcome"] != "not_checked"]
            asks = [
                f"{f['check']}={f['subject']['path']}"
                for f in bad
                if f["outcome"] == "suspicious" and f["subject"]["path"]
            ]
            if approved or not asks:
                break
            approved = list(dict.fromkeys(asks))
        return {
            "verdict": verdict["verdict"],
            "findings": [f"{f['check']}: {f['message']}"[:200] for f in bad],
            "same": last_digest(plain.stdout) == last_digest(done.stdout) != "",
            "approved": approved,
            "steps": verdict["coverage"]["steps"],
            "blind": [link["link"] for link in verdict["links"] if link["blind"]],
            "reasons": verdict["reasons"],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--long", type=int, default=0, help="steps of one more run")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="quiet-home-"))
    jobs = [
        (script, ["--seed", str(seed)], seed)
        for script in sorted(SCRIPTS.glob("*.py"))
        for seed in range(args.seeds)
        if args.only in script.stem
    ]
    if args.long:
        jobs.append((SCRIPTS / f"{LONG}.py", ["--steps", str(args.long)], 0))
    alarms = 0
    print(f"{'script':22} {'seed':>4} {'steps':>6} {'verdict':9} {'same bits':9} approved, findings, blind links")
    for script, words, seed in jobs:
        row = one(args.python, script, words, home)
        alarms += len(row["findings"])
        rest = [*(f"approved {each}" for each in row["approved"]), *(f"FOUND {each}" for each in row["findings"])]
        rest += row["reasons"][:2] if row["verdict"] != "VERIFIED" and not row["findings"] else []
        rest += [f"blind in part: {', '.join(row['blind'])}"] if row.get("blind") else []
        same = "yes" if row["same"] else "NO"
        print(
            f"{script.stem:22} {seed:4} {row.get('steps', 0):6} {row['verdict']:9} {same:9} {'; '.join(rest)}",
            flush=True,
        )
    print(f"{len(jobs)} runs, {alarms} findings")
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
