"""`trainguard audit`: which run is meant."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from trainguard.cli import audit
from trainguard.errors import Misuse
from trainguard.home import Home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr(audit, "BEGIN_SECONDS", 0.0)
    return Home(tmp_path)


def spool(home: Home, run: str) -> Path:
    home.run(run).mkdir(parents=True)
    path = home.run(run) / "spool"
    path.write_bytes(b"")
    return path


def test_a_run_that_is_followed_may_still_be_on_its_way(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older run whose name begins alike has ended: the one that is just starting is waited for."""
    spool(home, "night-old")
    monkeypatch.setattr(audit, "BEGIN_SECONDS", 60.0)
    monkeypatch.setattr("trainguard.cli.audit.time.sleep", lambda _seconds: spool(home, "night"))
    assert audit._begun(home, "night") == "night"


def test_a_run_that_goes_on_may_be_named_in_short(home: Home) -> None:
    """As everywhere; nothing is waited for."""
    with spool(home, "20261123-1200-abc").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert audit._begun(home, "20261123") == "20261123-1200-abc"


def test_a_run_that_never_comes_is_refused(home: Home) -> None:
    """After a bounded time."""
    spool(home, "other")
    with pytest.raises(Misuse, match="no such run"):
        audit._begun(home, "night")
