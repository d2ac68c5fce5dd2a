"""Sealed replay points: refused when altered, missing or malformed; compared tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainguard.errors import MalformedEvidence, Unavailable, VerificationError
from trainguard.replay.committed import Point
from trainguard.replay.points import digests, first_unequal, open_point, read_index, seal_point


def point(folder: Path, *, data: bytes = b"\1" * 64 + b"\2" * 64, **index: Any) -> Path:
    path = folder / "p0-step-00000020"
    path.mkdir()
    (path / "data").write_bytes(data)
    tensors = [["param/0/a", "float32", [16], 0, 64], ["param/0/b", "float32", [4, 4], 64, 64]]
    value = {"version": 1, "step": 20, "tensors": tensors, "numbers": {}} | index
    (path / "index.json").write_text(json.dumps(value))
    return path


def sealed(path: Path) -> Point:
    return Point(step=20, **seal_point(path))


def test_an_untouched_point_opens(tmp_path: Path) -> None:
    """Its two files are what the log says."""
    path = point(tmp_path)
    assert [line[0] for line in open_point(path, sealed(path)).tensors] == ["param/0/a", "param/0/b"]


@pytest.mark.parametrize("name", ["data", "index.json"])
def test_an_altered_point_is_refused(tmp_path: Path, name: str) -> None:
    """One bit is enough, and the message says which point."""
    path = point(tmp_path)
    known = sealed(path)
    data = bytearray((path / name).read_bytes())
    data[5] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(VerificationError, match="replay point of step 20 was altered after it was sealed"):
        open_point(path, known)


def test_a_missing_point_is_unavailable(tmp_path: Path) -> None:
    """Gone is not tampered with: exit status 3."""
    path = point(tmp_path)
    known = sealed(path)
    (path / "data").unlink()
    with pytest.raises(Unavailable, match="is not there any more"):
        open_point(path, known)


@pytest.mark.parametrize(
    "index",
    [
        {"version": 2},
        {"tensors": [["a", "float32", [16], 100, 64]]},
        {"tensors": [["a", "float32", [16], -64, 64]]},
        {"tensors": [["a", "float32", [-1], 0, 64]]},
        {"tensors": "none"},
        {"step": "20"},
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, index: dict[str, Any]) -> None:
    """Offsets, sizes and types are checked before anything is read by them."""
    with pytest.raises(MalformedEvidence):
        read_index(point(tmp_path, **index))


def test_a_link_in_place_of_the_data_is_refused(tmp_path: Path) -> None:
    """Hashing follows no symbolic link."""
    path = point(tmp_path)
    (path / "data").rename(tmp_path / "elsewhere")
    (path / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable):
        seal_point(path)


def test_the_first_tensor_that_differs_is_named(tmp_path: Path) -> None:
    """Random streams are compared step by step, not here."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first, second = point(one), point(two, data=b"\1" * 64 + b"\3" * 64)
    run, clean = digests(first, read_index(first)), digests(second, read_index(second))
    assert first_unequal(run, run) is None
    assert first_unequal(run, clean) == "param/0/b"
    assert first_unequal(run | {"rng/torch": "x"}, run | {"rng/torch": "y"}) is None
    assert first_unequal(run, run | {"param/0/c": "x"}) == "param/0/c"
