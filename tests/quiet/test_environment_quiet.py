"""Honest changes of an environment that must not raise a finding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.appraise.environment import compare, intrinsic
from trainguard.lockfile import Lock, make_lock
from trainguard.measure import measure
from trainguard.policy import Policy
from trainguard.testing.installed import InstalledEnvironment

SCRIPT = "import helper, tinyoptim\nprint(tinyoptim.RATE, helper.SCALE)\n"
PACKAGES = {
    "tinyoptim": {"tinyoptim/__init__.py": "from tinyoptim.adamw import RATE\n", "tinyoptim/adamw.py": "RATE = 0.1\n"},
    "tinydata": {"tinydata.py": "ROWS = 3\n", "tinydata_init.pth": "import sys; sys.tinydata = True\n"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "cache"


def build(root: Path, names: list[str]) -> InstalledEnvironment:
    place = InstalledEnvironment(root)
    for name in names:
        place.install(name, "1.0", PACKAGES[name], scripts={f"{name}-run": "print(1)\n"})
    (place.job / "train.py").write_text(SCRIPT)
    (place.job / "helper.py").write_text("SCALE = 1\n")
    return place


def lock_of(place: InstalledEnvironment, cache: Path, command: list[str], **variables: str) -> Lock:
    measurement = measure(command, cwd=place.job, env=place.environment | variables, cache=cache, read_flags=False)
    return make_lock(measurement, ec.generate_private_key(ec.SECP256R1()), made="2026-11-22T00:00:00Z")


def findings(
    lock: Lock, place: InstalledEnvironment, cache: Path, command: list[str], **variables: str
) -> list[object]:
    found = measure(
        command,
        cwd=place.job,
        env=place.environment | variables,
        cache=cache,
        against=lock.measurement,
        read_flags=False,
    )
    return list(compare(lock, found, Policy()))


def test_an_environment_rebuilt_elsewhere_from_the_same_versions_is_silent(tmp_path: Path, cache: Path) -> None:
    """Other folders, order of installation, time stamps, first lines of scripts; bytecode written anew."""
    command = ["tinyoptim-run", "train.py"]
    first = build(tmp_path / "first", ["tinyoptim", "tinydata"])
    first.run("train.py")
    lock = lock_of(first, cache, command, PYTHONPATH=str(first.job))
    second = build(tmp_path / "second", ["tinydata", "tinyoptim"])
    for path in second.site.rglob("*.py"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    second.run("train.py")
    assert findings(lock, second, cache, command, PYTHONPATH=str(second.job)) == []


def test_another_installer_of_the_same_files_is_silent(tmp_path: Path, cache: Path) -> None:
    """uv writes other INSTALLER, REQUESTED and RECORD files than pip; the package is the same."""
    place = build(tmp_path, ["tinyoptim"])
    lock = lock_of(place, cache, ["python", "train.py"])
    info = next(place.site.glob("tinyoptim-*.dist-info"))
    (info / "INSTALLER").write_text("uv\n")
    (info / "REQUESTED").write_text("")
    (info / "direct_url.json").write_text("{}")
    (info / "RECORD").write_text("\n".join(reversed((info / "RECORD").read_text().splitlines())) + "\n")
    place.rewrite_records()
    assert findings(lock, place, cache, ["python", "train.py"]) == []


def test_a_folder_that_gained_what_a_run_writes_is_silent(tmp_path: Path, cache: Path) -> None:
    """Checkpoints, logs, metrics, bytecode, our own state, an experiment tracker's copy of the code."""
    place = build(tmp_path, ["tinyoptim"])
    command = ["python", "train.py", "--out_dir", "results", "--log-file=train.log"]
    lock = lock_of(place, cache, command)
    place.run("train.py")
    written = {
        "results/step-10.pt": "weights",
        "results/code/model.py": "print(1)\n",
        "checkpoints/step-20/config.json": "{}",
        "checkpoints/step-20/model.safetensors": "weights",
        "wandb/run-1/files/code/train.py": SCRIPT,
        "lightning_logs/version_0/hparams.yaml": "lr: 1\n",
        ".trainguard/runs/x/spool": "",
        "metrics.json": "{}",
        "loss.csv": "1,2\n",
        "train.log": "step 1\n",
        "out.txt": "done\n",
        "events.out.tfevents.1": "x",
    }
    for path, text in written.items():
        (place.job / path).parent.mkdir(parents=True, exist_ok=True)
        (place.job / path).write_text(text)
    assert findings(lock, place, cache, command) == []


def test_what_earlier_runs_wrote_may_be_rewritten_where_nothing_is_tracked(tmp_path: Path, cache: Path) -> None:
    """No version control, no declared output: the usual names of what a run writes."""
    place = build(tmp_path, ["tinyoptim"])
    names = (
        "results/run.json",
        "checkpoint-10/config.json",
        "metrics.json",
        "trainer_state.json",
        "logs/a.yaml",
        "loss.csv",
    )
    for text in ("{}", '{"step": 1}'):
        for name in names:
            (place.job / name).parent.mkdir(exist_ok=True)
            (place.job / name).write_text(text)
        if text == "{}":
            lock = lock_of(place, cache, ["python", "train.py"])
    assert findings(lock, place, cache, ["python", "train.py"]) == []


def test_files_that_git_does_not_track_may_be_rewritten_by_every_run(tmp_path: Path, cache: Path) -> None:
    """A summary in JSON and a table beside the code, present when the lock was made."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    place = build(tmp_path, ["tinyoptim"])
    git = ["git", "-c", "user.name=victim-a", "-c", "user.email=victim-a@example.org", "-C", str(place.job)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "approved"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    (place.job / "trainer_state.json").write_text("{}")
    (place.job / "table.csv").write_text("1\n")
    lock = lock_of(place, cache, ["python", "train.py"])
    (place.job / "trainer_state.json").write_text('{"step": 1}')
    (place.job / "table.csv").write_text("1\n2\n")
    assert findings(lock, place, cache, ["python", "train.py"]) == []


def test_variables_that_tell_ranks_devices_and_credentials_apart_are_silent(tmp_path: Path, cache: Path) -> None:
    """Another node, another GPU, a new token."""
    place = build(tmp_path, ["tinyoptim"])
    lock = lock_of(place, cache, ["python", "train.py"], RANK="0", HF_TOKEN="one", CUDA_VISIBLE_DEVICES="0")
    variables = {
        "RANK": "7",
        "LOCAL_RANK": "7",
        "MASTER_ADDR": "node-2",
        "HF_TOKEN": "two",
        "CUDA_VISIBLE_DEVICES": "7",
        "PYTHONUNBUFFERED": "1",
        "SLURM_JOB_ID": "12",
        "TERM": "xterm",
    }
    assert findings(lock, place, cache, ["python", "train.py"], **variables) == []


def test_the_guards_own_folder_on_pythonpath_is_no_part_of_the_job(tmp_path: Path, cache: Path) -> None:
    """A restart is measured from inside a guarded environment."""
    from trainguard.measure.interpreter import boot_folder

    place = build(tmp_path, ["tinyoptim"])
    lock = lock_of(place, cache, ["python", "train.py"])
    assert findings(lock, place, cache, ["python", "train.py"], PYTHONPATH=boot_folder()) == []


def test_a_lock_made_on_this_environment_holds_and_nothing_in_it_is_odd(tmp_path: Path, cache: Path) -> None:
    """The environment that runs these tests: torch, transformers and lightning as their wheels come."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "train.py").write_text("import torch\n")
    measured = measure([sys.executable, "train.py"], cwd=tmp_path / "job", cache=cache, read_flags=False)
    assert [finding.message for finding in intrinsic(measured) if "environment variable" not in finding.message] == []
    lock = make_lock(measured, ec.generate_private_key(ec.SECP256R1()), made="2026-11-22T00:00:00Z")
    again = measure([sys.executable, "train.py"], cwd=tmp_path / "job", cache=cache, against=measured, read_flags=False)
    differing = [f for f in compare(lock, again, Policy()) if f.outcome != "not_checked"]
    # This project's own checkout is on the path (editable) and may be edited while its tests run.
    assert [f.message for f in differing if not str(f.subject.path).startswith("path:pth:")] == []
