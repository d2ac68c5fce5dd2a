"""Honest scripts under watch: no finding of the inventory checks, and bit for bit the same result as without."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.watched import digest_line, plain, training, watch, write

from trainguard.appraise.code import Code
from trainguard.appraise.deferred import Deferred
from trainguard.appraise.dispatch import Dispatch
from trainguard.appraise.hooks import Hooks
from trainguard.appraise.inputs import Inputs
from trainguard.appraise.interface import Check
from trainguard.appraise.modules import Modules
from trainguard.appraise.surface import Surface

CHECKS: tuple[type[Check], ...] = (Code, Inputs, Modules, Hooks, Dispatch, Deferred, Surface)
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("script", ["own_batch_gpt", "cnn_workers", "schedulers"])
def test_an_honest_script_has_no_finding(tmp_path: Path, script: str) -> None:
    """Memory-mapped data, loader workers, patched schedulers, weights swapped in and out."""
    run = watch(tmp_path, str(SCRIPTS / f"{script}.py"), "--steps", "12", links="governed")
    assert run.status == 0, run.output
    assert run.faults() == []
    for check in CHECKS:
        findings, link = run.judge(check)
        assert findings == [], check.name
        assert link.broken == 0


def test_training_is_bit_identical_with_and_without_the_guard(tmp_path: Path) -> None:
    """The same digest of the final weights, with every check in every step."""
    write(tmp_path, {"train.py": training(steps=12)})
    run = watch(tmp_path)
    assert digest_line(run.output) == digest_line(plain(tmp_path))
    assert {r.body["what"] for r in run.records if r.kind == "sweep"} >= {"surface", "hooks", "dispatch", "deferred"}
