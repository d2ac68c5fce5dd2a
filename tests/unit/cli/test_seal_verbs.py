"""`trainguard seal` and `trainguard verify`: one sentence, one document, one exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trainguard.cli import cli
from trainguard.cli import main as entry
from trainguard.home import Home
from trainguard.seal import SealReport, seal_path


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINGUARD_HOME", str(tmp_path / "state"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    root = tmp_path / "ckpt"
    root.mkdir()
    (root / "weights.bin").write_bytes(b"w" * 1000)
    (root / "config.json").write_text("{}")
    return root


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one call, in this process."""
    try:
        status = entry([str(a) for a in arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return int(status or 0), out, err


def test_seal_and_verify_as_a_user_would(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both say what they did in a few lines and end with 0."""
    status, out, err = run("seal", checkpoint, "--run", "r", "--step", 7, capsys=capsys)
    assert (status, err) == (0, "")
    assert "sealed (run r, step 7)" in out
    assert str(checkpoint / "model.sig") in out
    status, out, err = run("verify", checkpoint, "--run", "r", capsys=capsys)
    assert (status, err) == (0, "")
    assert out.startswith(f"{checkpoint}: UPHELD: is what was sealed (run r, step 7)\n")
    assert "2 files, 1.0 kB" in out


def test_json_is_one_document(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the fields of SealReport, findings with every field of a finding."""
    run("seal", checkpoint, "--json", capsys=capsys)
    (checkpoint / "config.json").write_text("[]")
    status, out, _ = run("verify", checkpoint, "--json", capsys=capsys)
    value: dict[str, Any] = json.loads(out)
    assert status == 1
    assert (value["schema"], value["status"]) == ("trainguard/seal/v1", "violated")
    assert set(value) == set(SealReport.__struct_fields__)
    (finding,) = value["findings"]
    assert set(finding) == {"check", "outcome", "techniques", "subject", "message", "expected", "found", "evidence"}
    assert set(finding["subject"]) == {"run", "rank", "step", "tensor", "path"}
    assert finding["subject"]["path"] == "ckpt/config.json"


def test_quiet_prints_nothing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status tells."""
    assert run("seal", checkpoint, "--quiet", capsys=capsys) == (0, "", "")
    assert run("verify", checkpoint, "--quiet", capsys=capsys) == (0, "", "")
    (checkpoint / "weights.bin").write_bytes(b"v" * 1000)
    assert run("verify", checkpoint, "--quiet", capsys=capsys) == (1, "", "")


def test_a_violation_is_told_in_words(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file, what was expected, what was found."""
    run("seal", checkpoint, "--quiet", capsys=capsys)
    (checkpoint / "weights.bin").write_bytes(b"v" * 999)
    (checkpoint / "more.bin").write_bytes(b"")
    status, out, _ = run("verify", checkpoint, capsys=capsys)
    assert status == 1
    assert "VIOLATED: do not load it" in out
    assert "weights.bin is not the file that was sealed" in out
    assert "expected 1000 bytes" in out
    assert "found    999 bytes" in out
    assert "file 'more.bin' was not there when it was sealed" in out


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: None, "No such file"),
        (os.mkfifo, "FIFO"),
        (lambda p: p.symlink_to(p), "expected a checkpoint"),
        (lambda p: p.mkdir(), "no file in it"),
        (lambda p: p.symlink_to("/dev/null"), "character device"),
    ],
    ids=["missing", "fifo", "loop", "empty folder", "device"],
)
def test_what_cannot_be_sealed_is_refused_in_one_sentence(
    tmp_path: Path, make: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 3, nothing on stdout, nothing written."""
    path = tmp_path / "odd"
    make(path)
    status, out, err = run("seal", path, capsys=capsys)
    assert (status, out) == (3, "")
    assert err.startswith("trainguard: ")
    assert expected in err
    assert not (tmp_path / "odd.sig").exists()
    assert not (tmp_path / "state" / "log").exists()


@pytest.mark.parametrize(
    ("damage", "status", "expected"),
    [
        (lambda s: s.unlink(), 1, "the seal of ckpt is gone"),
        (lambda s: s.write_bytes(b""), 1, "cannot be believed"),
        (lambda s: s.write_bytes(s.read_bytes()[:500]), 1, "cannot be believed"),
        (lambda s: os.truncate(s, (64 << 20) + 1), 1, "limit"),
        (lambda s: s.write_bytes(s.read_bytes() + b"\0"), 1, "cannot be believed"),
        (lambda s: (s.unlink(), os.mkfifo(s)), 3, "another kind"),
        (lambda s: (s.unlink(), s.symlink_to("/etc/hostname")), 3, "seal cannot be opened"),
        (lambda s: (s.unlink(), s.mkdir()), 3, "another kind"),
    ],
    ids=["gone", "empty", "cut", "oversized", "longer", "fifo", "link", "folder"],
)
def test_a_damaged_seal_is_told_in_one_sentence(
    checkpoint: Path, damage: Any, status: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 where the evidence is bad, 3 where there is none to read; never a traceback."""
    run("seal", checkpoint, "--quiet", capsys=capsys)
    damage(checkpoint / "model.sig")
    found, out, err = run("verify", checkpoint, capsys=capsys)
    assert found == status
    assert expected in out + err
    assert "Traceback" not in out + err


def test_a_checkpoint_without_seal_could_not_be_told(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With our key there but no seal: 3, and what to do."""
    other = checkpoint.parent / "other.bin"
    other.write_bytes(b"x")
    run("seal", other, "--quiet", capsys=capsys)
    status, _, err = run("verify", checkpoint, capsys=capsys)
    assert status == 3
    assert "has no seal" in err
    assert "next: seal it" in err
    status, _, err = run("verify", f"{other}.sig", capsys=capsys)
    assert status == 3
    assert "name the checkpoint" in err


def test_keys_that_are_none_are_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, empty, private, of another kind, a folder."""
    run("seal", checkpoint, "--quiet", capsys=capsys)
    (tmp_path / "empty.pub").write_text("")
    for key, status in (
        ("none.pub", 3),
        ("empty.pub", 1),
        ("state/keys/attestation.pem", 1),
        ("state/keys/log.key", 1),
        ("state", 3),
    ):
        found, _, err = run("verify", checkpoint, "--key", tmp_path / key, capsys=capsys)
        assert (found, err.startswith("trainguard: ")) == (status, True), key


def test_usage_errors_are_two(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A negative step, an unknown hash, no path."""
    for arguments in (["seal", checkpoint, "--step", "-1"], ["seal", checkpoint, "--hash", "md5"], ["verify"]):
        assert run(*arguments, capsys=capsys)[0] == 2
    assert run("seal", checkpoint, "--run", "a/b", capsys=capsys)[0] == 2


def test_a_file_name_with_escape_codes_is_shown_not_obeyed(checkpoint: Path) -> None:
    """A sealed folder in which someone puts a file to confuse a terminal."""
    seal_path(Home.find(), checkpoint)
    (checkpoint / "a\x1b[31mred").write_bytes(b"")
    result = CliRunner().invoke(cli, ["verify", str(checkpoint)], standalone_mode=False)
    assert result.return_value == 1
    assert "\x1b" not in result.output


def test_neither_verb_imports_torch(checkpoint: Path) -> None:
    """Verifying must be cheap, and must not load what it is there to vet."""
    code = (
        "import sys; from trainguard.cli import main\n"
        f"main(['seal', {str(checkpoint)!r}, '--quiet']); main(['verify', {str(checkpoint)!r}, '--quiet'])\n"
        "print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
