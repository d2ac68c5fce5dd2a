"""The doctor sees what is wrong with a machine, says how to put it right, and stays quiet where nothing is."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from trainguard.measure import machine
from trainguard.measure.machine import Reading


def reading(question: str, home: Path) -> Reading:
    return next(answer for answer in machine.machine(home) if answer.name == question)


@pytest.fixture(autouse=True)
def small_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site folder of two files in place of this Python's hundred thousand."""
    site = tmp_path / "site"
    (site / "package").mkdir(parents=True, mode=0o755)
    (site / "package" / "__init__.py").write_text("")
    (site / "package" / "__init__.py").chmod(0o644)
    monkeypatch.setattr(
        machine.sysconfig, "get_paths", lambda: dict.fromkeys(("stdlib", "purelib", "platlib"), str(site))
    )
    return site


def test_every_question_is_answered_once(tmp_path: Path):
    """One line a question, none raises, every one that is not well has a remedy or could not be told."""
    readings = machine.machine(tmp_path / "home")
    assert len({r.name for r in readings}) == len(readings) == len(machine.QUESTIONS)
    assert all(r.remedy for r in readings if r.state in ("warn", "fail"))


def test_an_exception_in_one_question_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One odd file system does not hide the rest."""

    def fails(*_arguments: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(socket, "socketpair", fails)
    readings = {r.name: r for r in machine.machine(tmp_path)}
    assert readings["peer identity"].state == "unknown"
    assert readings["python"].state == "ok"


def test_keys_that_others_can_read_are_a_failure(tmp_path: Path):
    """Whoever read a key can sign."""
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    key = keys / "attestation.pem"
    key.write_text("secret")
    key.chmod(0o644)
    found = reading("keys", tmp_path)
    assert found.state == "fail"
    assert "0644" in found.found
    key.chmod(0o600)
    assert reading("keys", tmp_path).state == "ok"


def test_public_keys_may_be_read_by_all(tmp_path: Path):
    """That is what they are for."""
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name in ("attestation.pub", "log.vkey"):
        (keys / name).write_text("public")
        (keys / name).chmod(0o644)
    assert reading("keys", tmp_path).state == "ok"


def test_a_state_folder_that_anyone_can_write_is_a_failure(tmp_path: Path):
    """Evidence in it could be replaced."""
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o777)
    assert reading("state folder", home).state == "fail"
    home.chmod(0o755)
    assert reading("state folder", home).state == "ok"


@pytest.mark.parametrize(("mask", "state"), [(0o022, "ok"), (0o002, "warn"), (0o000, "fail")])
def test_the_umask_decides_who_can_write_new_files(tmp_path: Path, mask: int, state: str):
    """The process's own, as the kernel says it."""
    before = os.umask(mask)
    try:
        assert reading("umask", tmp_path).state == state
    finally:
        os.umask(before)


def test_an_imported_file_that_anyone_can_write_is_a_failure(tmp_path: Path, small_environment: Path):
    """H6: who can write what others import, before anybody does."""
    module = small_environment / "package" / "__init__.py"
    assert reading("packages", tmp_path).state in ("ok", "warn")
    module.chmod(0o666)
    found = reading("packages", tmp_path)
    assert found.state == "fail"
    assert str(module) in found.found


def test_a_folder_above_the_packages_that_anyone_can_write_is_a_failure(tmp_path: Path, small_environment: Path):
    """Whoever can rename the folder need not write the file."""
    small_environment.chmod(0o777)
    assert reading("packages", tmp_path).state == "fail"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_an_imported_file_of_another_account_is_named_with_the_account(tmp_path: Path, small_environment: Path):
    """The account, never a person."""
    os.chown(small_environment / "package" / "__init__.py", 4242, 4242)
    found = reading("packages", tmp_path)
    assert found.state == "warn"
    assert "4242" in found.found


def test_variables_that_load_code_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """LD_PRELOAD decides more than any package."""
    for name in machine.LOADING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert reading("loading variables", tmp_path).state == "ok"
    monkeypatch.setenv("LD_PRELOAD", "/tmp/x.so")
    assert "LD_PRELOAD" in reading("loading variables", tmp_path).found


def test_a_full_disk_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Gaps in a record begin with a full disk."""
    usage = type("usage", (), {"free": 1 << 20})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _place: usage)
    assert reading("disk", tmp_path).state == "fail"
