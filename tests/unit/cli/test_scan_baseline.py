"""Baselines, and the files that bring the scan into pre-commit and GitHub Actions."""

from __future__ import annotations

import json
import os
import pickle
import re
import string
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from trainguard.cli.scan import command
from trainguard.errors import Misuse, Unavailable

ROOT = Path(__file__).parents[3]


def scan(*arguments: object) -> Result:
    """The verb, in this process; its own errors come through."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def unknown(path: Path, text: str = "a") -> Path:
    """A file that names what nobody vetted."""
    path.write_bytes(pickle.dumps(string.Template(text)))
    return path


def test_a_baseline_accepts_the_bytes_that_were_looked_at_and_no_others(tmp_path: Path) -> None:
    """Status 0 with it, 1 for a new file, 1 for the same name with other bytes."""
    models, baseline = tmp_path / "models", tmp_path / "baseline.json"
    models.mkdir()
    unknown(models / "a.pkl")
    assert scan(models).exit_code == 1
    assert scan(models, "--write-baseline", baseline).exit_code == 1
    entry = json.loads(baseline.read_text())["files"][0]
    assert entry["path"] == "a.pkl"
    assert "string.Template" in entry["what"][0]
    accepted = scan(models, "--baseline", baseline)
    assert accepted.exit_code == 0
    assert "accepted by the baseline: 1 unknown files" in accepted.output
    assert json.loads(scan(models, "--baseline", baseline, "--json").output)["accepted"] == ["a.pkl"]
    unknown(models / "b.pkl", "other bytes")
    assert scan(models, "--baseline", baseline).exit_code == 1
    (models / "b.pkl").rename(models / "a.pkl")
    assert scan(models, "--baseline", baseline).exit_code == 1


def test_a_baseline_never_accepts_what_is_unsafe_or_was_not_judged(tmp_path: Path) -> None:
    """Whatever somebody writes into it."""
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(os.mkdir))
    (tmp_path / "empty.pkl").touch()
    baseline = tmp_path / "baseline.json"
    for name, status in (("bad.pkl", 1), ("empty.pkl", 3)):
        scan(tmp_path / name, "--write-baseline", baseline)
        assert json.loads(baseline.read_text())["files"] == []
        assert scan(tmp_path / name, "--baseline", baseline).exit_code == status


def test_a_file_that_is_no_baseline_is_one_clear_sentence(tmp_path: Path) -> None:
    """Missing, not JSON, another schema, unknown fields, a digest that is none."""
    path = tmp_path / "baseline.json"
    with pytest.raises(Unavailable, match="baseline cannot be read: No such file"):
        scan(tmp_path, "--baseline", path)
    entry = {"path": "a", "sha256": "x", "reasons": "y", "what": []}
    for text in (
        "{",
        "\xff",
        '{"schema": "other", "files": []}',
        '{"schema": "trainguard/scan-baseline/v1", "files": [], "more": 1}',
        json.dumps({"schema": "trainguard/scan-baseline/v1", "files": [entry]}),
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(Misuse, match=r"baseline\.json: "):
            scan(tmp_path, "--baseline", path)
    with pytest.raises(Unavailable, match="cannot be written"):
        scan(unknown(tmp_path / "a.pkl"), "--write-baseline", tmp_path / "missing" / "b.json")


def test_the_pre_commit_hook_is_one_by_its_schema_and_sees_model_files() -> None:
    """Fields and types as pre-commit's documentation has them (creating new hooks)."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert {"id", "name", "entry", "language"} <= set(hook)
    assert set(hook) <= {"id", "name", "description", "entry", "language", "types", "files", "require_serial"}
    assert hook["language"] == "python"
    assert hook["entry"].split()[:2] == ["trainguard", "scan"]
    files = re.compile(hook["files"])
    for name in (
        "a.pt",
        "run/rng_state.pth",
        "M.SAFETENSORS",
        "dcp/.metadata",
        "dcp/__0_0.distcp",
        "a/training_args.bin",
    ):
        assert files.search(name), name
    for name in ("train.py", "README.md", "a.pt.txt", "metadata"):
        assert not files.search(name), name


def action() -> dict[str, Any]:
    """action.yml."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    return loaded


def test_the_action_is_one_by_its_schema_and_gives_the_shell_no_text_of_the_caller() -> None:
    """Fields as the metadata syntax has them; inputs come as environment variables, never inside `run`."""
    loaded = action()
    assert set(loaded) == {"name", "description", "author", "branding", "inputs", "outputs", "runs"}
    assert all({"description", "required", "default"} == set(value) for value in loaded["inputs"].values())
    assert all(isinstance(value["default"], str) for value in loaded["inputs"].values())
    assert all({"description", "value"} == set(value) for value in loaded["outputs"].values())
    assert loaded["runs"]["using"] == "composite"
    used = set(re.findall(r"inputs\.([a-z-]+)", (ROOT / "action.yml").read_text()))
    assert used == set(loaded["inputs"])
    for step in loaded["runs"]["steps"]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]


@pytest.mark.parametrize(("status", "more"), [(0, ""), (1, "base.json"), (3, "")])
def test_the_shell_step_of_the_action_passes_paths_and_status_on(tmp_path: Path, status: int, more: str) -> None:
    """With a stand-in for the scan and for the runner; a path with a command in it stays a path."""
    stand_in = tmp_path / "bin" / "trainguard"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >> {tmp_path}/arguments\necho report\nexit {status}\n')
    stand_in.chmod(0o755)
    (step,) = [step for step in action()["runs"]["steps"] if step.get("id") == "scan"]
    values = {
        "SCAN_PATHS": f"models/*.pt\n$(touch {tmp_path}/owned) ;x --trust=y",
        "SCAN_TIER": "training",
        "SCAN_FAIL_ON": "unknown",
        "SCAN_BASELINE": more,
        "SCAN_TRUST": "",
        "SCAN_SARIF": str(tmp_path / "out.sarif"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }
    assert set(values) - {"GITHUB_OUTPUT"} == set(step["env"])
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        env=values | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"},
        cwd=tmp_path,
        check=False,
        timeout=30,
    )
    assert done.returncode == status
    assert not (tmp_path / "owned").exists()
    assert (tmp_path / "out.sarif").read_text() == "report\n"
    assert (tmp_path / "output").read_text() == f"sarif={tmp_path}/out.sarif\nstatus={status}\n"
    first = (tmp_path / "arguments").read_text().splitlines()
    wanted = ["--baseline", more] if more else []
    paths = ["models/*.pt", "$(touch", f"{tmp_path}/owned)", ";x", "--trust=y"]
    options = ["scan", "--tier", "training", "--fail-on", "unknown", *wanted, "--sarif", "--", *paths]
    assert first[: len(options)] == options
