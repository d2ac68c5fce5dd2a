"""`trainguard scan`: exit statuses, the three outputs, trust files, and one clear sentence for what cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trainguard.cli.scan import command
from trainguard.testing.forge import BENIGN, named, stream, torch_zip, touch

UNKNOWN = stream(named("mine.models", "Config") + b")\x81")


def scan(*arguments: str | Path) -> Result:
    """Run the verb in this process."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """One file of each verdict."""
    (tmp_path / "safe.pkl").write_bytes(BENIGN)
    (tmp_path / "unknown.pkl").write_bytes(UNKNOWN)
    (tmp_path / "unsafe.pt").write_bytes(torch_zip(stream(touch("never"))))
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@pytest.mark.parametrize(
    ("names", "fail_on", "status"),
    [
        (["safe.pkl"], "unknown", 0),
        (["unknown.pkl"], "unknown", 1),
        (["unknown.pkl"], "unsafe", 3),
        (["unsafe.pt"], "unsafe", 1),
        (["fifo"], "unknown", 3),
        (["safe.pkl", "missing"], "unknown", 3),
        (["fifo", "unknown.pkl"], "unknown", 1),
        (["fifo", "unsafe.pt"], "unsafe", 1),
        (["safe.pkl", "fifo", "unknown.pkl"], "unsafe", 3),
    ],
)
def test_exit_status(files: Path, names: list[str], fail_on: str, status: int) -> None:
    """0 all safe, 1 unsafe or unknown, 3 could not tell; no flag turns anything but safe into 0."""
    result = scan(*(files / name for name in names), "--fail-on", fail_on)
    assert result.exit_code == status


def test_usage_errors_end_with_2(files: Path) -> None:
    """No path, a bad tier, two outputs at once, a bad trust line."""
    assert scan().exit_code == 2
    assert scan(files, "--tier", "all").exit_code == 2
    assert scan(files, "--json", "--sarif").exit_code == 2
    (files / "trust").write_text("os.system call\n")
    done = subprocess.run(
        [sys.executable, "-m", "trainguard", "scan", str(files / "safe.pkl"), "--trust", str(files / "trust")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "trust:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_is_one_document(files: Path) -> None:
    """stdout holds exactly one JSON document with the worst verdict and every report."""
    result = scan("--json", files / "safe.pkl", files / "unsafe.pt")
    document = json.loads(result.stdout)
    assert (document["schema"], document["verdict"]) == ("trainguard/scan/v1", "unsafe")
    assert [report["verdict"] for report in document["reports"]] == ["safe", "unsafe"]
    reason = document["reports"][1]["files"][0]["reasons"][0]
    assert {"verdict", "rule", "what", "offset", "member", "global", "use", "technique"} == set(reason)


def test_text_names_the_place_and_how_to_trust(files: Path) -> None:
    """File, member, offset, the exact trust line and the torch snippet; then that line settles it."""
    (files / "model.pt").write_bytes(torch_zip(UNKNOWN))
    result = scan(files / "model.pt")
    assert "archive/data.pkl byte" in result.stdout
    assert "    mine.models.Config instance\n" in result.stdout
    assert "torch.serialization.safe_globals" in result.stdout
    assert '(resolve("mine.models", "Config"), "mine.models.Config")' in result.stdout
    (files / "trust").write_text("mine.models.Config instance\n")
    assert scan(files / "model.pt", "--trust", files / "trust").exit_code == 0


def test_quiet_says_nothing_about_safe_files(files: Path) -> None:
    """Silence only when all is safe."""
    assert scan("--quiet", files / "safe.pkl").stdout == ""
    loud = scan("--quiet", files / "safe.pkl", files / "unknown.pkl").stdout
    assert "unknown.pkl" in loud
    assert "safe.pkl" not in loud


@pytest.mark.parametrize("kind", ["missing", "fifo", "loop", "device"])
def test_what_cannot_be_read_gets_one_sentence(files: Path, kind: str) -> None:
    """Never a traceback, never 'safe'."""
    (files / "loop").symlink_to(files / "loop")
    path = Path("/dev/zero") if kind == "device" else files / kind
    result = scan(path)
    assert result.exit_code == 3
    assert str(path) in result.stdout
    assert "Traceback" not in result.output
    assert "safe:" not in result.stdout


def test_help_does_not_import_torch() -> None:
    """The verb starts without torch and numpy."""
    code = "import sys, trainguard.cli.scan; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_scanning_imports_nothing_of_the_file(files: Path) -> None:
    """Not torch, not the named modules: only names are compared."""
    code = (
        "import sys; from trainguard.scan import vet; vet(sys.argv[1]);"
        "sys.exit(bool({'torch', 'numpy', 'mine', 'joblib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(files)], check=False).returncode == 0
