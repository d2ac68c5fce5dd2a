"""Files are read once and remembered, and a memory that could be wrong is not believed."""

from __future__ import annotations

import hashlib
import os
import time
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from trainguard.measure import walk
from trainguard.measure.cache import MAX_AGE_SECONDS, StatCache
from trainguard.measure.walk import Limits, Walker


def value(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()} {len(text)}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    for name in ("a.py", "sub/b.py", "sub/c.txt"):
        (root / name).write_text(name)
        os.utime(root / name, (1_600_000_000, 1_600_000_000))
    time.sleep(0)
    return root


def settled(folder: Path | None) -> StatCache:
    """A cache that takes files for settled although they were written just now."""
    cache = StatCache(folder)
    cache.settled_ns = time.time_ns() + 10**12
    cache._wait = 10**9
    return cache


def test_every_file_is_listed_with_its_digest_and_size(tree: Path) -> None:
    found = Walker(StatCache(None)).tree(tree)
    assert found.files == {name: value(name) for name in ("a.py", "sub/b.py", "sub/c.txt")}
    assert found.notes == []


def test_a_second_walk_reads_nothing_and_says_the_same(tree: Path, tmp_path: Path) -> None:
    first = settled(tmp_path / "state")
    found = Walker(first).tree(tree)
    first.save()
    second = settled(tmp_path / "state")
    assert Walker(second).tree(tree).files == found.files
    assert second.hits == 3


@pytest.mark.parametrize("keep", ["mtime", "size and mtime", "inode"])
def test_no_change_of_content_hides_behind_the_cache(tree: Path, tmp_path: Path, keep: str) -> None:
    """A process without root cannot set ctime; every way to write a file moves it."""
    cache = settled(tmp_path / "state")
    Walker(cache).tree(tree)
    cache.save()
    path = tree / "a.py"
    info = path.stat()
    time.sleep(0.02)
    text = "b.py" if keep != "mtime" else "longer text"
    if keep == "inode":
        with path.open("r+") as file:
            file.write(text)
    else:
        path.write_text(text)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert Walker(settled(tmp_path / "state")).tree(tree).files["a.py"] == value(text)


@pytest.mark.parametrize(("changes", "noted"), [(1, False), (9, True)])
def test_a_file_that_gets_another_name_meanwhile_is_read_again_and_one_that_never_rests_is_noted(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: int, noted: bool
) -> None:
    """Package managers share files by hard links: a second environment changes the times of the first one's files."""
    real, left = walk._read, [changes]

    def read(name: str, folder: int, info: os.stat_result) -> str | None:
        if name == "a.py" and left[0]:
            left[0] -= 1
            os.link(tree / "a.py", tmp_path / f"other-{left[0]}")
        return real(name, folder, info)

    monkeypatch.setattr(walk, "_read", read)
    found = Walker(settled(tmp_path / "state")).tree(tree)
    assert any("changed while it was read" in note for note in found.notes) is noted
    assert found.files["a.py"].startswith("unreadable") is noted


def test_a_wrong_digest_in_the_cache_is_found_by_the_random_rehash_and_said(tree: Path, tmp_path: Path) -> None:
    """Whoever can set the clock or write the block device can fool the stat; a share is read all the same."""
    cache = settled(tmp_path / "state")
    Walker(cache).tree(tree)
    entry = cache.fresh[str(tree / "a.py")]
    cache.fresh[str(tree / "a.py")] = entry[:44] + value("other").encode()
    cache.save()
    again = settled(tmp_path / "state")
    again._wait = 1
    found = Walker(again).tree(tree)
    for _ in range(3):
        again._wait = 1
        notes = found.notes + Walker(again).tree(tree).notes
    assert any("content changed while every time stamp stayed" in note for note in notes)


def test_a_cache_of_another_key_another_account_or_too_old_is_dropped(tree: Path, tmp_path: Path) -> None:
    cache = settled(tmp_path / "state")
    Walker(cache).tree(tree)
    cache.save()
    stored = tmp_path / "state" / "stat.bin"
    assert StatCache(tmp_path / "state").known
    assert not StatCache(tmp_path / "state", now=time.time() + MAX_AGE_SECONDS + 1).known
    assert not StatCache(tmp_path / "state", trust=False).known
    data = stored.read_bytes()
    stored.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not StatCache(tmp_path / "state").known
    stored.write_bytes(data)
    (tmp_path / "state" / "stat.key").chmod(0o644)
    assert not StatCache(tmp_path / "state").known


def test_a_file_changed_just_now_is_not_remembered(tree: Path, tmp_path: Path) -> None:
    """It may change again within one clock tick."""
    (tree / "now.py").write_text("1")
    cache = StatCache(tmp_path / "state")
    Walker(cache).tree(tree)
    assert str(tree / "now.py") not in cache.fresh


def test_links_are_followed_once_and_loops_end(tree: Path) -> None:
    (tree / "sub" / "up").symlink_to(tree)
    (tree / "link.py").symlink_to(tree / "sub" / "b.py")
    (tree / "broken").symlink_to("nowhere")
    found = Walker(StatCache(None)).tree(tree)
    assert found.files["link.py"] == value("sub/b.py")
    assert found.files["broken"] == "-> nowhere"
    assert not any(path.startswith("sub/up/") for path in found.files)


def test_past_a_limit_only_what_lies_directly_in_the_root_is_kept_and_said(tree: Path) -> None:
    found = Walker(StatCache(None)).tree(tree, limits=Limits(files=1))
    assert set(found.files) == {"a.py"}
    assert "too much to measure" in found.notes[0]


def test_what_is_no_file_or_cannot_be_listed_is_a_note(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    assert "neither a file nor a folder" in Walker(StatCache(None)).tree(tree).notes[0]
    assert "cannot be listed" in Walker(StatCache(None)).tree(tree / "absent").notes[0]


def test_large_files_and_names_that_are_no_text_are_read(tree: Path) -> None:
    big = bytes(walk.WHOLE_BYTES + 5)
    (tree / "big.bin").write_bytes(big)
    Path(os.fsdecode(os.fsencode(tree) + b"/\xff.py")).write_text("x")
    found = Walker(StatCache(None)).tree(tree)
    assert found.files["big.bin"] == f"{hashlib.sha256(big).hexdigest()} {len(big)}"
    assert found.files["\\xff.py"] == value("x")


def test_bytecode_is_told_apart_by_what_python_would_do_with_it(tmp_path: Path) -> None:
    """PEP 552; the header's mtime and size decide whether the source is read at all."""

    def header(flags: int, mtime: int, size: int) -> bytes:
        return b"\xa7\r\r\n" + b"".join(number.to_bytes(4, "little") for number in (flags, mtime, size))

    (tmp_path / "__pycache__").mkdir()
    for name in ("live", "stale", "checked", "unchecked"):
        (tmp_path / f"{name}.py").write_text("x")
        os.utime(tmp_path / f"{name}.py", (1_600_000_000, 1_600_000_000))
    for name, flags, mtime in (("live", 0, 1_600_000_000), ("stale", 0, 5), ("checked", 3, 0), ("unchecked", 1, 0)):
        (tmp_path / "__pycache__" / f"{name}.cpython-311.pyc").write_bytes(header(flags, mtime, 1) + b"code")
    (tmp_path / "__pycache__" / "gone.cpython-311.pyc").write_bytes(header(0, 1, 1) + b"code")
    (tmp_path / "__pycache__" / "live.cpython-312.pyc").write_bytes(header(0, 1_600_000_000, 1) + b"code")
    (tmp_path / "orphan.pyc").write_bytes(header(0, 1, 1) + b"code")
    found = Walker(StatCache(None), tag="cpython-311").tree(tmp_path)
    digest = hashlib.sha256(b"code").hexdigest()
    assert found.bytecode == {
        "__pycache__/live.cpython-311.pyc": f"{digest} live",
        "__pycache__/checked.cpython-311.pyc": f"{digest} checked",
        "__pycache__/unchecked.cpython-311.pyc": f"{digest} unchecked",
        "orphan.pyc": f"{digest} sourceless",
    }


def test_bytecode_kept_in_a_folder_of_its_own_is_no_module(tmp_path: Path) -> None:
    """PYTHONPYCACHEPREFIX, and the guard itself, keep it so; a training may lie above such a folder."""
    for name in ("kept.cpython-311.pyc", "module.pyc"):
        (tmp_path / name).write_bytes(bytes(16) + b"code")
    found = Walker(StatCache(None), tag="cpython-311").tree(tmp_path)
    importable = {name for name in ("kept", "module") if PathFinder.find_spec(name, [str(tmp_path)]) is not None}
    assert importable == {"module"}
    assert set(found.bytecode) == {"module.pyc"}
