"""What a person can point scan, seal and verify at by mistake: one clear sentence and the right status for each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainguard.cli import main


def make(folder: Path) -> None:
    """Everything that is no checkpoint."""
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "empty").mkdir()
    (folder / "with-fifo").mkdir()
    os.mkfifo(folder / "with-fifo" / "pipe")
    (folder / "a.pkl").write_bytes(b"\x80\x02]q\0.")
    (folder / "sealed.pkl").write_bytes(b"\x80\x02]q\0.")


def status_of(*arguments: str) -> int:
    """The verb's exit status, in this process."""
    try:
        return int(main(list(arguments)))
    except SystemExit as ended:
        return int(ended.code or 0)


def test_every_wrong_path_has_its_sentence_and_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No exception of ours or of Python's comes out, nothing hangs on a FIFO, never status 0."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINGUARD_HOME", str(tmp_path / "state"))
    assert status_of("seal", "sealed.pkl") == 0
    (tmp_path / "key.pub").write_text("no key\n")
    cases = (
        ("scan missing", 3, "missing: cannot be opened: No such file or directory"),
        ("scan fifo", 3, "expected a regular file, found a FIFO"),
        ("scan loop", 3, "Too many levels of symbolic links"),
        ("scan dangling", 3, "No such file or directory"),
        ("scan empty", 3, "an empty folder"),
        ("scan with-fifo", 3, "expected a regular file, found a FIFO"),
        ("scan /dev/null", 3, "expected a regular file, found a character device"),
        ("seal missing", None, "missing"),
        ("seal fifo", None, "FIFO"),
        ("seal loop", None, "loop"),
        ("seal with-fifo", None, "expected a regular file, found a FIFO"),
        ("verify missing", None, "missing"),
        ("verify fifo", None, "fifo"),
        ("verify loop", None, "loop"),
        ("verify a.pkl", 3, "has no seal"),
        ("verify --key missing.pub sealed.pkl", None, "missing.pub"),
        ("verify --key key.pub sealed.pkl", None, "key.pub"),
    )
    for words, status, sentence in cases:
        capsys.readouterr()
        ended = status_of(*words.split())
        out = capsys.readouterr()
        text = out.out + out.err
        assert sentence in text, (words, text)
        assert ended in ((status,) if status is not None else (1, 2, 3)), (words, ended, text)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Could not tell is not clean."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINGUARD_HOME", str(tmp_path / "state"))
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02]q\0.")
    (tmp_path / "a.pkl").chmod(0)
    for verb in ("scan", "seal"):
        assert status_of(verb, "a.pkl") == 3
        out = capsys.readouterr()
        assert "Permission denied" in out.out + out.err
