"""The boot: each part of the inner half stands alone; what cannot be loaded is told, and the rest works on."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from tests.helpers.recorded import context
from tests.helpers.watched import cache_folder, training, write

from trainguard.appraise.processes import Processes
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.testing import guarded
from trainguard.testing.guarded import run_guarded

INNER = guarded.BOOT.parent


def run_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, torch: bool = True, **broken: str
) -> tuple[list[Evidence], str]:
    """Records and output of a small training job under a copy of the inner half in which files are broken."""
    inner = tmp_path / "guard" / "watch"
    shutil.copytree(INNER, inner, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in broken.items():
        (inner / f"{name}.py").write_text(text)
    monkeypatch.setattr(guarded, "BOOT", inner / "boot")
    write(tmp_path, {"train.py": training(steps=3) if torch else "print('digest')"})
    records, done = run_guarded([sys.executable, "train.py"], cwd=tmp_path, cache=cache_folder(), links="all")
    assert done.returncode == 0, done.stdout
    return records, done.stdout


def unloaded(records: list[Evidence]) -> list[Finding]:
    check = Processes(context())
    findings = [finding for record in records for finding in check.see(record)]
    return [finding for finding in findings if "could not be loaded" in finding.message]


@pytest.mark.torch
def test_broken_files_cost_only_what_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link and a part of the boot are gone; the job runs, the other links speak, and the record names both."""
    records, _ = run_with(tmp_path, monkeypatch, weights="def (", children="raise ImportError('gone')")
    found = unloaded(records)
    assert {finding.outcome for finding in found} == {"not_checked"}
    assert any("part weights " in finding.message and "SyntaxError" in finding.message for finding in found)
    assert any("part children " in finding.message and "gone" in finding.message for finding in found)
    steps = [record.body for record in records if record.kind == "step"]
    assert len(steps) == 3
    assert "optimizer" in steps[0]
    assert any(record.kind == "code" for record in records)


@pytest.mark.torch
def test_without_its_engine_the_guard_still_tells_what_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step can be seen, and the record says why."""
    records, _ = run_with(tmp_path, monkeypatch, governor="1 / 0")
    assert any(
        "part engine" in finding.message and "ZeroDivisionError" in finding.message for finding in unloaded(records)
    )
    assert not [record for record in records if record.kind == "step"]
    assert any(record.kind == "code" for record in records)


def test_an_inner_half_that_cannot_be_loaded_at_all_still_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very client is broken: the boot file alone says hello, why, and goodbye."""
    records, output = run_with(tmp_path, monkeypatch, torch=False, client="def (")
    (found,) = unloaded(records)
    assert "SyntaxError" in found.message
    assert "digest" in output
