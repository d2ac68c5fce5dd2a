"""What a replay read, against what the lock approves of data and weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainguard.finding import Finding
from trainguard.lockfile import Tree
from trainguard.replay.opened import unapproved_findings

LATER = 1 << 62
"""A run that began after all files of these tests were written."""


def locked(**trees: Tree) -> Any:
    return SimpleNamespace(measurement=SimpleNamespace(trees={tree.name: tree for tree in trees.values()}))


def tree(name: str, root: Path, **contents: bytes) -> Tree:
    files = {
        below.replace("_", "."): f"{hashlib.sha256(data).hexdigest()} {len(data)}" for below, data in contents.items()
    }
    return Tree(name=name, root=str(root), files=files)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "work" / "data"
    folder.mkdir(parents=True)
    (folder / "a.npy").write_bytes(b"rows")
    (folder / "b.npy").write_bytes(b"other rows")
    return folder


def looked(
    lock: Any, data: Path, *, read: list[str] | None = None, measured: Any = None, began: int = LATER
) -> list[Finding]:
    """read: as a replay tells it, in its sandbox."""
    box = data.parent.parent / "sandbox"
    paths = read if read is not None else [str(box / "work" / "data" / name) for name in ("a.npy", "b.npy", "c.npy")]
    where: dict[str, Any] = {"root": str(box), "cwd": str(data.parent), "began_ns": began}
    return list(unapproved_findings(lock, measured, "r", paths, **where))


def test_data_as_it_was_approved_is_no_finding(data: Path) -> None:
    assert looked(locked(one=tree("data:d", data, a_npy=b"rows", b_npy=b"other rows")), data) == []
    assert looked(None, data) == []


def test_another_content_is_named_by_its_path_on_the_runs_host(data: Path) -> None:
    (found,) = looked(locked(one=tree("data:d", data, a_npy=b"rows", b_npy=b"approved")), data)
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "D5", str(data / "b.npy"))
    assert found.expected == f"SHA-256 {hashlib.sha256(b'approved').hexdigest()}"


def test_a_file_that_is_an_input_by_itself_is_found(data: Path) -> None:
    lock = locked(one=tree("weights:w", data / "b.npy", b_npy=b"approved"))
    (found,) = looked(lock, data)
    assert found.subject.path == str(data / "b.npy")


def test_where_the_lock_was_made_elsewhere_the_runs_own_measurement_says_where_data_lies(data: Path) -> None:
    lock = locked(one=tree("data:d", Path("/elsewhere"), b_npy=b"approved"))
    assert looked(lock, data) == []
    there = SimpleNamespace(trees={"data:d": tree("data:d", data)})
    assert [each.subject.path for each in looked(lock, data, measured=there)] == [str(data / "b.npy")]


def test_what_changed_after_the_run_began_is_not_what_it_read(data: Path) -> None:
    """A replay reads something else then, and says so itself."""
    lock = locked(one=tree("data:d", data, b_npy=b"approved"))
    assert looked(lock, data, began=os.stat(data / "b.npy").st_mtime_ns - 1) == []


def test_code_is_not_looked_at_here(data: Path) -> None:
    assert looked(locked(one=tree("code", data, b_npy=b"approved")), data) == []
