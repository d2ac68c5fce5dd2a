"""The record of a run: what was sealed comes back, and nothing else passes for it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainguard.archive import LogLeaves, RunReader, RunWriter, TruncatedRecord
from trainguard.envelope import load_or_create_key
from trainguard.errors import Misuse, VerificationError
from trainguard.home import Home
from trainguard.log import Log


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "state")
    home.prepare()
    return home


@pytest.fixture
def log(home: Home) -> Iterator[Log]:
    log = Log.open(home.log, home.keys / "log.key")
    yield log
    log.close()


def writer(home: Home, log: Log, run: str = "r") -> RunWriter:
    made = RunWriter(home, run, log, load_or_create_key(home.keys / "attestation.pem"))
    made.begin({"command": ["true"]})
    return made


def recorded(home: Home, log: Log, run: str = "r") -> Path:
    """A finished run of three segments; returns its spool."""
    made = writer(home, log, run)
    for number in range(6):
        made.add("note", {"number": number})
        if number % 2:
            made.seal(final=number == 5)
    made.close()
    return home.run(run) / "spool"


def numbers(home: Home, run: str = "r") -> list[int]:
    return [record.body["number"] for record in RunReader(home, run).records()]


def test_what_was_sealed_comes_back(home: Home, log: Log) -> None:
    """Every record, in order, each under a leaf of the log."""
    recorded(home, log)
    reader = RunReader(home, "r")
    records = list(reader.records())
    assert [r.body["number"] for r in records] == list(range(6))
    assert {r.leaf for r in records} == {leaf.leaf for leaf in reader.segments}
    assert reader.ended
    assert not reader.running


def test_a_run_in_progress_is_seen_as_running(home: Home, log: Log) -> None:
    """The writer holds its spool; unsealed records are not yielded."""
    made = writer(home, log)
    made.add("note", {"number": 0})
    reader = RunReader(home, "r")
    assert reader.running
    assert list(reader.records()) == []
    assert reader.unsealed_bytes > 0
    made.close()


def test_every_flipped_byte_of_a_sealed_spool_is_refused(home: Home, log: Log) -> None:
    """G1: no edit of a sealed record goes unnoticed."""
    spool = recorded(home, log)
    original = spool.read_bytes()
    for position in range(0, len(original), 7):
        flipped = bytearray(original)
        flipped[position] ^= 1
        spool.write_bytes(flipped)
        with pytest.raises(VerificationError, match="not the ones that were sealed"):
            numbers(home)


def test_a_cut_spool_is_refused_as_truncated(home: Home, log: Log) -> None:
    """G2: the log says how long the record was."""
    spool = recorded(home, log)
    os.truncate(spool, spool.stat().st_size - 10)
    with pytest.raises(TruncatedRecord, match="the spool ends after"):
        numbers(home)


def test_a_removed_spool_is_refused(home: Home, log: Log) -> None:
    """The log still says what there was."""
    recorded(home, log).unlink()
    with pytest.raises(VerificationError, match="3 sealed segments"):
        numbers(home)


def test_another_runs_spool_is_refused(home: Home, log: Log) -> None:
    """Records cannot stand in for those of another run."""
    recorded(home, log, "a")
    spool = recorded(home, log, "b")
    (home.run("a") / "spool").write_bytes(spool.read_bytes())
    with pytest.raises(VerificationError):
        numbers(home, "a")


def test_segments_signed_by_another_key_are_not_taken(home: Home, log: Log, tmp_path: Path) -> None:
    """E10: a statement in the log by a key that is not ours is not evidence."""
    foreign = RunWriter(home, "x", log, load_or_create_key(tmp_path / "other.pem"))
    foreign.begin({})
    foreign.add("note", {"number": 1})
    foreign.seal(final=True)
    foreign.close()
    recorded(home, log, "r")
    leaves = LogLeaves(home)
    assert set(leaves.runs) == {"r"}
    assert len(leaves.unreadable) == 2


def test_a_run_id_is_used_once(home: Home, log: Log) -> None:
    """A second run of the same name is refused before it starts."""
    recorded(home, log)
    with pytest.raises(Misuse, match="exists already"):
        writer(home, log)


def test_a_full_disk_loses_records_and_says_how_many(home: Home, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing raises into the supervisor; the gap is in the record once there is room again."""
    made = writer(home, log)
    made.add("note", {"number": 0})
    with monkeypatch.context() as full:

        def no_space(descriptor: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr("trainguard.archive.os.write", no_space)
        assert made.add("note", {"number": 1}) is None
        assert made.add("note", {"number": 2}) is None
    made.add("note", {"number": 3})
    made.seal(final=True)
    made.close()
    kinds = [(r.kind, r.body) for r in RunReader(home, "r").records()]
    assert kinds[0] == ("note", {"number": 0})
    assert kinds[1] == ("gap", {"lost": 2, "reason": "the spool could not be written"})
    assert kinds[2] == ("note", {"number": 3})


def test_a_partial_write_leaves_no_half_line(home: Home, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of a line: the line is taken back whole."""
    made = writer(home, log)
    real, calls = os.write, []

    def partial(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 1:
            return real(descriptor, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("trainguard.archive.os.write", partial)
        assert made.add("note", {"number": 0}) is None
    assert (home.run("r") / "spool").stat().st_size == 0
    made.add("note", {"number": 1})
    made.seal(final=True)
    made.close()
    assert [r.kind for r in RunReader(home, "r").records()] == ["gap", "note"]


def test_what_could_not_be_sealed_is_sealed_later(home: Home, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that cannot be written for a while delays the seal and loses nothing."""
    made = writer(home, log)
    made.add("note", {"number": 0})
    with monkeypatch.context() as broken:

        def fails(entries: object) -> list[int]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        broken.setattr(log, "append", fails)
        assert made.seal() is None
    made.add("note", {"number": 1})
    assert made.seal(final=True) is not None
    made.close()
    assert numbers(home) == [0, 1]
