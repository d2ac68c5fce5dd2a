"""`trainguard log`: what it prints, and the exit status a script can trust."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from trainguard.cli import cli
from trainguard.cli import main as trainguard_main
from trainguard.envelope import load_or_create_key, sign_statement, statement
from trainguard.log import Log

FOREIGN = b"\x1b[31mnot ours\x00"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose log holds two statements of ours, one by a stranger, and bytes that are none."""
    monkeypatch.setenv("TRAINGUARD_HOME", str(tmp_path))
    ours, theirs = load_or_create_key(tmp_path / "keys/attestation.pem"), load_or_create_key(tmp_path / "theirs.pem")
    with Log.open(tmp_path / "log", tmp_path / "keys/log.key") as log:
        log.append([sign_statement(statement("run/v1", {"run": "r1", "command": ["python", "a.py"]}, []), ours)])
        log.append([sign_statement(statement("segment/v1", {"run": "r1", "segment": 0, "count": 7}, []), ours)])
        log.append([sign_statement(statement("segment/v1", {"run": "\x1b[2J", "count": 1}, []), theirs), FOREIGN])
        log.publish()
    return tmp_path


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit status, stdout and stderr of the whole program, errors turned into sentences as users see them."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            status = trainguard_main(["log", *map(str, arguments)])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def test_head_shows_the_size_and_root_that_were_verified(call: Call, home: Path) -> None:
    """As text, and as exactly one JSON document with the signed note."""
    status, text, _ = call("head")
    assert status == 0
    assert "size  4 entries" in text
    status, text, _ = call("head", "--json")
    document = json.loads(text)
    assert (status, document["schema"], document["size"]) == (0, "trainguard/log-head/v1", 4)
    assert document["root"] in call("head")[1]
    assert call("head", "--quiet") == (0, "", "")


def test_show_names_statement_run_and_who_signed_and_obeys_no_escape_sequence(call: Call, home: Path) -> None:
    """What an attacker wrote is shown, not acted on; what is no statement has size and digest."""
    _, text, _ = call("show")
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["0", "run/v1", "run", "r1", "command", "python", "a.py", "(signed)"]
    assert "NOT SIGNED by a known key" in lines[2]
    assert f"{len(FOREIGN)} bytes" in lines[3]
    assert "\x1b" not in text


def test_show_takes_a_range_and_a_run(call: Call, home: Path) -> None:
    """START alone is one entry; --run filters; --quiet gives indexes."""
    assert call("show", "1", "--quiet")[1] == "1\n"
    assert call("show", "1", "3", "--quiet")[1] == "1\n2\n"
    assert call("show", "--run", "r1", "--quiet")[1] == "0\n1\n"
    entries = json.loads(call("show", "--json")[1])["entries"]
    assert [entry["signed"] for entry in entries] == [True, True, False, None]
    assert call("show", "9")[0] == 2


def test_a_proof_is_written_and_verified_offline_and_fits_no_other_entry(
    call: Call, home: Path, tmp_path: Path
) -> None:
    """prove -o, then verify --proof --entry with the vkey's text alone; another entry is refused with status 1."""
    proof, entry = tmp_path / "1.tlog-proof", tmp_path / "entry"
    assert call("prove", "1", "-o", proof, "--entry", entry)[0] == 0
    vkey = (home / "keys/log.vkey").read_text()
    shutil.rmtree(home / "log")
    status, text, _ = call("--vkey", vkey, "verify", "--proof", proof, "--entry", entry)
    assert (status, text) == (0, "upheld: entry 1 is in log trainguard.local of size 4\n")
    entry.write_bytes(b"other")
    status, text, errors = call("--vkey", vkey, "verify", "--proof", proof, "--entry", entry, "--json")
    assert (status, json.loads(text)["outcome"]) == (1, "violated")
    assert "leaf 1 of 4" in errors


def test_a_proof_on_stdout_is_the_file_itself(call: Call, home: Path) -> None:
    """For a pipe."""
    assert call("prove", "0")[1].startswith("c2sp.org/tlog-proof@v1\nindex 0\n")
    assert json.loads(call("prove", "0", "--json")[1])["proof"] == call("prove", "0")[1]
    assert call("prove", "4")[0] == 2


def test_verify_upholds_an_honest_log_and_names_what_was_altered(call: Call, home: Path) -> None:
    """Status 0, and 1 with the file; --json says the same."""
    status, text, _ = call("verify")
    assert status == 0
    assert text.startswith("upheld: log trainguard.local, 4 entries")
    assert json.loads(call("verify", "--json")[1])["outcome"] == "upheld"
    assert call("verify", "--quiet") == (0, "", "")
    bundle = home / "log/tile/entries/000.p/4"
    bundle.write_bytes(bundle.read_bytes()[:-1] + b"!")
    status, text, errors = call("verify", "--json")
    assert (status, json.loads(text)["outcome"]) == (1, "violated")
    assert "entry 3 was altered" in errors


def test_a_kept_head_shows_that_the_whole_folder_was_put_back(call: Call, home: Path, tmp_path: Path) -> None:
    """What no audit of the folder alone can see: an older copy of everything."""
    kept = tmp_path / "kept"
    shutil.copytree(home / "log", tmp_path / "older")
    with Log.open(home / "log", home / "keys/log.key") as log:
        log.append([b"inconvenient"])
    assert call("head", "-o", kept)[0] == 0
    assert call("verify", "--head", kept)[0] == 0
    shutil.rmtree(home / "log")
    shutil.copytree(tmp_path / "older", home / "log")
    assert call("verify")[0] == 0
    status, _, errors = call("verify", "--head", kept)
    assert status == 1
    assert "cut back" in errors
    with Log.open(home / "log", home / "keys/log.key") as log:
        log.append([b"harmless"])
    status, _, errors = call("verify", "--head", kept)
    assert status == 1
    assert "forked" in errors


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["verify", "--proof", "x"], 2),
        (["verify", "--proof", "x", "--entry", "y"], 2),
        (["--log", "/nonexistent", "verify"], 2),
        (["--vkey", "/nonexistent", "head"], 3),
        (["show", "-1"], 2),
        (["nothing"], 2),
    ],
)
def test_usage_errors_are_2_and_what_cannot_be_told_is_3(
    call: Call, home: Path, arguments: list[str], status: int
) -> None:
    """One sentence on stderr, nothing on stdout."""
    found, text, errors = call(*arguments)
    assert (found, text) == (status, "")
    assert errors


def test_a_home_without_a_log_says_what_to_do(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No log is no verdict."""
    monkeypatch.setenv("TRAINGUARD_HOME", str(tmp_path / "none"))
    status, _, errors = call("verify")
    assert status == 2
    assert "trainguard run" in errors


def test_help_names_every_sub_command_and_loads_no_torch() -> None:
    """And the module that holds the verb is light to import."""
    text = CliRunner().invoke(cli, ["log", "--help"]).output
    assert all(name in text for name in ("head", "show", "prove", "verify"))
    code = "import sys, trainguard.cli.log; print('torch' in sys.modules or 'cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
