"""`trainguard demo` tells only what happened: its acts are real, found, and leave the installed torch alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainguard.testing import demo

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(500)]


def installed_optimizer() -> str:
    file = importlib.metadata.distribution("torch").locate_file(demo.OPTIMIZER)
    return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()


@pytest.mark.nightly
def test_the_quick_demo_is_verified_when_clean_and_finds_both_of_its_acts(tmp_path: Path):
    """Exit 0 says so, and the reports, the index and the log to check them with are there."""
    before = installed_optimizer()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRAINGUARD")}
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "trainguard", "demo", "--quick", "--json", "--out", str(out)],
        cwd=tmp_path,
        env=kept,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    document = json.loads(done.stdout)
    words = {scene["act"]: (scene["verdict"], scene["as_promised"]) for scene in document["scenes"]}
    assert words == {"clean": ("VERIFIED", True), "act-1": ("TAINTED", True), "act-3": ("TAINTED", True)}, done.stderr
    assert done.returncode == 0
    assert document["scenes"][2]["finding"]["subject"]["step"] == 50
    assert {path.name for path in out.glob("*.html")} == {"index.html", "clean.html", "act-1.html", "act-3.html"}
    assert "2 of 2 acts found" in (out / "index.html").read_text()
    assert installed_optimizer() == before
    assert not (out / "environment").exists()
    verify = subprocess.run(
        [sys.executable, "-m", "trainguard", "log", "verify", "--quiet"],
        env=kept | {"TRAINGUARD_HOME": str(out / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert verify.returncode == 0, verify.stderr
