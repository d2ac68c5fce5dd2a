"""`trainguard lock` and `trainguard preflight` as a user and a script meet them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainguard.cli import main
from trainguard.testing.installed import InstalledEnvironment


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstalledEnvironment:
    made = InstalledEnvironment(tmp_path)
    made.install("tinyoptim", "1.0", {"tinyoptim.py": "# rates\nRATE = 0.1\n"})
    (made.job / "train.py").write_text("import tinyoptim\nprint(tinyoptim.RATE)\n")
    monkeypatch.chdir(made.job)
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        status = main(list(words))
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def document(text: str) -> Any:
    """Standard output holds exactly one JSON document."""
    assert text.count("\n") == 1
    return json.loads(text)


def test_a_locked_job_preflights_clean_and_an_edit_is_shown_line_by_line(
    place: InstalledEnvironment, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = call(capsys, "lock", "--", "python", "train.py")
    assert status == 0
    assert "1 file of code" in out
    status, out, _ = call(capsys, "preflight", "--", "python", "train.py")
    assert (status, out.split()[0]) == (0, "VERIFIED")
    place.edit("tinyoptim.py", "# rates\nRATE = 0.2\n", keep_times=True)
    place.rewrite_records()
    (place.job / "train.py").write_text("import tinyoptim\nprint(-tinyoptim.RATE)\n")
    status, out, _ = call(capsys, "preflight", "--", "python", "train.py")
    assert (status, out.split()[0]) == (1, "TAINTED")
    for line in ("-RATE = 0.1", "+RATE = 0.2", "-print(tinyoptim.RATE)", "+print(-tinyoptim.RATE)"):
        assert f"\n  {line}\n" in out
    assert "site-packages/tinyoptim.py" in out
    assert "\x1b" not in out


def test_json_is_one_verdict_document_whatever_the_outcome(
    place: InstalledEnvironment, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = call(capsys, "preflight", "--json", "--", "python", "train.py")
    unlocked = document(out)
    assert (status, unlocked["verdict"], unlocked["findings"][0]["outcome"]) == (3, "UNKNOWN", "not_checked")
    assert "no lock" in unlocked["findings"][0]["message"]
    status, out, _ = call(capsys, "lock", "--json", "--", "python", "train.py")
    assert (status, document(out)["packages"]) == (0, 1)
    status, out, _ = call(capsys, "preflight", "--json", "--", "python", "train.py")
    clean = document(out)
    assert (status, clean["schema"], clean["verdict"], clean["level"]) == (
        0,
        "trainguard/verdict/v1",
        "VERIFIED",
        "TIL-1",
    )
    assert (clean["run"], clean["findings"], len(clean["lock"])) == (None, [], 64)
    place.edit("tinyoptim.py", "RATE = 9\n")
    status, out, _ = call(capsys, "preflight", "--json", "--", "python", "train.py")
    (finding,) = document(out)["findings"]
    assert (status, finding["techniques"], finding["subject"]["path"]) == (1, ["A5"], "site-packages/tinyoptim.py")
    assert set(finding["subject"]) == {"run", "rank", "step", "tensor", "path"}


def test_without_a_command_the_approved_one_is_preflighted(
    place: InstalledEnvironment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "preflight")[0] == 2
    call(capsys, "lock", "--", "python", "train.py")
    assert call(capsys, "preflight")[0] == 0


@pytest.mark.parametrize(
    ("edit", "status", "words"),
    [
        (lambda data: data[: len(data) // 2], 1, "not JSON, or cut off"),
        (lambda data: b"", 1, "not JSON, or cut off"),
        (lambda data: data.replace(b"trainguard/lock/v1", b"trainguard/lock/v7"), 1, "trainguard/lock/v7"),
        (lambda data: data.replace(b'"train.py"', b'"Train.py"'), 1, "the lock was edited"),
    ],
)
def test_a_lock_that_is_damaged_is_refused_in_one_sentence(
    place: InstalledEnvironment, capsys: pytest.CaptureFixture[str], edit: Any, status: int, words: str
) -> None:
    """As text and as the one document."""
    call(capsys, "lock", "--", "python", "train.py")
    lock = place.job / "trainguard.lock"
    lock.write_bytes(edit(lock.read_bytes()))
    found, out, _ = call(capsys, "preflight", "--", "python", "train.py")
    assert (found, words in out) == (status, True)
    found, out, _ = call(capsys, "preflight", "--json", "--", "python", "train.py")
    assert (found, document(out)["findings"][0]["techniques"]) == (status, ["G6"])


def test_a_lock_of_an_unknown_key_is_not_green_until_the_key_is_named(
    place: InstalledEnvironment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An insider who approves his own edit on his own machine."""
    monkeypatch.setenv("TRAINGUARD_HOME", str(tmp_path / "other machine"))
    call(capsys, "lock", "--", "python", "train.py")
    monkeypatch.setenv("TRAINGUARD_HOME", str(tmp_path / "here"))
    status, out, _ = call(capsys, "preflight", "--", "python", "train.py")
    assert (status, out.split()[0]) == (3, "UNKNOWN")
    assert "--key" in out
    key = tmp_path / "other machine" / "keys" / "attestation.pub"
    assert call(capsys, "preflight", "--key", str(key), "--", "python", "train.py")[0] == 0


def test_approvals_travel_with_the_lock_and_a_malformed_one_is_a_usage_error(
    place: InstalledEnvironment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "lock", "--approve", "weights", "--", "python", "train.py")[0] == 2
    (place.job / "config.yaml").write_text("a: 1\n")
    approvals = ("--approve", "environment=config.yaml", "--approve", "weights=train.py:45")
    call(capsys, "lock", *approvals, "--", "python", "train.py")
    (place.job / "config.yaml").write_text("a: 2\n")
    assert call(capsys, "preflight", "--quiet")[:2] == (0, "")
    call(capsys, "lock", "--", "python", "train.py")
    (place.job / "config.yaml").write_text("a: 3\n")
    assert call(capsys, "preflight", "--quiet")[:2] == (1, "")


def test_a_program_that_does_not_exist_is_a_usage_error(
    place: InstalledEnvironment, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(capsys, "lock", "--", "no-such-program")
    assert (status, "no such program" in err) == (2, True)


@pytest.mark.slow
def test_bytecode_that_lies_about_its_source_is_not_locked(
    place: InstalledEnvironment, capsys: pytest.CaptureFixture[str]
) -> None:
    """--deep compiles every source again before anything is approved."""
    place.run("train.py")
    pyc = next((place.site / "__pycache__").glob("tinyoptim.*.pyc"))
    code = "import marshal,sys; p=sys.argv[1]; head=open(p,'rb').read()[:16]\n"
    code += "open(p,'wb').write(head+marshal.dumps(compile('RATE=5','x','exec')))"
    place.run("-c", code, str(pyc))
    status, out, _ = call(capsys, "lock", "--deep", "--", "python", "train.py")
    assert (status, "A6" in out) == (1, True)
    assert not (place.job / "trainguard.lock").exists()
