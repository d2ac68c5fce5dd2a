"""Appending, publishing and reading back, by many hands at once."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.log import Log, LogReader, journal, load_verifier, parse_proof, verify_proof
from trainguard.log.disk import Disk
from trainguard.log.merkle import verify_consistency
from trainguard.log.proof import encode_proof


def open_log(folder: Path, **settings: object) -> Log:
    return Log.open(folder / "log", folder / "keys" / "log.key", **settings)


def open_reader(folder: Path) -> LogReader:
    return LogReader(folder / "log", folder / "keys" / "log.vkey")


def test_an_append_returns_indexes_and_a_reader_opened_afterwards_sees_it(tmp_path: Path) -> None:
    """Published or not."""
    with open_log(tmp_path) as log:
        assert log.append([b"a", b""]) == [0, 1]
        assert list(open_reader(tmp_path).entries()) == [b"a", b""]
        head = log.publish()
        assert log.append([b"c"]) == [2]
        reader = open_reader(tmp_path)
        assert (head.size, reader.head().size, reader.head().origin) == (2, 3, "trainguard.local")
        assert list(reader.entries(1, 3)) == [b"", b"c"]
    assert list(open_reader(tmp_path).entries(2)) == [b"c"]


def test_a_log_reopened_goes_on_where_it_was(tmp_path: Path) -> None:
    """Same key, next index."""
    for index in range(5):
        with open_log(tmp_path) as log:
            assert log.append([b"%d" % index]) == [index]
    assert [*open_reader(tmp_path).entries()] == [b"0", b"1", b"2", b"3", b"4"]


def test_an_empty_log_has_a_signed_head_of_size_0(tmp_path: Path) -> None:
    """There is never a log without a head, and publishing nothing works."""
    with open_log(tmp_path) as log:
        assert open_reader(tmp_path).head().size == 0
        assert log.publish().size == 0
        assert log.append([]) == []
    assert list(open_reader(tmp_path).entries()) == []
    assert open_reader(tmp_path).verify().head.size == 0


def test_the_key_is_private_and_the_vkey_beside_it_public(tmp_path: Path) -> None:
    """0600 and a vkey that names the log."""
    with open_log(tmp_path, origin="log.example.org") as log:
        key = tmp_path / "keys" / "log.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert (tmp_path / "keys" / "log.vkey").read_text() == log.vkey + "\n"
        assert log.vkey.startswith("log.example.org+")
        log.append([b"x"])
    assert LogReader(tmp_path / "log", log.vkey).head().origin == "log.example.org"


def test_proofs_of_every_entry_verify_offline_across_the_border_of_what_is_published(tmp_path: Path) -> None:
    """Sizes on either side of tiles, published and in the journal; the proof file is all that is needed."""
    with open_log(tmp_path) as log:
        heads = []
        for count in (1, 254, 1, 1, 255, 3, 300):
            log.append([b"%d-%d" % (count, i) for i in range(count)])
            heads.append(log.publish())
        log.append([b"in the journal only"] * 2)
    reader, verifier = open_reader(tmp_path), load_verifier(tmp_path / "keys" / "log.vkey")
    for index, entry in enumerate(reader.entries()):
        text = encode_proof(reader.inclusion(index)).encode()
        assert verify_proof(parse_proof(text), entry, verifier) == reader.head()
    for old in heads:
        path = reader.consistency(old.size)
        verify_consistency(old.size, old.root, reader.head().size, reader.head().root, path)
        assert reader.root_at(old.size) == old.root


def test_threads_share_a_log_and_get_their_own_indexes(tmp_path: Path) -> None:
    """Eight threads; each entry is at the index its append returned, and those of one call are neighbours."""
    got: dict[int, bytes] = {}
    lock = threading.Lock()
    with open_log(tmp_path) as log:

        def work(name: int) -> None:
            for number in range(20):
                batch = [b"%d-%d-%d" % (name, number, i) for i in range(3)]
                indexes = log.append(batch)
                assert indexes == list(range(indexes[0], indexes[0] + 3))
                with lock:
                    got.update(zip(indexes, batch, strict=True))
                if number % 10 == 5:
                    log.publish()

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [got[index] for index in range(480)] == list(open_reader(tmp_path).entries())
    open_reader(tmp_path).verify()


def test_appends_that_wait_together_share_a_sync(tmp_path: Path) -> None:
    """Group commit: twenty threads held up behind one commit need two syncs, not twenty."""

    class Gate(Disk):
        syncs = 0
        shut = threading.Event()
        opened = threading.Event()

        def fdatasync(self, descriptor: int) -> None:
            Gate.syncs += 1
            self.shut.set()
            self.opened.wait(20)
            super().fdatasync(descriptor)

    disk = Gate()
    disk.opened.set()
    with open_log(tmp_path, disk=disk) as log:
        disk.opened.clear()
        disk.shut.clear()
        Gate.syncs = 0
        threads = [threading.Thread(target=log.append, args=([b"%d" % i],)) for i in range(21)]
        threads[0].start()
        assert disk.shut.wait(20)
        for thread in threads[1:]:
            thread.start()
        while len(log._queue) < 20:
            pass
        disk.opened.set()
        for thread in threads:
            thread.join()
        assert Gate.syncs == 2
    assert open_reader(tmp_path).head().size == 21


WORKER = """
import sys
from pathlib import Path
from trainguard.log import Log, journal
journal.SEGMENT_BYTES = 5000
folder = Path(sys.argv[1])
with Log.open(folder / "log", folder / "keys" / "log.key") as log:
    for number in range(60):
        batch = [b"%s %d" % (sys.argv[2].encode(), number)] * (number % 9 + 1)
        print(log.append(batch)[0], len(batch), batch[0].hex())
        if number % 20 == 7:
            log.publish()
"""


def test_several_processes_append_and_publish_at_once_to_one_log(tmp_path: Path) -> None:
    """Four processes start together, make the key together, rotate and drop segments under each other."""
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        for name in "abcd"
    ]
    got: dict[int, bytes] = {}
    for worker in workers:
        output, _ = worker.communicate(timeout=60)
        assert worker.returncode == 0
        for line in output.splitlines():
            first, count, entry = line.split()
            for index in range(int(first), int(first) + int(count)):
                assert index not in got
                got[index] = bytes.fromhex(entry)
    reader = open_reader(tmp_path)
    assert [got[index] for index in range(len(got))] == list(reader.entries())
    assert reader.verify().head.size == len(got)


def test_a_reader_follows_while_a_writer_appends_publishes_and_drops_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers opened at any moment see a whole, verified log that only grows, and their old snapshots stay readable."""
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 3000)
    stop = threading.Event()
    with open_log(tmp_path) as log:
        log.append([b"first"])

        def write() -> None:
            number = 0
            while not stop.is_set():
                log.append([b"%d" % number] * 37)
                number += 1
                if not number % 3:
                    log.publish()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            size, early = 0, open_reader(tmp_path)
            early_head = early.head()
            for _ in range(25):
                reader = open_reader(tmp_path)
                assert reader.head().size >= size
                size = reader.head().size
                assert sum(1 for _ in reader.entries()) == size
                reader.inclusion(size - 1)
                assert reader.verify().head.size >= size
            assert sum(1 for _ in early.entries()) == early_head.size
        finally:
            stop.set()
            writer.join()


def test_a_snapshot_stays_readable_after_its_journal_was_published_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries a reader knew from the journal are found in the bundles, checked against the same tree."""
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 2000)
    with open_log(tmp_path) as log:
        for number in range(40):
            log.append([b"%d" % number] * 10)
        reader = open_reader(tmp_path)
        assert reader.head().size == 400
        log.publish()
        log.append([b"more"] * 300)
        log.publish()
        assert journal.list_segments(tmp_path / "log")[0] > 0
        assert list(reader.entries(95, 105)) == [b"9"] * 5 + [b"10"] * 5
        assert reader.inclusion(399).index == 399


def test_publishing_twice_changes_nothing_and_never_rewrites_a_tile(tmp_path: Path) -> None:
    """Same head, same files with the same inodes."""
    with open_log(tmp_path) as log:
        log.append([b"x"] * 600)
        head = log.publish()
        before = {path: path.stat().st_ino for path in (tmp_path / "log" / "tile").rglob("*")}
        assert log.publish() == head
        log.append([b"y"] * 600)
        log.publish()
        full = {path: inode for path, inode in before.items() if path.is_file() and ".p" not in str(path)}
        assert full == {path: path.stat().st_ino for path in full}


def test_a_tile_with_other_bytes_is_never_overwritten(tmp_path: Path) -> None:
    """A file that lies where a tile shall go, with other content, stops the publish."""
    with open_log(tmp_path) as log:
        log.append([b"x"] * 256)
        (tmp_path / "log/tile/entries").mkdir(parents=True)
        (tmp_path / "log/tile/entries/000").write_bytes(b"theirs")
        with pytest.raises(VerificationError, match="not overwritten"):
            log.publish()
    assert (tmp_path / "log/tile/entries/000").read_bytes() == b"theirs"
    assert not (tmp_path / "log/checkpoint").exists()


def test_partial_tiles_stay_for_published_sizes_until_the_full_one_is_there(tmp_path: Path) -> None:
    """As tlog-tiles demands of sizes for which a tree head was produced."""
    with open_log(tmp_path) as log:
        for count in (5, 5, 5):
            log.append([b"x"] * count)
            log.publish()
        partials = tmp_path / "log/tile/entries/000.p"
        assert sorted(path.name for path in partials.iterdir()) == ["10", "15", "5"]
        log.append([b"x"] * 300)
        log.publish()
        assert not partials.exists()
        assert (tmp_path / "log/tile/entries/000").exists()


def test_large_appends_become_several_records_under_one_sync(tmp_path: Path) -> None:
    """200 entries of 65,535 bytes: one call, one acknowledgement, readable and published."""
    entries = [bytes([i % 256]) * 65535 for i in range(200)]
    with open_log(tmp_path) as log:
        assert log.append(entries) == list(range(200))
        assert list(open_reader(tmp_path).entries(150, 152)) == entries[150:152]
        log.publish()
    assert list(open_reader(tmp_path).entries()) == entries


@pytest.mark.parametrize("entry", [bytes(65536), bytearray(b"x"), "text", None])
def test_what_is_no_entry_is_a_misuse_and_nothing_is_appended(tmp_path: Path, entry: object) -> None:
    """Too long, or not bytes."""
    with open_log(tmp_path) as log:
        with pytest.raises(Misuse, match="log entry"):
            log.append([b"fine", entry])
        assert log.append([b"next"]) == [0]


def test_a_closed_log_and_a_forked_child_must_open_their_own(tmp_path: Path) -> None:
    """A lock held through fork would protect nobody."""
    log = open_log(tmp_path)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        try:
            log.append([b"x"])
        except Misuse as error:
            queue.put(str(error))
        else:
            queue.put("appended")
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    assert "must open the log itself" in queue.get()
    process.join()
    queue.close()
    log.close()
    log.close()
    with pytest.raises(Misuse, match="closed"):
        log.append([b"x"])


def test_another_origin_for_the_same_key_is_a_misuse(tmp_path: Path) -> None:
    """A log is named once."""
    open_log(tmp_path).close()
    with pytest.raises(Misuse, match=r"expected a log named 'b\.example'"):
        open_log(tmp_path, origin="b.example")
    with pytest.raises(MalformedEvidence):
        open_log(tmp_path / "new", origin="with space")
    assert not (tmp_path / "new").exists()


def test_a_log_without_its_key_is_unavailable_and_gets_no_new_one(tmp_path: Path) -> None:
    """A new key would be a new log under an old name."""
    open_log(tmp_path).close()
    (tmp_path / "keys/log.key").rename(tmp_path / "away")
    with pytest.raises(Unavailable, match="signing key is not there"):
        open_log(tmp_path)
    assert not (tmp_path / "keys/log.key").exists()


def test_a_log_signed_by_another_key_is_refused_at_open(tmp_path: Path) -> None:
    """Someone replaced the key, and the vkey with it."""
    with open_log(tmp_path) as log:
        log.append([b"x"])
    open_log(tmp_path / "other").close()
    for name in ("log.key", "log.vkey"):
        (tmp_path / "keys" / name).write_bytes((tmp_path / "other/keys" / name).read_bytes())
    with pytest.raises(VerificationError, match="expected a signature by"):
        open_log(tmp_path)


def test_a_vkey_that_does_not_belong_to_the_key_is_refused(tmp_path: Path) -> None:
    """The public half is what others trust; it is not replaced silently."""
    open_log(tmp_path).close()
    open_log(tmp_path / "other").close()
    (tmp_path / "keys/log.vkey").write_bytes((tmp_path / "other/keys/log.vkey").read_bytes())
    with pytest.raises(VerificationError, match="found another"):
        open_log(tmp_path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """Mode 0644 on a signing key is a misuse with a next step."""
    open_log(tmp_path).close()
    (tmp_path / "keys/log.key").chmod(0o644)
    with pytest.raises(Misuse, match="mode 644") as caught:
        open_log(tmp_path)
    assert "chmod 600" in (caught.value.next_step or "")


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_key_file_that_is_none_is_malformed(tmp_path: Path, content: bytes) -> None:
    """Never a leaked ValueError."""
    open_log(tmp_path).close()
    (tmp_path / "keys/log.key").write_bytes(content)
    with pytest.raises(MalformedEvidence, match="Ed25519 private key"):
        open_log(tmp_path)


def test_a_damaged_edge_costs_only_time(tmp_path: Path) -> None:
    """It is a cache: opening goes the full way; the audit is what names it."""
    with open_log(tmp_path) as log:
        log.append([b"x"] * 10)
    (tmp_path / "log/edge").write_bytes(b"TGE1 nonsense" * 9)
    with pytest.raises(VerificationError, match="edge"):
        open_reader(tmp_path).verify()
    with open_log(tmp_path) as log:
        assert log.append([b"y"]) == [10]
    open_reader(tmp_path).verify()


def test_a_damaged_journal_is_refused_at_open_and_left_as_it_is(tmp_path: Path) -> None:
    """An insider's edit is not repaired away: the bytes stay as evidence."""
    with open_log(tmp_path) as log:
        log.append([b"some evidence"])
        log.append([b"more evidence"])
    (tmp_path / "log/edge").unlink()
    segment = journal.segment_path(tmp_path / "log", 0)
    damaged = segment.read_bytes().replace(b"some evidence", b"none evidence")
    segment.write_bytes(damaged)
    with pytest.raises(MalformedEvidence, match="do not have their checksum"):
        open_log(tmp_path)
    assert segment.read_bytes() == damaged


def test_an_edit_with_a_right_checksum_fails_on_the_signed_head(tmp_path: Path) -> None:
    """Checksums are for accidents; the signature is for insiders."""
    with open_log(tmp_path) as log:
        log.append([b"some evidence"])
    (tmp_path / "log/edge").unlink()
    segment = journal.segment_path(tmp_path / "log", 0)
    first, record, _ = journal.parse_records(segment.read_bytes(), where="")
    forged = journal.encode_record(0, 1, record.note, b"\x00\x0dnone evidence")
    segment.write_bytes(segment.read_bytes()[: first.end] + forged)
    for attempt in (lambda: open_log(tmp_path), open_reader(tmp_path).head, open_reader(tmp_path).verify):
        with pytest.raises(VerificationError, match="root"):
            attempt()


@pytest.mark.parametrize("call", ["entries", "inclusion", "consistency", "root_at"])
def test_asking_beyond_the_log_is_a_misuse(tmp_path: Path, call: str) -> None:
    """With the size in the message."""
    with open_log(tmp_path) as log:
        log.append([b"x"])
    with pytest.raises(Misuse, match="1"):
        list(getattr(open_reader(tmp_path), call)(2))
    with pytest.raises(Misuse):
        list(getattr(open_reader(tmp_path), call)(-1))


@pytest.mark.parametrize("vkey", ["nothing", "a+b+c", Path("/nonexistent/log.vkey")])
def test_a_reader_needs_a_vkey(tmp_path: Path, vkey: object) -> None:
    """Neither a key's text nor a file that holds one."""
    with pytest.raises(Unavailable, match="vkey"):
        LogReader(tmp_path, vkey)
