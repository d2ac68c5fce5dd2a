"""From lock to verdict through the command line: what was approved runs green, what was changed does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainguard.testing.installed import InstalledEnvironment


@pytest.fixture
def place(tmp_path: Path) -> InstalledEnvironment:
    made = InstalledEnvironment(tmp_path)
    made.install("tinyoptim", "1.0", {"tinyoptim.py": "RATE = 0.1\n"})
    (made.job / "train.py").write_text(
        "import pathlib, tinyoptim\npathlib.Path('ran').touch()\nprint(tinyoptim.RATE)\n"
    )
    return made


def trainguard(place: InstalledEnvironment, *words: str, home: str = "state") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "trainguard", *words],
        cwd=place.job,
        env=place.environment | {"TRAINGUARD_HOME": str(place.root / home)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def run(place: InstalledEnvironment, *options: str) -> tuple[int, Any]:
    status, out, err = trainguard(place, "run", "--json", "--quiet", *options, "--", "python", "train.py")
    assert out, err
    return status, json.loads(out.splitlines()[-1])


def environment_findings(verdict: Any) -> list[tuple[str, str, str]]:
    return [
        (finding["outcome"], finding["techniques"][0], finding["subject"]["path"])
        for finding in verdict["findings"]
        if finding["check"] == "environment" and finding["techniques"]
    ]


def link(verdict: Any) -> Any:
    (found,) = [link for link in verdict["links"] if link["link"] == "environment"]
    return found


def test_a_locked_run_holds_and_an_edit_with_its_record_rewritten_taints_the_next(place: InstalledEnvironment) -> None:
    """S3, through `run`: pip and RECORD are content, the command runs on, and the verdict is TAINTED."""
    assert trainguard(place, "lock", "--quiet", "--", "python", "train.py")[0] == 0
    status, clean = run(place)
    assert (status, environment_findings(clean), link(clean)["broken"], link(clean)["blind"]) == (0, [], 0, [])
    assert link(clean)["held"] > 1000
    assert clean["lock"] is not None
    place.edit("tinyoptim.py", "RATE = 0.2\n", keep_times=True)
    place.rewrite_records()
    assert place.record_agrees()
    status, tainted = run(place)
    assert (status, tainted["verdict"]) == (0, "TAINTED")
    assert environment_findings(tainted) == [("violated", "A5", "site-packages/tinyoptim.py")]


def test_the_gate_keeps_what_is_not_approved_from_starting(place: InstalledEnvironment) -> None:
    trainguard(place, "lock", "--quiet", "--", "python", "train.py")
    place.edit("tinyoptim.py", "RATE = 0.3\n")
    status, out, err = trainguard(place, "run", "--gate", "--", "python", "train.py")
    assert (status, "0.3" in out, (place.job / "ran").exists()) == (1, False, False), err


def test_a_lock_that_an_insider_signed_himself_gives_no_green_run(place: InstalledEnvironment) -> None:
    """G6: re-approved after the edit, with a key of his own."""
    trainguard(place, "lock", "--quiet", "--", "python", "train.py")
    place.edit("tinyoptim.py", "RATE = 0.4\n")
    trainguard(place, "lock", "--quiet", "--", "python", "train.py", home="insider")
    _, verdict = run(place)
    assert "does not know" in " ".join(link(verdict)["blind"])
    assert verdict["verdict"] != "VERIFIED"


def test_a_lock_that_was_edited_stops_the_run_before_anything_starts(place: InstalledEnvironment) -> None:
    trainguard(place, "lock", "--quiet", "--", "python", "train.py")
    lock = place.job / "trainguard.lock"
    lock.write_text(lock.read_text().replace('"tinyoptim.py": "', '"tinyoptim.py": "0', 1))
    status, _, err = trainguard(place, "run", "--", "python", "train.py")
    assert (status, err.count("the lock was edited"), (place.job / "ran").exists()) == (1, 1, False)
