"""The full audit: everything that lies in a log's folder, against the signed tree head and itself.

 1. list what lies there; nothing that has no business there                        (first, so that a log that grows
 2. the edge, its signature, and that its size is not beyond the journal's           meanwhile cannot look wrong)
 3. `checkpoint`, and the partial tiles of its size, up to its root
 4. the journal: each record's checksum, order, signed head, and that its entries have that root
 5. every full tile and bundle the `checkpoint` needs, from the root down
 6. every other tile and bundle that lies there

What it cannot see: a folder that is whole and older, or forked, as a whole. Compare `head` with one kept elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainguard.errors import MalformedEvidence, Unavailable, VerificationError
from trainguard.log import journal, tiles
from trainguard.log.edge import NAME as EDGE_NAME
from trainguard.log.edge import read_edge
from trainguard.log.journal import Record
from trainguard.log.merkle import HASH_BYTES, Frontier, leaf_hash, perfect_root
from trainguard.log.note import Verifier
from trainguard.log.publish import NAME as CHECKPOINT_NAME
from trainguard.log.publish import read_published, rolled_back
from trainguard.log.tiles import ENTRIES, TILE_WIDTH, Tile
from trainguard.log.tree import Tree, read_bundle, read_tile
from trainguard.log.tree_head import TreeHead, verify_tree_head

NAMES = frozenset({CHECKPOINT_NAME, EDGE_NAME, "journal", "tile", "tmp", "lock", "publish.lock"})
_EMPTY = frozenset({"lock", "publish.lock"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was audited and held."""

    head: TreeHead
    """The head after the last entry."""
    published: int
    """Entries that `checkpoint` covers."""
    tiles: int
    """Tile and bundle files checked."""
    records: int
    """Journal records checked, each with its signature."""
    torn_bytes: int
    """Bytes at the journal's end that a writer did not finish; never acknowledged, no sign of tampering."""


@dataclass(slots=True)
class _Journal:
    """The journal part's result."""

    head: TreeHead | None = None
    records: int = 0
    torn_bytes: int = 0


def audit(log: Path, verifier: Verifier, progress: Callable[[int, int], None] | None = None) -> Audit:
    """Check everything. Raises VerificationError or MalformedEvidence saying where, Unavailable where unreadable."""
    files = _list(log)
    edge = read_edge(log, verifier)
    published = read_published(log, verifier)
    tree = Tree(log, published)
    tail = _audit_journal(log, verifier, tree)
    head = tail.head or published
    if head is None:
        raise Unavailable(f"{log}: there is no log here")
    for name, signed in ((CHECKPOINT_NAME, published), (EDGE_NAME, edge.head if edge else None)):
        if signed is not None and signed.size > head.size:
            raise rolled_back(log, head.size, signed.size, name)
        if signed is not None and Frontier.of(signed.size, tree.node).root() != signed.root:
            raise VerificationError(f"{log / name}: signed another tree of size {signed.size} than this log's: a fork")
    required = _audit_published(log, tree, lambda done: progress and progress(done, head.size))
    others = [tile for tile in files if tile not in required]
    for tile in others:
        _audit_file(log, tree, tile)
    return Audit(
        head=head,
        published=tree.published,
        tiles=len(required) + len(others),
        records=tail.records,
        torn_bytes=tail.torn_bytes,
    )


def _list(log: Path) -> list[Tile]:
    """The tiles that lie under `tile/`. Raises MalformedEvidence for anything in the log that is not of it."""
    try:
        with os.scandir(log) as listing:
            entries = list(listing)
        for entry in entries:
            if entry.name not in NAMES or entry.is_symlink():
                raise MalformedEvidence(f"{log / entry.name[:80]}: not part of a log")
            if entry.name in _EMPTY and entry.stat().st_size:
                raise MalformedEvidence(f"{log / entry.name}: expected an empty file")
    except OSError as error:
        raise Unavailable(f"{log}: log cannot be read: {error.strerror}") from error
    found = []
    for folder, folders, files in os.walk(log / "tile"):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(folder, name)):  # noqa: PTH114, PTH118 -- thousands of names
                raise MalformedEvidence(f"{Path(folder) / name}: a symbolic link has no place in a log")
        base = os.path.relpath(folder, log)
        found += [tiles.parse_path(f"{base}/{name}") for name in files]
    return found


def _audit_journal(log: Path, verifier: Verifier, tree: Tree) -> _Journal:
    """Check every record and extend `tree` by the entries that are not published."""
    result = _Journal()
    segments = journal.list_segments(log)
    if not segments:
        return result
    start = journal.find(log, min(segments[0], tree.published))
    if start is None or segments[0] > tree.published:
        raise MalformedEvidence(f"{log / 'journal'}: expected entry {tree.published}, begins with {segments[0]}")
    frontier = Frontier.of(start.index, tree.node)
    for segment, item in journal.walk(log, start, sync=True):
        if not isinstance(item, Record):
            result.torn_bytes = item.torn_bytes
            continue
        where = f"{journal.segment_path(log, segment)}: record at byte {item.start}"
        leaves = [leaf_hash(entry) for entry in item.entries]
        for number, leaf in enumerate(leaves[: max(tree.published - item.first, 0)], item.first):
            if leaf != tree.span(0, number, 1):
                raise VerificationError(f"{where}: entry {number} differs from the published one")
        tree.extend(leaves[max(tree.published - item.first, 0) :])
        frontier.extend(leaves)
        result.head = verify_tree_head(item.note, verifier, where=where)
        if (result.head.size, result.head.root) != (frontier.size, frontier.root()):
            raise VerificationError(f"{where}: its entries do not have the root its tree head was signed for")
        result.records += 1
    if result.head is not None and result.head.size < tree.published:
        raise rolled_back(log, result.head.size, tree.published, CHECKPOINT_NAME)
    return result


def _audit_published(log: Path, tree: Tree, progress: Callable[[int], object]) -> set[Tile]:
    """Check every tile and bundle that the published size needs; returns them."""
    required: set[Tile] = set()
    for level in range(tiles.LEVEL_LIMIT):
        for tile in tiles.tiles_of(level, tree.published):
            if tile.width == TILE_WIDTH and level:
                tree.full_tile(level, tile.index)
            required.add(tile)
    for tile in tiles.tiles_of(ENTRIES, tree.published):
        _audit_bundle(log, tree, tile)
        required.add(tile)
        if not tile.index % 16:
            progress(tile.first)
    return required


def _audit_bundle(log: Path, tree: Tree, tile: Tile) -> None:
    """Check one bundle against its level-0 tile, and that against the tree."""
    leaves = b"".join([leaf_hash(entry) for entry in read_bundle(log, tile)])
    if tile.width == TILE_WIDTH:
        hashes = read_tile(log, Tile(0, tile.index))
        tree.check_root(Tile(0, tile.index), perfect_root(hashes))
    else:
        hashes = tree.span(0, tile.first, tile.width)
    if leaves != hashes:
        raise VerificationError(f"{log / tile.path}: entry {_first_difference(leaves, hashes, tile)} was altered")


def _first_difference(found: bytes, expected: bytes, tile: Tile) -> int:
    return tile.first + next(
        at // HASH_BYTES
        for at in range(0, len(expected), HASH_BYTES)
        if found[at : at + HASH_BYTES] != expected[at : at + HASH_BYTES]
    )


def _audit_file(log: Path, tree: Tree, tile: Tile) -> None:
    """Check a file that the published size does not need: an older partial one, or what a crash left."""
    if tile.first + tile.width > tiles.level_size(tile.level, tree.size):
        raise VerificationError(f"{log / tile.path}: goes beyond the {tree.size} entries of the signed tree")
    expected = tree.span(max(tile.level, 0), tile.first, tile.width)
    if tile.level == ENTRIES:
        found = b"".join([leaf_hash(entry) for entry in read_bundle(log, tile)])
    else:
        found = read_tile(log, tile)
    if found != expected:
        raise VerificationError(f"{log / tile.path}: hash {_first_difference(found, expected, tile)} was altered")
