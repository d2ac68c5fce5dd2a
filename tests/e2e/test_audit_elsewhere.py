"""Audits in another environment and on another build, through the command line, with real trainings."""

from __future__ import annotations

import importlib.util
import json
import marshal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.e2e.test_audit import POLICY, SCRIPT, trainguard
from tests.helpers.environments import torch_environment

from trainguard.archive import LogLeaves
from trainguard.home import Home
from trainguard.replay.numerics import calibrate, find, store
from trainguard.replay.tolerance import Calibration, Variation
from trainguard.watch.commits import processor

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500)]

FLIP = """
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
            sys.modules["torch.optim.optimizer"].register_optimizer_step_pre_hook(act)
        spec.loader.exec_module = exec_module
        return spec
made = [0]
def act(optimizer, args, kwargs):
    made[0] += 1
    if made[0] == 13:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.ACT
sys.meta_path.insert(0, Finder())
"""


def recorded(folder: Path, python: str, *, act: str | None = None) -> None:
    """A run of 24 steps, sealed after every eighth."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(SCRIPT)
    (folder / "policy.toml").write_text(POLICY)
    env: dict[str, str] = {}
    if act is not None:
        (folder.parent / "plant").mkdir(exist_ok=True)
        (folder.parent / "plant" / "sitecustomize.py").write_text(FLIP.replace("ACT", act))
        env = {"PYTHONPATH": str(folder.parent / "plant")}
    words = ("run", "--name", "r", "--links", "none", "--policy", "policy.toml", "--", python, "train.py", "out")
    done = trainguard(folder, *words, env=env)
    assert done.returncode == 0, done.stderr


def audit(folder: Path, *options: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Exit status, verdict, and the report in the blobs."""
    done = trainguard(folder, "audit", "r", "--json", *options)
    assert done.returncode in (0, 1, 3), done.stderr
    home = Home(folder / ".trainguard")
    report = msgspec.json.decode(home.blob(LogLeaves(home).audits["r"][-1]["report"]))
    return done.returncode, json.loads(done.stdout), report


def test_only_an_environment_that_is_as_the_lock_approves_raises_the_level(tmp_path: Path) -> None:
    """Another environment with one file changed is refused and named; a clean one gives TIL-3."""
    own, clean = torch_environment(tmp_path / "own"), torch_environment(tmp_path / "clean")
    job = tmp_path / "job"
    job.mkdir()
    (job / "train.py").write_text(SCRIPT)
    assert trainguard(job, "lock", "--quiet", "--", str(own), "train.py", "out").returncode == 0
    recorded(job, str(own))
    victim = next((tmp_path / "clean" / "lib").glob("*/site-packages/filelock/__init__.py"))
    text = victim.read_text()
    victim.unlink()  # the other name of the same file stays as it is
    victim.write_text(text + "\n")
    status, verdict, report = audit(job, "--segments", "0", "--env", str(clean))
    assert (status, verdict["level"], verdict["coverage"]["replayed_steps"]) == (3, "TIL-1", 0)
    assert any("filelock/__init__.py" in line for line in report["environment"]["differences"])
    assert report["findings"] == []
    victim.write_text(text)
    status, verdict, report = audit(job, "--segments", "0,2", "--env", str(clean))
    assert (status, verdict["level"], verdict["coverage"]["replayed_steps"]) == (0, "TIL-3", 16)
    assert report["environment"]["approved"] is True
    status, verdict, report = audit(job, "--segments", "0,1", "--env", str(own))
    assert (status, report["environment"]["apart"], report["environment"]["approved"]) == (0, False, False)
    assert (verdict["level"], verdict["coverage"]["replayed_steps"]) == ("TIL-3", 16), "it neither adds nor takes away"


SEEDED = """
_plain = manual_seed
def manual_seed(seed):
    return _plain(int(seed) + 1)
"""


def test_a_shared_torch_that_was_edited_is_found_from_a_clean_environment(tmp_path: Path) -> None:
    """S3 by audit alone: the run's torch seeds with another number, and its RECORD may say what it likes. Replayed in
    the same environment all is equal, and that raises no level (G8); in a clean one the first step is other."""
    own, clean = torch_environment(tmp_path / "own"), torch_environment(tmp_path / "clean")
    victim = next((tmp_path / "own" / "lib").glob("*/site-packages/torch/random.py"))
    text = victim.read_text()
    victim.unlink()  # the other name of the same file stays as it is
    victim.write_text(text + SEEDED)
    job = tmp_path / "job"
    recorded(job, str(own))
    status, verdict, report = audit(job, "--segments", "0", "--no-explain")
    assert (status, verdict["level"], report["environment"]["apart"]) == (0, "TIL-1", False)
    status, verdict, report = audit(job, "--segments", "0", "--env", str(clean), "--no-explain")
    assert (status, verdict["verdict"]) == (1, "TAINTED")
    (finding,) = report["findings"]
    assert (finding["subject"]["step"], finding["techniques"][0]) == (1, "D1")


def test_bytecode_that_was_replaced_beside_its_source_never_runs(tmp_path: Path) -> None:
    """S4: source, times and RECORD are right, only the .pyc is another. A guarded job and its replay compile the
    source themselves, so the run is that of the source, to the bit."""
    own, clean = torch_environment(tmp_path / "own"), torch_environment(tmp_path / "clean")
    source = next((tmp_path / "own" / "lib").glob("*/site-packages/torch/random.py"))
    times = source.stat()
    bad = compile(source.read_text() + SEEDED, str(source), "exec")
    target = source.parent / "__pycache__" / f"random.{sys.implementation.cache_tag}.pyc"
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    head = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, int(times.st_mtime), times.st_size)
    target.write_bytes(head + marshal.dumps(bad))
    plain = [str(own), "-c", "import torch; print(torch.manual_seed(0).initial_seed())"]
    assert subprocess.run(plain, capture_output=True, text=True, check=True).stdout.strip() == "1", "the plant works"
    job = tmp_path / "job"
    recorded(job, str(own))
    status, _, report = audit(job, "--segments", "0", "--env", str(clean))
    assert (status, report["findings"]) == (0, [])


def wrapped(folder: Path) -> str:
    """A Python that stands for another machine: no vector instructions."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    other = "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE"
    python.write_text(f'#!/bin/sh\n{other} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def calibrated(folder: Path) -> None:
    """As `doctor --numerics` measured it on one machine: the calmest of its references."""
    import torch

    told = {"convolution": {"1": 2e-7, "10": 2e-6, "50": 1e-5}}
    kinds = {"threads": {"OMP_NUM_THREADS": "2"}, "instructions": {"MKL_CBWR": "AVX2"}}
    variations = tuple(
        Variation(name=kind, kind=kind, settings=settings, changes=True, weights=told, gradients=told)
        for kind, settings in kinds.items()
    )
    machine = {"cpu": processor(), "torch": str(torch.__version__)}
    store(
        Home(folder / ".trainguard"),
        Calibration(machine=machine, made="2026", steps=(1, 10, 50), variations=variations),
    )


def test_an_honest_run_on_another_build_is_not_accused(tmp_path: Path) -> None:
    """Without a calibration it cannot be told; with one it is equal within tolerance, or cannot be told."""
    job, python = tmp_path / "job", wrapped(tmp_path / "other")
    recorded(job, sys.executable)
    status, verdict, report = audit(job, "--segments", "1", "--env", python)
    if report["results"][0].get("reading") is None and status == 0:
        pytest.skip("this processor gives the same bits either way")
    assert status == 3
    assert "doctor --numerics" in report["results"][0]["reason"]
    calibrated(job)
    status, verdict, report = audit(job, "--segments", "1", "--env", python, "--limit", "3000")
    assert (status, report["findings"]) == (0, [])
    assert report["results"][0]["reading"]["undetectable"] < 0.05
    assert any("within its tolerance" in reason for reason in verdict["reasons"])


@pytest.mark.parametrize("act", ["neg_()", "mul_(1.5)"])
def test_an_act_is_beyond_the_tolerance_of_another_build(tmp_path: Path, act: str) -> None:
    """One gradient of eight turned, or scaled: suspicious, never proved there, and the proof is named."""
    job, python = tmp_path / "job", wrapped(tmp_path / "other")
    recorded(job, sys.executable, act=act)
    calibrated(job)
    status, verdict, report = audit(job, "--segments", "1", "--env", python)
    assert status == 3
    (finding,) = report["findings"]
    assert finding["outcome"] == "suspicious"
    assert "a replay on the run's own build proves" in finding["message"]
    assert verdict["verdict"] == "SUSPECT"


def test_a_machine_is_calibrated_by_real_reference_trainings(tmp_path: Path) -> None:
    """Another number of threads and lower instructions change few last bits; the file is found again for this build."""
    variations = (
        ("2 threads", "threads", {"OMP_NUM_THREADS": "2"}, ()),
        ("none", "instructions", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, ()),
    )
    made = calibrate(workloads=("transformer",), steps=(1, 4), variations=variations)
    for each in made.variations:
        assert all(0 <= share < 1e-2 for share in each.weights["transformer"].values())
    home = Home(tmp_path / "state")
    store(home, made)
    assert find(home, made.machine) == made
    assert find(home, {"cpu": "another", "torch": made.machine["torch"]}) is None
