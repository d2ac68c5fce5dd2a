"""The line that tells what a command is at: on a terminal, after a moment, and gone at the end."""

from __future__ import annotations

import io
import threading

import pytest

from trainguard.cli import _progress
from trainguard.cli._progress import working


class Screen(io.StringIO):
    """A stream that is, or is no, terminal, and tells when something was written."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal
        self.written = threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def flush(self) -> None:
        self.written.set()


def test_the_line_says_what_is_under_way_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(_progress, "AFTER_SECONDS", 0.0)
    monkeypatch.setattr(_progress, "EVERY_SECONDS", 0.001)
    with working("measuring") as say:
        assert screen.written.wait(60)
        assert "measuring 0 s" in screen.getvalue()
        say("hashing")
        while "hashing 0 s" not in screen.getvalue():
            assert screen.written.wait(60)
    assert screen.getvalue().endswith("\r\x1b[K")


def test_what_is_over_in_a_moment_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(_progress, "AFTER_SECONDS", 600.0)
    with working("measuring"):
        pass
    assert screen.getvalue() == ""


@pytest.mark.parametrize(("terminal", "shown"), [(False, True), (True, False)])
def test_files_and_quiet_commands_get_nothing(monkeypatch: pytest.MonkeyPatch, terminal: bool, shown: bool) -> None:
    screen = Screen(terminal=terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(_progress, "AFTER_SECONDS", 0.0)
    with working("measuring", shown=shown) as say:
        say("hashing")
        assert "progress" not in {thread.name for thread in threading.enumerate()}
    assert screen.getvalue() == ""


def test_an_error_takes_the_line_away_too(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(_progress, "AFTER_SECONDS", 0.0)

    def fail() -> None:
        with working("measuring"):
            assert screen.written.wait(60)
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    assert screen.getvalue().endswith("\r\x1b[K")
