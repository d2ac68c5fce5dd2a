"""The register of sources: what is signed, what is refused, what a damaged manifest does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.sourced import digest, shard

from trainguard.archive import LogLeaves
from trainguard.errors import MalformedEvidence, Misuse, TrainguardError
from trainguard.home import Home
from trainguard.sources.register import Register, add, parse_rows, read_register, withdraw
from trainguard.sources.shard import Shard, parse_shard, read_shard


def register_of(home: Home) -> Register:
    return read_register(LogLeaves(home), home)


def test_a_shard_is_registered_with_licence_and_use_and_its_content(tmp_path: Path) -> None:
    """What was said at `add` can be read back from the log alone."""
    home = Home(tmp_path / "state")
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"one")
    (folder / "deep" / "b.bin").write_bytes(b"two")
    add(home, source="acme/photos", path=folder, licence="CC-BY-4.0", use="training", terms="contract 7", name="images")
    [(name, source)] = register_of(home).sources.items()
    assert name == "acme/photos"
    [entry] = source.added
    assert (entry.shard, entry.licence, entry.use, entry.terms) == ("images", "CC-BY-4.0", "training", "contract 7")
    [manifest] = source.shards.values()
    assert manifest.files == {"a.bin": f"{digest(b'one')} 3", "deep/b.bin": f"{digest(b'two')} 3"}


def test_a_link_to_a_file_is_its_content_and_a_link_to_a_folder_is_left_out_and_said(tmp_path: Path) -> None:
    """Content counts; what was not read is named."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "far.bin").write_bytes(b"far")
    (folder / "link.bin").symlink_to(tmp_path / "far.bin")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")
    found = read_shard(folder)
    assert found.contents == {digest(b"far"): 3}
    assert sorted(note.split(":")[0] for note in found.left_out) == ["folder", "pipe"]


def test_a_withdrawn_source_takes_no_more_shards_and_stays_withdrawn(tmp_path: Path) -> None:
    """Neither a second withdrawal nor an addition changes what was said."""
    home = Home(tmp_path / "state")
    path = shard(home, tmp_path, "acme", "a.bin", b"data")
    first = withdraw(home, source="acme", reason="consent withdrawn")
    with pytest.raises(Misuse, match="withdrawn already"):
        withdraw(home, source="acme", reason="again")
    with pytest.raises(Misuse, match="nothing is added to it"):
        add(home, source="acme", path=path, licence="MIT", use="training")
    source = register_of(home).of("acme")
    assert source.withdrawn is not None
    assert (source.withdrawn.leaf, source.withdrawn.reason) == (first.leaf, "consent withdrawn")
    assert len(source.added) == 1


def test_registering_withdrawn_content_under_another_name_is_said(tmp_path: Path) -> None:
    """Laundering does not work, and whoever does it in good faith learns of it at once."""
    home = Home(tmp_path / "state")
    path = shard(home, tmp_path, "acme", "a.bin", b"data")
    withdraw(home, source="acme", reason="consent withdrawn")
    added = add(home, source="ours", path=path, licence="own", use="training")
    assert any("acme too, which was withdrawn" in note for note in added.notes)
    known = register_of(home).contents[digest(b"data")]
    assert [source.name for source, _, _ in known] == ["acme", "ours"]


@pytest.mark.parametrize("name", ["", " acme", "a b", "-x", "ä", "a" * 201, "a\nb"])
def test_a_name_that_no_source_can_have_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    """Nothing is in the log afterwards."""
    home = Home(tmp_path / "state")
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    with pytest.raises(Misuse, match="source"):
        add(home, source=name, path=path, licence="MIT", use="training")
    assert not home.log.exists()


def test_an_unknown_source_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    """One sentence with the way on."""
    home = Home(tmp_path / "state")
    shard(home, tmp_path, "acme", "a.bin", b"data")
    with pytest.raises(Misuse, match="found acme"):
        withdraw(home, source="acne", reason="typing")


def test_a_manifest_that_was_altered_is_a_problem_and_no_content(tmp_path: Path) -> None:
    """A manifest swapped on the disk cannot hide content: it is known to be missing."""
    home = Home(tmp_path / "state")
    shard(home, tmp_path, "acme", "a.bin", b"data")
    [blob] = [path for path in home.blobs.iterdir() if b"trainguard/shard" in path.read_bytes()]
    blob.write_bytes(blob.read_bytes().replace(digest(b"data").encode(), digest(b"tada").encode()))
    register = register_of(home)
    assert len(register.problems) == 1
    assert register.contents == {}


@given(st.binary(max_size=80))
def test_no_bytes_that_are_not_a_manifest_parse_as_one(data: bytes) -> None:
    """Whatever they are, the refusal is a typed one."""
    with pytest.raises(MalformedEvidence):
        parse_shard(data, where="x")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "trainguard/shard/v9"},
        {"files": {"a": "short 3"}},
        {"files": {"a": f"{'a' * 64} -1"}},
        {"files": {"a": f"{'a' * 64} ²"}},
        {"rows": [5, 5]},
        {"rows": [0, 5], "files": {"a": f"{'a' * 64} 1", "b": f"{'b' * 64} 1"}},
        {"more": 1},
    ],
)
def test_a_manifest_with_one_thing_wrong_is_refused(change: dict[str, object]) -> None:
    """Every field is checked; unknown ones are refused."""
    whole = {"schema": "trainguard/shard/v1", "name": "n", "root": "/r", "files": {"a": f"{'a' * 64} 1"}}
    assert isinstance(parse_shard(json.dumps(whole).encode(), where="x"), Shard)
    with pytest.raises(MalformedEvidence):
        parse_shard(json.dumps(whole | change).encode(), where="x")


@pytest.mark.parametrize("text", ["", "1", "5:", ":5", "-1:4", "1:2:3", "a:b", "1" * 16 + ":2"])
def test_rows_are_read_strictly(text: str) -> None:
    """Only FIRST:END."""
    with pytest.raises(TrainguardError):
        parse_rows(text)


def test_rows_of_a_folder_or_of_nothing_are_refused(tmp_path: Path) -> None:
    """Rows are of one file, the first before the last."""
    with pytest.raises(Misuse, match="one file"):
        read_shard(tmp_path, rows=(0, 3))
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    with pytest.raises(Misuse, match="FIRST before END"):
        read_shard(path, rows=(3, 3))
    with pytest.raises(Misuse, match="found nothing"):
        read_shard(tmp_path / "none")
