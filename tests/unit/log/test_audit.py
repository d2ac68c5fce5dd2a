"""The full audit finds any one flipped bit, and whatever else was done to a log's folder, and says where."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from trainguard.errors import MalformedEvidence, Unavailable, VerificationError
from trainguard.log import Log, LogReader, journal, load_verifier, reader
from trainguard.log.publish import read_published

ENTRIES = 1100
"""Four full bundles, a partial one, a level-1 tile, and 76 that are only in the journal yet."""


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PAUSE_SECONDS", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with everything in it: several segments, partial tiles of two sizes, entries not published."""
    folder = tmp_path_factory.mktemp("log")
    patch = pytest.MonkeyPatch()
    patch.setattr(journal, "SEGMENT_BYTES", 8192)
    with Log.open(folder / "log", folder / "log.key") as log:
        for start, end, publish in ((0, 700, True), (700, 1000, True), (1000, 1020, True), (1020, ENTRIES, False)):
            for index in range(start, end, 20):
                log.append([b"entry %d " % i * 3 for i in range(index, index + 20)])
            if publish:
                log.publish()
    patch.undo()
    assert LogReader(folder / "log", folder / "log.vkey").verify().head.size == ENTRIES
    return folder


@pytest.fixture
def log(made: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(made / "log", tmp_path / "log")
    shutil.copy(made / "log.vkey", tmp_path / "log.vkey")
    return tmp_path / "log"


def verify(log: Path) -> object:
    return LogReader(log, log.parent / "log.vkey").verify()


def evidence_files(log: Path) -> list[Path]:
    return sorted(path for path in log.rglob("*") if path.is_file() and path.stat().st_size)


def test_an_honest_log_upholds_and_says_what_was_checked(log: Path) -> None:
    """The audit counts entries, files and records; nothing is torn."""
    audit = verify(log)
    assert (audit.head.size, audit.published, audit.torn_bytes) == (ENTRIES, 1020, 0)
    assert audit.tiles == len([path for path in (log / "tile").rglob("*") if path.is_file()])
    assert audit.records >= 4


@pytest.mark.parametrize("seed", range(4))
def test_any_flipped_bit_in_any_file_is_found(log: Path, seed: int) -> None:
    """400 random bits over tiles, bundles, tree head, edge and journal: each is found, and only while it is flipped."""
    source = random.Random(seed)
    files = evidence_files(log)
    assert {path.relative_to(log).parts[0] for path in files} == {"checkpoint", "edge", "journal", "tile"}
    for number in range(100):
        path = source.choice(files) if number % 2 else source.choices(files, [f.stat().st_size for f in files])[0]
        data = path.read_bytes()
        bit = source.randrange(8 * len(data))
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        with pytest.raises(VerificationError):
            verify(log)
        path.write_bytes(data)
    verify(log)


def test_every_bit_of_the_published_tree_head_is_covered(log: Path) -> None:
    """Not a sample: each single bit of `checkpoint`."""
    verifier = load_verifier(log.parent / "log.vkey")
    data = (log / "checkpoint").read_bytes()
    for bit in range(8 * len(data)):
        spoiled = bytearray(data)
        spoiled[bit // 8] ^= 1 << bit % 8
        (log / "checkpoint").write_bytes(spoiled)
        with pytest.raises(VerificationError):
            read_published(log, verifier)
    (log / "checkpoint").write_bytes(data)
    assert read_published(log, verifier) is not None


def test_an_altered_entry_is_named_by_its_index(log: Path) -> None:
    """Change one entry in a full bundle: the message has the bundle's path and the entry's index."""
    bundle = log / "tile" / "entries" / "002"
    bundle.write_bytes(bundle.read_bytes().replace(b"entry 517 ", b"entry 51X ", 1))
    with pytest.raises(VerificationError, match=r"tile/entries/002: entry 517 was altered"):
        verify(log)


def test_a_level_0_tile_altered_together_with_its_bundle_is_found(log: Path) -> None:
    """Recomputing the tile does not help the forger: its root is in the level above."""
    from trainguard.log.merkle import leaf_hash
    from trainguard.log.tiles import ENTRIES as BUNDLE
    from trainguard.log.tiles import Tile, encode_bundle
    from trainguard.log.tree import read_bundle

    entries = read_bundle(log, Tile(BUNDLE, 1))
    entries[7] = b"forged"
    (log / "tile/entries/001").write_bytes(encode_bundle(entries))
    (log / "tile/0/001").write_bytes(b"".join(map(leaf_hash, entries)))
    with pytest.raises(VerificationError, match=r"tile/0/001: does not hash to what the signed tree has"):
        verify(log)
    with pytest.raises(VerificationError, match="entries/001"):
        list(LogReader(log, log.parent / "log.vkey").entries(256, 300))
    with pytest.raises(VerificationError, match=r"0/001"):
        LogReader(log, log.parent / "log.vkey").inclusion(300)


@pytest.mark.parametrize("name", ["tile/0/001", "tile/entries/002", "tile/1/000.p/3", "tile/entries/003.p/252"])
def test_a_missing_tile_is_named(log: Path, name: str) -> None:
    """Every file that the published size needs must be there."""
    (log / name).unlink()
    with pytest.raises(VerificationError, match=name.replace(".p/3", "").replace(".p/252", "")):
        verify(log)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tile/0/999", "beyond"),
        ("tile/0/1", "expected the path"),
        ("tile/9/000", "expected the path"),
        ("tile/0/000.p/256", "expected the path"),
        ("tile/0/000.p/300", "expected the path"),
        ("notes.txt", "not part of a log"),
        ("journal/7", "not a segment"),
    ],
)
def test_a_foreign_file_is_refused(log: Path, name: str, words: str) -> None:
    """What has no business in a log is not passed over."""
    (log / name).parent.mkdir(exist_ok=True, parents=True)
    (log / name).write_bytes(bytes(8192))
    with pytest.raises(VerificationError, match=words):
        verify(log)


def test_a_symbolic_link_is_refused(log: Path, tmp_path: Path) -> None:
    """A tile that is elsewhere can be another one tomorrow."""
    (log / "tile/0/001").rename(tmp_path / "elsewhere")
    (log / "tile/0/001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationError, match="symbolic link"):
        verify(log)


@pytest.mark.parametrize(("left", "words"), [(0, "checkpoint was signed for 1020"), (1, "edge was signed for 1100")])
def test_entries_cut_from_the_journal_are_missed(log: Path, left: int, words: str) -> None:
    """Whole records cut off the end: `checkpoint` remembers what was published, and the edge the rest."""
    last = journal.segment_path(log, journal.list_segments(log)[-1])
    items = list(journal.parse_records(last.read_bytes(), where=""))
    os.truncate(last, items[-2].start if left else 0)
    with pytest.raises(VerificationError, match=words):
        verify(log)
    with pytest.raises(VerificationError, match="the edge was signed for 1100"):
        LogReader(log, log.parent / "log.vkey").head()


def test_a_torn_end_is_reported_but_is_no_violation(log: Path) -> None:
    """Half a record, as a killed writer leaves it, was never acknowledged."""
    last = journal.segment_path(log, journal.list_segments(log)[-1])
    record = journal.encode_record(ENTRIES, 1, b"note", b"\0\1x")
    with last.open("ab") as file:
        file.write(record[:-3])
    assert verify(log).torn_bytes == len(record) - 3


def test_a_fork_signed_with_the_right_key_is_found(made: Path, log: Path, tmp_path: Path) -> None:
    """Even the key's owner cannot show another tree head of a size this log has."""
    shutil.copy(made / "log.key", tmp_path / "log.key")
    with Log.open(tmp_path / "other", tmp_path / "log.key") as other:
        other.append([b"another history"] * 1000)
        other.publish()
    shutil.copy(tmp_path / "other" / "edge", log / "edge")
    with pytest.raises(VerificationError, match="a fork"):
        verify(log)
    (log / "edge").unlink()
    verify(log)


def test_another_key_is_refused(log: Path, tmp_path: Path) -> None:
    """A log signed by someone else under the same name."""
    Log.open(tmp_path / "theirs", tmp_path / "keys" / "other.key").close()
    with pytest.raises(VerificationError, match=r"expected a signature by trainguard\.local"):
        LogReader(log, tmp_path / "keys" / "other.vkey").verify()


def test_a_folder_without_a_log_is_unavailable_not_clean(tmp_path: Path, log: Path) -> None:
    """Nothing there is no verdict."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(Unavailable, match="no log here"):
        LogReader(tmp_path / "empty", log.parent / "log.vkey").verify()
    with pytest.raises(Unavailable):
        LogReader(tmp_path / "absent", log.parent / "log.vkey").verify()


def test_a_published_copy_without_journal_verifies(log: Path) -> None:
    """What is served elsewhere, `checkpoint` and `tile/`, is a log of its own."""
    shutil.rmtree(log / "journal")
    for name in ("edge", "lock", "publish.lock"):
        (log / name).unlink()
    shutil.rmtree(log / "tmp")
    assert verify(log).head.size == 1020


def test_a_journal_that_begins_too_late_is_refused(log: Path) -> None:
    """A gap between the tiles and the journal would hide entries."""
    for segment in journal.list_segments(log)[:-1]:
        journal.segment_path(log, segment).unlink()
    first = journal.list_segments(log)[0]
    journal.segment_path(log, first).rename(journal.segment_path(log, 1050))
    with pytest.raises(MalformedEvidence, match="begins with 1050"):
        verify(log)
