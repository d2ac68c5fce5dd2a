"""Folders of replays: gone at the end, and those of killed audits gone with the next one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainguard.replay.scratch import OWNER, scratch, sweep


def left(parent: Path, name: str) -> Path:
    """A folder as a killed audit leaves it: nobody holds its lock."""
    folder = parent / name
    folder.mkdir(mode=0o700)
    (folder / OWNER).touch()
    (folder / "sandbox").mkdir()
    return folder


def test_a_folder_is_there_inside_and_gone_afterwards(tmp_path: Path) -> None:
    """Also when what is done in it fails."""

    def work() -> None:
        with scratch("ours-", tmp_path) as folder:
            assert folder.stat().st_mode & 0o077 == 0
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_audit_left_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    """And what another audit is using at the same time is not."""
    old = left(tmp_path, "ours-1")
    with scratch("ours-", tmp_path) as using, scratch("ours-", tmp_path):
        assert not old.exists()
        assert using.exists()
        assert sweep(tmp_path, "ours-") == []


def test_nothing_is_deleted_that_is_not_known_to_be_its_own(tmp_path: Path) -> None:
    """Another name, no lock file, a link, a folder that others can read, a file."""
    others = left(tmp_path, "theirs-1")
    unfinished = tmp_path / "ours-unfinished"
    unfinished.mkdir(mode=0o700)
    target = left(tmp_path, "target")
    (tmp_path / "ours-link").symlink_to(target)
    shared = left(tmp_path, "ours-shared")
    shared.chmod(0o755)
    (tmp_path / "ours-file").touch()
    linked = left(tmp_path, "ours-linked")
    (linked / OWNER).unlink()
    (linked / OWNER).symlink_to(target / OWNER)
    assert sweep(tmp_path, "ours-") == []
    assert all(path.exists() for path in (others, unfinished, target, shared, linked))
    assert os.readlink(tmp_path / "ours-link") == str(target)
