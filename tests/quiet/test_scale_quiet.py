"""Honest scripts do the same at every size; what scales with the job is listed."""

import json
import sys
from pathlib import Path

import pytest
from tests.attacks.test_scale import TRAIN
from tests.helpers.guarded import trainguard

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that import torch, one after another, on a busy machine."""
    monkeypatch.setattr("tests.helpers.guarded.TIMEOUT_SECONDS", 550)


def test_an_honest_parallel_script_has_no_finding(tmp_path: Path) -> None:
    """Scaled learning rate, a sampler over ranks, epochs: no finding at the probed size, and the difference listed."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "helper.py").write_text("def between(model):\n    pass\n")
    done = trainguard(tmp_path, "probe", "--json", "--world-size", "1024", "--", sys.executable, "train.py")
    verdict = json.loads(done.stdout)
    assert (verdict["verdict"], verdict["findings"]) == ("VERIFIED", [])
    assert any("hyper-parameter lr of group 0: 0.02 at world size 2, 10.24" in reason for reason in verdict["reasons"])


def test_a_script_that_cannot_be_probed_is_not_called_clean(tmp_path: Path) -> None:
    """It fails before its first step: UNKNOWN, with its own last words."""
    (tmp_path / "train.py").write_text("raise SystemExit('needs a cluster')\n")
    done = trainguard(tmp_path, "probe", "--json", "--world-size", "8", "--", sys.executable, "train.py")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["verdict"]) == (3, "UNKNOWN")
    assert any("needs a cluster" in reason for reason in verdict["reasons"])
