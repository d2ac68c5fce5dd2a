"""The writer: append durably, publish as static files (C2SP tlog-tiles), never fork.

    log = Log.open(home.log, home.keys / "log.key")
    log.append([entry])             # [index]; on the disk when it returns
    log.publish()                   # tiles and `checkpoint` for readers elsewhere
    log.close()

What lies in the folder, and which of it is evidence:

    journal/<first>   records, one per commit, each with its signed tree head; the truth     (journal.py)
    tile/…            what was published, each file written once                             (tiles.py)
    checkpoint        the signed tree head of what was published
    edge              frontier of the tree at some commit, for an instant reopen; a cache, but never ahead of the truth
    lock publish.lock held with flock while a commit or a publish is made; always empty
    tmp/              files on their way to a name

Rules, each with a test that breaks it:
 1. An append is acknowledged after one fdatasync that covers its record. Appends that wait together share one.
 2. A record that is whole on the disk is kept even if its writer saw an error, because its tree head is signed and may
    have been read: cutting it off and signing another of the same size would be a fork. Only torn records are cut.
 3. After an error the bytes since the last good fdatasync are written again, the same bytes: the kernel reports a
    failed write-back once and then forgets it.
 4. What is on the disk decides, not what this process remembers: under the lock it first adopts what others wrote, and
    refuses to go on when the log is shorter than, or not an extension of, one it has signed (checkpoint, edge, memory).
 5. A tile file is never overwritten with different bytes.

Known gap: someone who can replace the whole folder, `checkpoint` and `edge` with it, by an older copy, and restart the
writer, makes it fork; only a head kept elsewhere (a reader's, a witness's) shows that.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from trainguard.errors import Misuse, TrainguardError, Unavailable, VerificationError
from trainguard.log import journal, tiles
from trainguard.log.disk import DISK, Disk, locked, make_folders, sync_folder, write_all
from trainguard.log.edge import NAME as EDGE_NAME
from trainguard.log.edge import Edge, encode_edge, find_edge
from trainguard.log.journal import Position, Record, Tail
from trainguard.log.keys import create_signer, load_signer, write_vkey
from trainguard.log.merkle import EMPTY_ROOT, Frontier, leaf_hash
from trainguard.log.note import Signer, Verifier, check_name
from trainguard.log.publish import publish, read_published, replace_file, rolled_back
from trainguard.log.tiles import ENTRY_LIMIT_BYTES
from trainguard.log.tree import Tree
from trainguard.log.tree_head import TreeHead, sign_tree_head, verify_tree_head

DEFAULT_ORIGIN = "trainguard.local"
RECORD_TARGET_BYTES = 4 << 20
"""A commit beyond this becomes several records under one fdatasync."""
EDGE_EVERY_BYTES = 1 << 20
EDGE_EVERY_COMMITS = 512
"""The edge is written anew after this much, so that a reopen replays no more."""


@dataclass(slots=True)
class _State:
    """Where the log stands, as far as this process knows."""

    head: TreeHead
    frontier: Frontier
    segment: int
    offset: int
    """End of the last whole record in the segment."""
    closed: bool = False
    """The segment was ended; the next record begins a new one."""


@dataclass(slots=True)
class _Batch:
    """One call of `append` on its way."""

    entries: Sequence[bytes]
    first: int = -1
    failure: BaseException | None = None
    done: bool = False


class Log:
    """A log open for appending. Threads may share it; other processes may have their own on the same folder."""

    def __init__(self, path: Path, key_path: Path, origin: str, disk: Disk) -> None:
        """Use `Log.open`."""
        self._path, self._key_path, self._origin, self._disk = path, key_path, origin, disk
        self._signer: Signer | None = None
        self._state: _State | None = None
        self._descriptor = -1
        self._segment_name = ""
        self._lock_name = self._path / "lock"
        self._durable = 0
        """Offset in the current segment up to which an fdatasync succeeded."""
        self._doubtful = False
        """An error left it open what of the segment is durable (rule 3)."""
        self._bytes_since_edge = self._commits_since_edge = 0
        self._commit_lock, self._queue_lock, self._publish_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._queue: list[_Batch] = []
        self._pid = os.getpid()
        self._closed = False

    @classmethod
    def open(cls, path: Path, key_path: Path, *, origin: str = DEFAULT_ORIGIN, disk: Disk = DISK) -> Log:
        """Open the log in folder `path`, making log and key where there are none.

        key_path: Ed25519 key in PEM, mode 0600; its `.vkey` (the public half) is written beside it.
        origin: the log's name, given once and for all when it is made; a bare host name suits most verifiers.
        disk: the seam for tests that break storage.
        Raises Unavailable for disk and permissions, Misuse for another origin, VerificationError where what lies there
        is damaged, shorter than what was signed, or signed by another key.
        """
        check_name(origin)
        log = cls(Path(path), Path(key_path), origin, disk)
        with log._failures(), log._commit_lock:
            for folder in (log._path, log._path / "journal", log._path / "tmp", log._path / "tile"):
                make_folders(disk, folder)
            try:
                with locked(log._lock_name):
                    log._open()
            except BaseException:
                log._close_segment()
                raise
        return log

    def append(self, entries: Sequence[bytes]) -> list[int]:
        """Append entries of at most 65,535 bytes each; returns their indexes once they are on the disk.

        They get consecutive indexes. Raises Unavailable when the disk refuses: the entries may or may not be in the
        log then, and nothing acknowledged before is lost.
        """
        if not entries:
            return []
        _check_entries(entries)
        batch = _Batch(entries)
        with self._queue_lock:
            self._queue.append(batch)
        with self._commit_lock:
            if not batch.done:
                with self._queue_lock:
                    batches, self._queue = self._queue, []
                self._commit_together(batches)
        if batch.failure is not None:
            raise _again(batch.failure) from batch.failure
        return list(range(batch.first, batch.first + len(entries)))

    def publish(self) -> TreeHead:
        """Write tiles, bundles and `checkpoint` for all entries so far; returns the signed head.

        Idempotent; appends go on meanwhile. Journal segments that full tiles cover are dropped after it.
        """
        with self._failures(), self._publish_lock, locked(self._path / "publish.lock"):
            with self._committing() as state:
                self._sync()
                head = state.head
            publish(self._path, self._disk, self._verifier, head)
            with self._committing(), contextlib.suppress(OSError):  # a cache: published is published
                self._write_edge()
        return head

    @property
    def vkey(self) -> str:
        """The log's public key, for `LogReader`."""
        return self._verifier.vkey

    def close(self) -> None:
        """Release the files. Does not publish. Closing twice is harmless."""
        with self._commit_lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(OSError, TrainguardError):
                if self._pid == os.getpid() and self._state is not None and not self._doubtful:
                    with locked(self._lock_name):
                        self._catch_up()
                        self._write_edge()
            self._close_segment()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- opening -----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Under the lock: read what is there, or begin a log."""
        if journal.list_segments(self._path) or (self._path / "checkpoint").exists():
            self._signer = load_signer(self._key_path, self._origin)
            write_vkey(self._disk, self._key_path, self._verifier)
        else:
            self._signer = create_signer(self._disk, self._key_path, self._origin)
        state = self._load()
        if state is None:
            self._begin()
        else:
            self._enter(state)

    def _begin(self) -> None:
        """The first record: no entries, the head of the empty tree."""
        frontier = Frontier()
        head = sign_tree_head(0, frontier.root(), self._key)
        self._state = _State(head, frontier, 0, 0)
        self._open_segment(0)
        self._disk.truncate(self._descriptor, 0)
        self._write_record(b"", 0, frontier, head)
        self._sync()

    @property
    def _key(self) -> Signer:
        if self._signer is None:
            raise Misuse("log: not opened by Log.open")
        return self._signer

    @property
    def _verifier(self) -> Verifier:
        return self._key.verifier

    def _load(self) -> _State | None:
        """The state, from the disk alone: from the edge or else from the published tiles (rule 4). None: no log yet."""
        published = read_published(self._path, self._verifier)
        edge = find_edge(self._path, self._verifier)
        state = self._from_edge(edge, published) or self._from_tiles(published)
        found = 0 if state is None else state.head.size
        for name, signed in (("checkpoint", published), ("edge", edge.head if edge else None)):
            if signed is not None and signed.size > found:
                raise rolled_back(self._path, found, signed.size, name)
        return state

    def _enter(self, state: _State) -> None:
        """Go on from `state`: its records become durable before anything is built on them, a torn end is cut."""
        self._open_segment(state.segment)
        self._state = state
        self._cut_torn()
        self._sync()
        self._doubtful = False

    def _from_edge(self, edge: Edge | None, published: TreeHead | None) -> _State | None:
        """The state, replaying the journal from the edge; None where the edge does not help."""
        if edge is None or (published is not None and published.size > edge.head.size):
            return None
        start = Position(edge.segment, edge.offset, edge.head.size)
        state = _State(edge.head, edge.frontier, edge.segment, edge.offset)
        try:
            self._replay(state, start)
        except (FileNotFoundError, VerificationError):
            return None  # what is wrong, if anything, is said by the full way
        return state

    def _from_tiles(self, published: TreeHead | None) -> _State | None:
        """The state, replaying the journal from what is published; None where there is no log."""
        tree = Tree(self._path, published)
        start = journal.find(self._path, tree.size)
        if start is None:
            return None
        state = _State(published or _NO_HEAD, tree.frontier, start.segment, start.offset)
        try:
            self._replay(state, start)
        except FileNotFoundError as error:
            raise Unavailable(f"{self._path}: the journal changes while it is read") from error
        return None if state.head is _NO_HEAD else state

    def _replay(self, state: _State, start: Position) -> None:
        """Adopt every record from `start`, check the last one's signed head, and leave `state` after it."""
        last: Record | None = None
        for segment, item in journal.walk(self._path, start):
            state.segment = segment
            if isinstance(item, Tail):
                state.offset, state.closed = item.end, item.closed
                continue
            last = item
            if item.size > state.frontier.size:
                skip = state.frontier.size - item.first
                state.frontier.extend([leaf_hash(entry) for entry in item.entries[skip:]])
        if last is not None and last.size == state.frontier.size:
            state.head = self._checked_head(last, state.frontier)
        elif last is not None:
            raise rolled_back(self._path, last.size, state.frontier.size, "checkpoint")

    def _checked_head(self, record: Record, frontier: Frontier) -> TreeHead:
        where = f"{self._path / 'journal'}: record of size {record.size}"
        head = verify_tree_head(record.note, self._verifier, where=where)
        if (head.size, head.root) != (frontier.size, frontier.root()):
            raise VerificationError(f"{where}: its entries do not have the root that its tree head was signed for")
        return head

    def _check_extends(self, known: TreeHead, state: _State) -> None:
        """The reloaded log must hold the one this process knew, entry for entry."""
        if state.head.size < known.size:
            raise rolled_back(self._path, state.head.size, known.size, "head this process knows")
        tree = Tree(self._path, read_published(self._path, self._verifier))
        start = journal.find(self._path, tree.size)
        for _, item in () if start is None else journal.walk(self._path, start):
            if isinstance(item, Record) and item.size > tree.size:
                tree.extend([leaf_hash(entry) for entry in item.entries[tree.size - item.first :]])
        if Frontier.of(known.size, tree.node).root() != known.root:
            raise VerificationError(f"{self._path}: no longer holds the {known.size} entries this process knows")

    # -- committing --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Whatever the operating system refuses leaves here as one Unavailable."""
        try:
            yield
        except OSError as error:
            raise _unavailable(self._path, error) from error

    @contextlib.contextmanager
    def _committing(self) -> Iterator[_State]:
        """Hold both locks, with the state brought up to the disk's."""
        with self._commit_lock, self._file_lock():
            yield self._catch_up()

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        if self._closed:
            raise Misuse(f"{self._path}: the log is closed")
        if os.getpid() != self._pid:
            raise Misuse(f"{self._path}: opened by process {self._pid}; a forked child must open the log itself")
        with locked(self._lock_name):
            yield

    def _commit_together(self, batches: list[_Batch]) -> None:
        """Commit for every caller that waits; each learns its first index or its failure."""
        failure: BaseException | None = None
        try:
            with self._failures(), self._file_lock():
                state = self._catch_up()
                first = state.head.size
                self._commit([entry for batch in batches for entry in batch.entries])
            for batch in batches:
                batch.first = first
                first += len(batch.entries)
        except TrainguardError as error:
            failure = error
        except BaseException as error:
            failure = Unavailable(f"{self._path}: append interrupted by {type(error).__name__}")
            raise
        finally:
            for batch in batches:
                batch.failure = failure
                batch.done = True

    def _commit(self, entries: list[bytes]) -> None:
        """Write records for `entries` and make them durable: the one place where an append waits for the disk."""
        try:
            for chunk in _chunks(entries):
                state = self._rotated()
                frontier = state.frontier.copy()
                frontier.extend([leaf_hash(entry) for entry in chunk])
                head = sign_tree_head(frontier.size, frontier.root(), self._key)
                self._write_record(tiles.encode_bundle(chunk), len(chunk), frontier, head)
            self._sync()
        except BaseException:
            self._doubtful = True
            raise
        self._commits_since_edge += 1
        self._bytes_since_edge += sum(map(len, entries))
        if self._commits_since_edge >= EDGE_EVERY_COMMITS or self._bytes_since_edge >= EDGE_EVERY_BYTES:
            with contextlib.suppress(OSError):  # a cache: the entries are durable without it
                self._write_edge()

    def _now(self) -> _State:
        if self._state is None:
            raise Unavailable(f"{self._path}: the log could not be read; open it again")
        return self._state

    def _write_record(self, bundle: bytes, count: int, frontier: Frontier, head: TreeHead) -> None:
        state = self._now()
        record = journal.encode_record(head.size - count, count, head.note.encode(), bundle)
        write_all(self._disk, self._descriptor, record, state.offset)
        self._state = _State(head, frontier, state.segment, state.offset + len(record))

    def _catch_up(self) -> _State:
        """Under the lock: adopt what others wrote, cut a torn end, settle doubt. Usually one stat."""
        state = self._now()
        if not self._same_file():
            return self._resume(state)
        end = os.fstat(self._descriptor).st_size
        if end < state.offset:
            return self._resume(state)
        if end > state.offset:
            self._adopt(state)
        if self._doubtful:
            self._settle()
        return self._now()

    def _same_file(self) -> bool:
        """Whether our descriptor is the segment that now lies under its name."""
        try:
            found = os.lstat(self._segment_name)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._descriptor)
        return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)

    def _resume(self, known: _State) -> _State:
        """Our segment is gone or shorter: dropped after a publish by others, or replaced, or cut."""
        state = self._load()
        if state is None:
            raise rolled_back(self._path, 0, known.head.size, "head this process knows")
        self._check_extends(known.head, state)
        self._enter(state)
        return self._now()

    def _adopt(self, state: _State) -> None:
        """Take over the records after our last one, and cut what is torn (rule 2)."""
        fresh = _State(state.head, state.frontier.copy(), state.segment, state.offset)
        self._replay(fresh, Position(state.segment, state.offset, state.head.size))
        if fresh.segment != state.segment:
            self._sync()
            self._open_segment(fresh.segment)
            self._durable = 0
        self._state = fresh
        self._cut_torn()

    def _cut_torn(self) -> None:
        state = self._now()
        if not state.closed and os.fstat(self._descriptor).st_size > state.offset:
            self._disk.truncate(self._descriptor, state.offset)

    def _sync(self) -> None:
        """The fdatasync that makes everything up to here durable; a failed one leaves doubt (rule 3)."""
        try:
            self._disk.fdatasync(self._descriptor)
        except BaseException:
            self._doubtful = True
            raise
        self._durable = self._now().offset

    def _settle(self) -> None:
        """Write the bytes since the last good fdatasync once more, the same ones, and sync them (rule 3)."""
        state = self._now()
        start = min(self._durable, state.offset)
        data = os.pread(self._descriptor, state.offset - start, start)
        if len(data) != state.offset - start:
            raise Unavailable(f"{self._path}: journal: expected {state.offset - start} bytes, read {len(data)}")
        write_all(self._disk, self._descriptor, data, start)
        self._sync()
        self._doubtful = False

    def _rotated(self) -> _State:
        """The state, in a new segment if the last one is full or closed."""
        state = self._now()
        if state.offset < journal.SEGMENT_BYTES and not state.closed:
            return state
        write_all(self._disk, self._descriptor, journal.encode_close(), state.offset)
        self._sync()
        self._open_segment(state.head.size)
        self._state = _State(state.head, state.frontier, state.head.size, 0)
        self._durable = 0
        return self._state

    def _open_segment(self, first: int) -> None:
        """Have the segment beginning with `first` open, made if need be, its name durable."""
        path = journal.segment_path(self._path, first)
        descriptor = self._disk.open(path, os.O_RDWR | os.O_CREAT)
        try:
            sync_folder(self._disk, self._path / "journal")
        except BaseException:
            os.close(descriptor)
            raise
        self._close_segment()
        self._descriptor, self._segment_name = descriptor, str(path)

    def _close_segment(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write_edge(self) -> None:
        state = self._now()
        edge = Edge(state.segment, state.offset, state.head, state.frontier)
        replace_file(self._path, self._disk, EDGE_NAME, encode_edge(edge), durable=False)
        self._bytes_since_edge = self._commits_since_edge = 0


_NO_HEAD = TreeHead(origin="", size=0, root=EMPTY_ROOT, note="")
"""Stands for the head of a log whose first record is not there yet."""


def _check_entries(entries: Sequence[bytes]) -> None:
    for entry in entries:
        if not isinstance(entry, bytes) or len(entry) > ENTRY_LIMIT_BYTES:
            found = f"{len(entry)} bytes" if isinstance(entry, bytes) else type(entry).__name__
            raise Misuse(
                f"log entry: expected at most {ENTRY_LIMIT_BYTES} bytes, found {found}",
                next_step="keep larger evidence by content and log its digest",
            )


def _chunks(entries: list[bytes]) -> Iterator[list[bytes]]:
    """`entries` in parts of about RECORD_TARGET_BYTES."""
    first = total = 0
    for number, entry in enumerate(entries):
        total += len(entry) + 2
        if total >= RECORD_TARGET_BYTES:
            yield entries[first : number + 1]
            first, total = number + 1, 0
    if first < len(entries):
        yield entries[first:]


def _unavailable(path: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"{path}: the log cannot be written: {error.strerror or error}; what was acknowledged before is safe",
        next_step="free space or make the folder writable, then try again",
    )


def _again(failure: BaseException) -> TrainguardError:
    """A fresh exception for each caller that waited on the same commit."""
    if isinstance(failure, TrainguardError):
        return type(failure)(str(failure), next_step=failure.next_step)
    return Unavailable(str(failure))
