"""This scan and three others on the same files in one run: what each finds, how often it cries wolf, what it costs.

    sh tools/peers.sh .venv-tools/peers                        # once: picklescan, modelscan, fickling
    python bench/bench_peers.py [--peers .venv-tools/peers/bin] [--every 1] [--names]

Forged files are those of `trainguard.testing.forge` that are model files and are live: loading them runs their payload
(tests/attacks/test_checkpoint_code.py proves it). Real files are weights and training state that torch, numpy, joblib,
safetensors and DCP really wrote (tests/helpers/real_files.py). Each tool reads each file in a process of its own, at
its defaults; its exit status is its word: 1 is an alarm, 0 is clean, anything else (unsupported, an error, a crash, a
time-out) is neither. fickling's command reads no zips, so its `scan_file` and `scan_zip_archive` are called. CPU is
user + system of all those processes, memory the largest peak. A peer that is not installed is skipped and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from trainguard.testing.forge import forge

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-tools" / "peers" / "bin"
LIMIT_SECONDS = 60
MODEL_LOADERS = ("pickle", "pickle-all", "torch", "torch-first", "joblib", "numpy", "npz", "dcp")

PEAK = """
import resource, subprocess, sys
try:
    status = subprocess.run(sys.argv[2:], stdout=-3, stderr=-3, timeout=float(sys.argv[1])).returncode
except subprocess.TimeoutExpired:
    status = 124
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, status)
"""
"""A small process between, so that the child's peak is not hidden by the size of this one."""

OURS = "import sys; from trainguard.cli import main; sys.exit(main(sys.argv[1:]))"
FICKLING = """
import sys, zipfile
from fickling.loader import scan_file, scan_zip_archive
path = sys.argv[1]
found = list(scan_zip_archive(path).values()) if zipfile.is_zipfile(path) else [scan_file(path)]
sys.exit(0 if found and all(one.is_safe for one in found) else 1)
"""


@dataclass(slots=True)
class Tally:
    """What one tool said of one set, and what it cost."""

    said: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0
    peak_mebibytes: float = 0.0
    passed: list[str] = field(default_factory=list)
    """Names of files called clean."""
    alarms: list[str] = field(default_factory=list)


def tools(peers: Path) -> dict[str, list[str]]:
    """Tool → command; the path follows."""
    commands = {"trainguard": [sys.executable, "-c", OURS, "scan", "--quiet"]}
    for name, arguments in {
        "picklescan": ["picklescan", "-p"],
        "picklescan --strict": ["picklescan", "--strict", "-p"],
        "modelscan": ["modelscan", "-p"],
    }.items():
        if found := shutil.which(arguments[0], path=str(peers)):
            commands[name] = [found, *arguments[1:]]
    if shutil.which("fickling", path=str(peers)):
        commands["fickling"] = [str(peers / "python"), "-c", FICKLING]
    return commands


def version(peers: Path, name: str) -> str:
    """The installed release, as its metadata says."""
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([peers / "python", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "?"


def run(command: list[str], path: Path, tally: Tally, name: str) -> None:
    """One tool on one file."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(LIMIT_SECONDS), *command, str(path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, mebibytes, status = done.stdout.split()
    word = {"0": "clean", "1": "alarm"}.get(status, "neither")
    tally.said[word] += 1
    tally.cpu_seconds += float(seconds)
    tally.peak_mebibytes = max(tally.peak_mebibytes, float(mebibytes))
    if word != "neither":
        (tally.passed if word == "clean" else tally.alarms).append(name)


def forged_files(folder: Path) -> dict[str, Path]:
    """Live forgeries that are model files, by name."""
    (folder / "markers").mkdir(parents=True)
    made = forge(folder / "forged", folder / "markers" / "m")
    return {case.name: case.path for case in made if case.live and case.loader in MODEL_LOADERS}


def real_files(folder: Path) -> dict[str, Path]:
    """Weights and training state as libraries write them, by path."""
    helper = _module(ROOT / "tests" / "helpers" / "real_files.py")
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("WEIGHTS", "TRAINING"):
            helper.make_all(folder / name.lower(), getattr(helper, name))
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Make the files, run the tools, print a table; 1 when we let a forgery pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=PEERS, help="bin folder of a virtual environment with peers")
    parser.add_argument("--every", type=int, default=1, help="only every N-th file of each set")
    parser.add_argument("--names", action="store_true", help="name the forgeries called clean and the false alarms")
    options = parser.parse_args()
    commands = tools(options.peers)
    if len(commands) == 1:
        print(f"no peers in {options.peers}: sh tools/peers.sh {options.peers.parent}")
    results: dict[str, tuple[Tally, Tally]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sets = [forged_files(Path(scratch) / "f"), real_files(Path(scratch) / "r")]
        sets = [dict(list(files.items())[:: options.every]) for files in sets]
        for tool, command in commands.items():
            results[tool] = (Tally(), Tally())
            for files, tally in zip(sets, results[tool], strict=True):
                for name, path in files.items():
                    run(command, path, tally, name)
            print_row(tool, results[tool], options)
        print(f"{len(sets[0])} live forgeries, {len(sets[1])} real files of weights and training state")
    return 1 if results["trainguard"][0].passed else 0


def print_row(tool: str, tallies: tuple[Tally, Tally], options: argparse.Namespace) -> None:
    """One row of the table; the first prints its head."""
    if tool == "trainguard":
        print("| tool | forged: alarm / neither / clean | real: clean / neither / alarm | CPU-s a file | peak MiB |")
        print("|---|---|---|---|---|")
    forged, real = tallies
    count = sum(forged.said.values()) + sum(real.said.values())
    release = "" if tool == "trainguard" else " " + version(options.peers, tool.split()[0])
    print(
        f"| {tool}{release} | {forged.said['alarm']} / {forged.said['neither']} / {forged.said['clean']} "
        f"| {real.said['clean']} / {real.said['neither']} / {real.said['alarm']} "
        f"| {(forged.cpu_seconds + real.cpu_seconds) / count:.2f} "
        f"| {max(forged.peak_mebibytes, real.peak_mebibytes):.0f} |",
        flush=True,
    )
    if options.names:
        print("  forged, called clean:", ", ".join(forged.passed) or "none")
        print("  real, alarms:", ", ".join(real.alarms) or "none", flush=True)


if __name__ == "__main__":
    sys.exit(main())
