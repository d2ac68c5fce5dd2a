"""Whatever happens to the disk or the process, no acknowledged entry is lost and no two heads disagree.

Every storage step is broken in turn: it fails, it takes effect and still reports failure, it writes half; the power
goes and takes what was not synced; the process is killed before or after the call. Each time the whole log is verified,
and every tree head ever shown must be the root of a beginning of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainguard.errors import Unavailable, VerificationError
from trainguard.log import Log, LogReader, TreeHead
from trainguard.log import journal as journal_module
from trainguard.log.disk import Disk

SEGMENT_BYTES = 4096
"""Small, so that the short stories below rotate and drop segments."""


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", SEGMENT_BYTES)


@pytest.fixture
def fast() -> Iterator[Path]:
    """A folder in memory: these tests make thousands of files, and no real disk is needed to break one."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


class Injected(OSError):
    """The error of a broken disk."""


class BrokenDisk(Disk):
    """Fails call number `broken`, counted from 1, in one of the ways of `MODES`; syncs cost nothing."""

    MODES = ("failed", "failed but persisted", "half written")

    def __init__(self, broken: int = 0, mode: str = "failed") -> None:
        self.calls = 0
        self.broken, self.mode = broken, mode
        self.fired = ""
        self.names: list[str] = []

    def _call(self, name, real, *arguments):
        self.calls += 1
        self.names.append(name)
        if self.calls != self.broken:
            return real(*arguments)
        self.fired = name
        if self.mode == "failed but persisted":
            result = real(*arguments)
            if name == "open":
                os.close(result)
        elif self.mode == "half written" and name == "write":
            descriptor, data, offset = arguments
            real(descriptor, data[: len(data) // 2], offset)
        raise Injected(5, f"injected into {name}")

    def open(self, path, flags, mode=0o644):
        return self._call("open", super().open, path, flags, mode)

    def write(self, descriptor, data, offset):
        return self._call("write", super().write, descriptor, data, offset)

    def fdatasync(self, descriptor):
        return self._call("fdatasync", lambda _: None, descriptor)

    def fsync(self, descriptor):
        return self._call("fsync", lambda _: None, descriptor)

    def truncate(self, descriptor, size):
        return self._call("truncate", super().truncate, descriptor, size)

    def rename(self, old, new):
        return self._call("rename", super().rename, old, new)

    def link(self, old, new):
        return self._call("link", super().link, old, new)

    def unlink(self, path):
        return self._call("unlink", super().unlink, path)

    def rmdir(self, path):
        return self._call("rmdir", super().rmdir, path)

    def mkdir(self, path, mode=0o755):
        return self._call("mkdir", super().mkdir, path, mode)


class Story:
    """A life of a log: what was acknowledged, and which heads were shown to someone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.acknowledged: dict[int, bytes] = {}
        self.heads: list[TreeHead] = []
        self.number = 0

    def open(self, disk: Disk) -> Log:
        return Log.open(self.folder / "log", self.folder / "keys" / "log.key", disk=disk)

    def append(self, log: Log, count: int, size: int = 20) -> None:
        entries = [b"%07d" % (self.number + i) * (size // 7 + 1) for i in range(count)]
        self.number += count
        self.acknowledged.update(zip(log.append(entries), entries, strict=True))

    def steps(self) -> list:
        """Appends of many sizes across tile and segment boundaries, with publishes between."""
        return [
            lambda log: self.append(log, 1),
            lambda log: self.append(log, 3),
            lambda log: self.heads.append(log.publish()),
            lambda log: self.append(log, 300),
            lambda log: self.append(log, 1),
            lambda log: self.append(log, 2, size=5000),
            lambda log: self.append(log, 1),
            lambda log: self.heads.append(log.publish()),
            lambda log: self.append(log, 260),
            lambda log: self.heads.append(log.publish()),
            lambda log: self.append(log, 1),
        ]

    def tell(self, disk: Disk, retries: int = 0) -> None:
        """Live through all steps; with `retries`, go on in the same process after a failure."""
        with self.open(disk) as log:
            for step in self.steps():
                for attempt in range(retries + 1):
                    try:
                        step(log)
                        break
                    except Unavailable:
                        self.look()  # what was persisted although it failed has a signed head, and may be read now
                        if attempt == retries:
                            raise

    def look(self) -> None:
        """Note the head a reader sees now."""
        try:
            self.heads.append(LogReader(self.folder / "log", self.folder / "keys" / "log.vkey").head())
        except Unavailable:
            assert not self.acknowledged

    def check(self) -> None:
        """Reopen, append, publish: everything acknowledged is there, every head shown is of this log."""
        self.look()
        with self.open(Disk()) as log:
            self.append(log, 2)
            self.heads.append(log.publish())
        reader = LogReader(self.folder / "log", self.folder / "keys" / "log.vkey")
        audit = reader.verify()
        entries = list(reader.entries())
        assert len(entries) == audit.head.size
        for index, entry in self.acknowledged.items():
            assert entries[index] == entry
        for head in self.heads:
            assert reader.root_at(head.size) == head.root


def calls_to_break(folder: Path, mode: str) -> list[int]:
    """The numbers of the calls in a whole story that can fail in this way."""
    disk = BrokenDisk()
    Story(folder).tell(disk)
    return [n for n, name in enumerate(disk.names, 1) if name == "write" or mode != "half written"]


@pytest.mark.parametrize("mode", BrokenDisk.MODES)
def test_every_storage_step_may_fail_and_the_next_process_finds_a_whole_log(mode: str, fast: Path) -> None:
    """Break each call in turn, give up at the first error, look, reopen."""
    calls = calls_to_break(fast / "whole", mode)
    assert len(calls) > (30 if mode == "half written" else 100)
    for broken in calls:
        story, disk = Story(fast / str(broken)), BrokenDisk(broken, mode)
        with contextlib.suppress(Unavailable):  # some calls only keep caches, and their failure is nobody's loss
            story.tell(disk)
        assert disk.fired
        story.check()
        shutil.rmtree(story.folder)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", BrokenDisk.MODES)
def test_every_storage_step_may_fail_and_the_same_process_goes_on(mode: str, fast: Path) -> None:
    """Break each call in turn after the open, try the step again, finish the story, and look after every step."""
    for broken in calls_to_break(fast / "whole", mode):
        story, disk = Story(fast / str(broken)), BrokenDisk(broken, mode)
        try:
            story.tell(disk, retries=1)
        except Unavailable:
            assert not story.acknowledged  # only opening is not tried again
        else:
            assert len(story.acknowledged) == 569
        story.check()
        shutil.rmtree(story.folder)


class PowerCut(BaseException):
    """The machine stops here."""


class CutDisk(Disk):
    """Loses, at call number `cut`, every byte written since the file's last sync, and names whose folder was not."""

    def __init__(self, cut: int, *, names: bool) -> None:
        self.calls, self.cut, self.names = 0, cut, names
        self.synced: dict[int, bytes] = {}
        self.lost_names: dict[Path, Path | None] = {}

    def _call(self, real, *arguments):
        self.calls += 1
        if self.calls == self.cut:
            raise PowerCut
        return real(*arguments)

    def open(self, path, flags, mode=0o644):
        new = flags & os.O_CREAT and not os.path.exists(path)
        descriptor = self._call(super().open, path, flags, mode)
        if new:
            self.lost_names[Path(path)] = None
        return descriptor

    def write(self, descriptor, data, offset):
        return self._call(super().write, descriptor, data, offset)

    def _sync(self, descriptor):
        status = os.fstat(descriptor)
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            folder = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.lost_names = {path: old for path, old in self.lost_names.items() if path.parent != folder}
        else:
            self.synced[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def fdatasync(self, descriptor):
        self._call(self._sync, descriptor)

    def fsync(self, descriptor):
        self._call(self._sync, descriptor)

    def truncate(self, descriptor, size):
        self._call(super().truncate, descriptor, size)

    def rename(self, old, new):
        if not new.exists():
            self.lost_names[new] = None
        self._call(super().rename, old, new)
        self.lost_names.pop(old, None)

    def link(self, old, new):
        self._call(super().link, old, new)
        self.lost_names[new] = None

    def unlink(self, path):
        self._call(super().unlink, path)

    def rmdir(self, path):
        self._call(super().rmdir, path)

    def mkdir(self, path, mode=0o755):
        self._call(super().mkdir, path, mode)
        self.lost_names[path] = None

    def lose(self, folder: Path) -> None:
        """What is on the disk when the power is back."""
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            path.write_bytes(self.synced.get(path.stat().st_ino, b""))
        for path in self.lost_names if self.names else ():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@pytest.mark.parametrize("names", [False, True], ids=["names survive", "unsynced names are lost"])
def test_a_power_cut_at_any_storage_step_loses_nothing_acknowledged(names: bool, fast: Path) -> None:
    """What an append or a publish returned was on the disk, with the names that lead to it."""
    whole = CutDisk(0, names=names)
    (fast / "whole").mkdir()
    Story(fast / "whole").tell(whole)
    for cut in range(1, whole.calls + 1):
        story, disk = Story(fast / str(cut)), CutDisk(cut, names=names)
        story.folder.mkdir()
        with pytest.raises(PowerCut):
            story.tell(disk)
        disk.lose(story.folder)
        story.check()
        shutil.rmtree(story.folder)


class ForgetfulDisk(Disk):
    """A kernel that reports a failed write-back once, then takes the pages for clean: what it did not write is gone."""

    def __init__(self) -> None:
        self.fail_next = False
        self.dirty: list[tuple[int, bytes]] = []
        self.platter = bytearray()

    def write(self, descriptor, data, offset):
        self.dirty.append((offset, bytes(data)))
        return super().write(descriptor, data, offset)

    def fdatasync(self, descriptor):
        dirty, self.dirty = self.dirty, []
        if self.fail_next:
            self.fail_next = False
            raise Injected(5, "injected into fdatasync")
        for offset, data in dirty:
            self.platter.extend(bytes(max(0, offset + len(data) - len(self.platter))))
            self.platter[offset : offset + len(data)] = data


def test_after_a_failed_sync_the_same_bytes_are_written_again(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second fdatasync that succeeds says nothing about what the first one lost."""
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1 << 20)
    story, disk = Story(fast), ForgetfulDisk()
    log = story.open(disk)
    story.append(log, 2)
    disk.fail_next = True
    with pytest.raises(Unavailable):
        log.append([b"reported as failed, but its head may have been read"])
    story.look()
    story.append(log, 2)
    segment = journal_module.segment_path(fast / "log", 0)
    assert bytes(disk.platter) == segment.read_bytes()
    assert sorted(story.acknowledged) == [0, 1, 3, 4]
    log.close()
    story.check()


def test_a_publish_that_could_not_sync_leaves_the_same_doubt(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have lost another process's records: they are written again before they are relied on."""
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 1 << 20)
    story, disk = Story(fast), ForgetfulDisk()
    log = story.open(disk)
    story.append(log, 1)
    with story.open(Disk()) as other:
        story.append(other, 1)
    disk.fail_next = True
    with pytest.raises(Unavailable):
        log.publish()
    story.heads.append(log.publish())
    assert bytes(disk.platter) == journal_module.segment_path(fast / "log", 0).read_bytes()
    log.close()
    story.check()


KILLED = textwrap.dedent(
    """
    import json, os, signal, sys
    from pathlib import Path
    from trainguard.log import Log
    from trainguard.log import journal
    journal.SEGMENT_BYTES = 4096

    CALLS = ("open", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "replace", "link", "unlink",
             "mkdir", "rmdir")

    def die_at(number, after):
        count = 0
        def wrap(real):
            def call(*arguments, **keywords):
                nonlocal count
                count += 1
                if count == number and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                mine = count
                try:
                    return real(*arguments, **keywords)
                finally:
                    if mine == number:
                        os.kill(os.getpid(), signal.SIGKILL)
            return call
        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))

    def live(folder, say):
        with Log.open(folder / "log", folder / "keys" / "log.key") as log:
            for count in (1, 2, 300, 1, 40, 256, 3):
                indexes = log.append([b"%d of %d" % (i, count) * 9 for i in range(count)])
                os_write(say, b"a %d %d\\n" % (indexes[0], count))
                if count in (2, 40):
                    head = log.publish()
                    os_write(say, b"h %d %s\\n" % (head.size, head.root.hex().encode()))

    os_write = os.write
    folder, after = Path(sys.argv[1]), sys.argv[2] == "after"
    number = 0
    while True:
        number += 1
        home = folder / str(number)
        home.mkdir()
        say = os.open(home / "said", os.O_WRONLY | os.O_CREAT)
        child = os.fork()
        if not child:
            die_at(number, after)
            live(home, say)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os.close(say)
        if status == 0:
            break
        if os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"child ended with {status}")
    print(json.dumps(number))
    """
)


@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_9_at_every_system_call_that_writes_loses_nothing_acknowledged(when: str, fast: Path) -> None:
    """A real process kills itself before or after its k-th call of os.open, write, fsync, rename …, for every k."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(fast), when], capture_output=True, text=True, timeout=100, check=True
    )
    number = json.loads(done.stdout)
    assert number > 100
    for killed in range(1, number + 1):
        story = Story(fast / str(killed))
        for line in (story.folder / "said").read_text().splitlines():
            kind, first, rest = line.split()
            if kind == "a":
                for i in range(int(rest)):
                    story.acknowledged[int(first) + i] = b"%d of %d" % (i, int(rest)) * 9
            else:
                story.heads.append(TreeHead(origin="", size=int(first), root=bytes.fromhex(rest), note=""))
        story.check()


APPENDER = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from trainguard.log import Log
    folder, name = Path(sys.argv[1]), sys.argv[2].encode()
    log = Log.open(folder / "log", folder / "keys" / "log.key")
    for number in range(10**9):
        batch = [b"%s %d %d " % (name, number, i) * 10 for i in range(number % 5 + 1)]
        for index, entry in zip(log.append(batch), batch):
            os.write(1, b"%d %s\\n" % (index, entry.hex().encode()))
        if number % 7 == 3:
            log.publish()
    """
)


def wait_until(true: Callable[[], bool]) -> None:
    """Both children have begun; how long that takes depends on the machine."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_appending_processes_killed_at_random_moments_lose_nothing_acknowledged(tmp_path: Path) -> None:
    """SIGKILL from outside, ten times, at moments nobody chose; the survivor and the successor go on."""
    source = random.Random(20261122)
    story = Story(tmp_path)
    outputs = []
    for round_ in range(5):
        running = []
        for name in ("a", "b"):
            outputs.append(tmp_path / f"said-{round_}-{name}")
            with outputs[-1].open("wb") as said:
                arguments = [sys.executable, "-c", APPENDER, str(tmp_path), f"{name}{round_}"]
                running.append(subprocess.Popen(arguments, stdout=said, stderr=subprocess.PIPE))
        wait_until(lambda said=outputs[-2:]: all(path.stat().st_size for path in said))
        time.sleep(source.random() / 2)
        for child in running:
            child.send_signal(signal.SIGKILL)
            _, errors = child.communicate()
            assert (child.returncode, errors) == (-signal.SIGKILL, b"")
            time.sleep(source.random() / 10)
        story.look()
    for output in outputs:
        for line in output.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                index, entry = line.split()
                assert story.acknowledged.setdefault(int(index), bytes.fromhex(entry.decode())) == bytes.fromhex(
                    entry.decode()
                )
    assert len(story.acknowledged) > 20
    story.check()


@pytest.mark.parametrize(("number", "words"), [(28, "No space left"), (30, "Read-only"), (5, "Input/output")])
def test_a_full_read_only_or_broken_disk_is_one_clear_error_and_the_log_recovers(
    number: int, words: str, fast: Path
) -> None:
    """ENOSPC, EROFS and EIO on every call for a while: Unavailable each time, and all is well afterwards."""

    class Full(Disk):
        full = False

        def write(self, descriptor, data, offset):
            if self.full:
                super().write(descriptor, data[:10], offset)
                raise OSError(number, os.strerror(number))
            return super().write(descriptor, data, offset)

    story, disk = Story(fast), Full()
    with story.open(disk) as log:
        story.append(log, 5)
        disk.full = True
        for _ in range(3):
            with pytest.raises(Unavailable, match=words):
                log.append([b"no room"])
        story.look()
        assert story.heads[-1].size == 5
        with pytest.raises(Unavailable, match=words):
            log.publish()
        disk.full = False
        story.append(log, 5)
        assert sorted(story.acknowledged) == list(range(10))
    story.check()


def test_a_journal_cut_behind_a_running_writer_stops_it_instead_of_making_it_fork(fast: Path) -> None:
    """Truncate what was acknowledged: the writer refuses, and signs nothing more."""
    story = Story(fast)
    with story.open(Disk()) as log:
        story.append(log, 1)
        segment = journal_module.segment_path(fast / "log", 0)
        before = segment.stat().st_size
        story.append(log, 1)
        os.truncate(segment, before)
        with pytest.raises(VerificationError, match="ends at 1 entries"):
            log.append([b"other"])
        assert segment.stat().st_size == before


def test_a_log_restored_from_an_older_journal_is_refused_at_open(fast: Path) -> None:
    """The edge and the checkpoint remember larger sizes than the old copy of the journal has."""
    story = Story(fast)
    with story.open(Disk()) as log:
        story.append(log, 1)
        shutil.copytree(fast / "log" / "journal", fast / "old")
        story.append(log, 1)
        head = log.publish()
    shutil.rmtree(fast / "log" / "journal")
    shutil.copytree(fast / "old", fast / "log" / "journal")
    with pytest.raises(VerificationError, match=f"signed for {head.size}"):
        story.open(Disk())
    (fast / "log" / "checkpoint").unlink()
    with pytest.raises(VerificationError, match=f"edge was signed for {head.size}"):
        story.open(Disk())


def test_a_writer_whose_segment_was_published_and_dropped_by_another_goes_on(fast: Path) -> None:
    """An idle process must not write into a file that has lost its name."""
    story = Story(fast)
    with story.open(Disk()) as idle, story.open(Disk()) as busy:
        story.append(idle, 1)
        for _ in range(4):
            story.append(busy, 300)
            story.heads.append(busy.publish())
        assert journal_module.list_segments(fast / "log")[0] > 0
        story.append(idle, 1)
        story.append(busy, 1)
        assert sorted(story.acknowledged) == list(range(1203))
    story.check()


def test_a_writer_whose_folder_was_put_aside_and_copied_back_goes_on_in_the_copy(fast: Path) -> None:
    """The name counts, not the file that was open."""
    story = Story(fast)
    with story.open(Disk()) as log:
        story.append(log, 2)
        (fast / "log").rename(fast / "aside")
        shutil.copytree(fast / "aside", fast / "log")
        story.append(log, 2)
    story.check()


def test_a_writer_refuses_a_folder_replaced_by_another_history_or_by_nothing(fast: Path) -> None:
    """Same key, larger, properly signed, but no extension of what this process acknowledged: nothing goes there."""
    story, other = Story(fast), Story(fast / "other")
    with story.open(Disk()) as log:
        story.append(log, 2)
        (fast / "log").rename(fast / "aside")
        with pytest.raises(Unavailable):
            log.append([b"nowhere"])
        shutil.copytree(fast / "keys", other.folder / "keys")
        with other.open(Disk()) as forked:
            forked.append([b"another history"] * 3)
        shutil.copytree(other.folder / "log", fast / "log")
        with pytest.raises(VerificationError, match="no longer holds the 2 entries"):
            log.append([b"nowhere"])
        shutil.rmtree(fast / "log")
        for name in ("", "journal", "tmp", "tile"):
            (fast / "log" / name).mkdir()
        with pytest.raises(VerificationError, match="ends at 0 entries"):
            log.append([b"nowhere"])
        shutil.rmtree(fast / "log")
        (fast / "aside").rename(fast / "log")
        story.append(log, 1)
    story.check()
