"""The reader: believes nothing of a log but what hashes up to a signed tree head. Needs no private key.

    reader = LogReader(home.log, home.keys / "log.vkey")
    reader.head()                       # TreeHead, signature verified
    for entry in reader.entries(0, 10): ...
    reader.inclusion(3)                 # Proof, for a .tlog-proof file
    reader.verify()                     # the whole log; raises where something does not hold

A reader shows the log as it was when first asked, with every append acknowledged before; open another to see later
ones. It works while writers append and publish, and on a copy that has only `checkpoint` and `tile/`. One thread at a
time.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainguard.errors import Misuse, Unavailable, VerificationError
from trainguard.log import audit, journal, tiles
from trainguard.log.audit import Audit
from trainguard.log.edge import find_edge
from trainguard.log.journal import Position, Record
from trainguard.log.keys import load_verifier
from trainguard.log.merkle import consistency_path, inclusion_path, leaf_hash, perfect_root, root_at, verify_inclusion
from trainguard.log.note import Verifier
from trainguard.log.proof import Proof
from trainguard.log.publish import read_published, rolled_back
from trainguard.log.tiles import ENTRIES, TILE_WIDTH
from trainguard.log.tree import Tree, read_bundle
from trainguard.log.tree_head import TreeHead, verify_tree_head

_T = TypeVar("_T")

ATTEMPTS = 2
"""Reads of a log that changes meanwhile, before what does not fit is taken for damage."""
PAUSE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The log at one moment."""

    head: TreeHead
    tree: Tree
    records: list[Position]
    """Where the journal records with entries that are not published begin, ascending."""


class LogReader:
    """Reads one log, checking everything against its public key."""

    def __init__(self, path: Path, vkey: str | Path) -> None:
        """path: the log's folder. vkey: the public key's text, or a file with it."""
        self._path = Path(path)
        self._verifier = load_verifier(vkey)
        self._shown: _Snapshot | None = None
        self._near: tuple[int, list[bytes]] | None = None

    def head(self) -> TreeHead:
        """The signed head after the last entry. Raises VerificationError, or Unavailable where there is no log."""
        return self._snapshot().head

    def entries(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Entries [start, end), by default all, each checked against the signed tree before it is given out."""
        shown = self._snapshot()
        end = shown.head.size if end is None else end
        if not 0 <= start <= end <= shown.head.size:
            raise Misuse(f"{self._path}: expected 0 <= start <= end <= {shown.head.size}, found {start} and {end}")
        yield from self._published(shown.tree, start, min(end, shown.tree.published))
        start = max(start, shown.tree.published)
        if start < end:
            yield from self._journalled(shown, start, end)

    def entry(self, index: int) -> bytes:
        """One entry, checked. The bundle it lies in is kept: neighbours, in order, cost next to nothing."""
        shown = self._snapshot()
        if not 0 <= index < shown.head.size:
            raise Misuse(f"{self._path}: expected an index below {shown.head.size}, found {index}")
        first = index - index % TILE_WIDTH
        if self._near is None or not first <= index < first + len(self._near[1]) or self._near[0] != first:
            self._near = (first, list(self.entries(first, min(first + TILE_WIDTH, shown.head.size))))
        return self._near[1][index - first]

    def inclusion(self, index: int) -> Proof:
        """Proof that entry `index` is under `head()`; verified before it is given out."""
        shown = self._snapshot()
        if not 0 <= index < shown.head.size:
            raise Misuse(f"{self._path}: expected an index below {shown.head.size}, found {index}")
        path = inclusion_path(index, shown.head.size, shown.tree.node)
        leaf = shown.tree.span(0, index, 1)
        verify_inclusion(leaf, index, shown.head.size, path, shown.head.root, where=f"{self._path}: entry {index}")
        return Proof(index=index, path=path, note=shown.head.note)

    def consistency(self, old: int) -> tuple[bytes, ...]:
        """Proof that the tree of `head()` extends the one of size `old` (RFC 6962 section 2.1.2)."""
        shown = self._snapshot()
        if not 0 <= old <= shown.head.size:
            raise Misuse(f"{self._path}: expected a size up to {shown.head.size}, found {old}")
        return consistency_path(old, shown.head.size, shown.tree.node)

    def root_at(self, size: int) -> bytes:
        """Root of the first `size` entries, to compare with a head kept elsewhere."""
        shown = self._snapshot()
        if not 0 <= size <= shown.head.size:
            raise Misuse(f"{self._path}: expected a size up to {shown.head.size}, found {size}")
        return root_at(size, shown.tree.node)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Audit:
        """Audit all of the log that lies in its folder; see `trainguard.log.audit`.

        progress: called now and then with entries done and entries in all.
        """
        return _patiently(self._path, lambda: audit.audit(self._path, self._verifier, progress))

    def _snapshot(self) -> _Snapshot:
        if self._shown is None:
            self._shown = _patiently(self._path, lambda: _load(self._path, self._verifier))
        return self._shown

    def _published(self, tree: Tree, start: int, end: int) -> Iterator[bytes]:
        """Entries from bundles. Each bundle's leaves must be what the tree has there."""
        for tile in tiles.tiles_of(ENTRIES, tree.published) if start < end else ():
            if tile.first + tile.width <= start:
                continue
            if tile.first >= end:
                return
            entries = read_bundle(self._path, tile)
            leaves = b"".join([leaf_hash(entry) for entry in entries])
            if tile.width == TILE_WIDTH:
                tree.check_root(tile, perfect_root(leaves))
            elif leaves != tree.span(0, tile.first, tile.width):
                raise VerificationError(f"{self._path / tile.path}: entries differ from the signed tree")
            yield from entries[max(start - tile.first, 0) : end - tile.first]

    def _journalled(self, shown: _Snapshot, start: int, end: int) -> Iterator[bytes]:
        """Entries from the journal, or, if they were published meanwhile, from bundles."""
        try:
            yield from self._from_journal(shown, start, end)
        except FileNotFoundError:
            later = LogReader(self._path, self._verifier.vkey).entries(start, end)
            for index, entry in enumerate(later, start):
                _check(shown.tree, index, entry, self._path)
                yield entry

    def _from_journal(self, shown: _Snapshot, start: int, end: int) -> Iterator[bytes]:
        place = bisect_right(shown.records, start, key=lambda record: record.index) - 1
        for _, item in journal.walk(self._path, shown.records[place]):
            if not isinstance(item, Record):
                continue
            for index in range(max(start, item.first), min(end, item.size)):
                entry = item.entries[index - item.first]
                _check(shown.tree, index, entry, self._path)
                yield entry
            if item.size >= end:
                return


def _check(tree: Tree, index: int, entry: bytes, log: Path) -> None:
    if leaf_hash(entry) != tree.span(0, index, 1):
        raise VerificationError(f"{log}: entry {index} is not the one the signed tree has")


def _load(log: Path, verifier: Verifier) -> _Snapshot:
    """Published tiles, then the journal after them; the last record's signed head must have that root."""
    edge = find_edge(log, verifier)
    published = read_published(log, verifier)
    tree = Tree(log, published)
    records: list[Position] = []
    last: Record | None = None
    start = journal.find(log, tree.published)
    for segment, item in () if start is None else journal.walk(log, start, sync=True):
        if not isinstance(item, Record):
            continue
        last = item
        if item.size > tree.published:
            records.append(Position(segment, item.start, item.first))
            tree.extend([leaf_hash(entry) for entry in item.entries[max(tree.published - item.first, 0) :]])
    head = published if last is None else verify_tree_head(last.note, verifier, where=f"{log / 'journal'}: last record")
    if head is None:
        raise Unavailable(f"{log}: there is no log here", next_step="a first run or append makes one")
    for name, signed in (("checkpoint", tree.published), ("edge", edge.head.size if edge else 0)):
        if signed > head.size:
            raise rolled_back(log, head.size, signed, name)
    if (head.size, head.root) != (tree.size, tree.frontier.root()):
        raise VerificationError(f"{log / 'journal'}: {tree.size} entries do not have the root of the last signed head")
    return _Snapshot(head, tree, records)


def _patiently(log: Path, read: Callable[[], _T]) -> _T:
    """What `read` returns; tried again when it fails, in case a writer changed the log underneath."""
    for _ in range(ATTEMPTS - 1):
        try:
            return read()
        except (FileNotFoundError, VerificationError):
            time.sleep(PAUSE_SECONDS)
    try:
        return read()
    except FileNotFoundError as error:
        raise Unavailable(f"{log}: {error.filename}: vanishes while it is read") from error
