"""Publishing: from the journal to tiles, bundles and `checkpoint`, for readers that know only C2SP tlog-tiles.

The order makes every crash harmless: files that were never named by a signed tree head may lie about, but what the
`checkpoint` names is on the disk before the `checkpoint` is, and what it replaces goes only after it.

    1. recompute the leaves after the last published full tile from the journal; their root must be the signed one
    2. each new tile: write tmp/…, fsync, rename to its name; then fsync the folders
    3. checkpoint: the same, replacing the old one
    4. drop partial tiles whose full tile is there, and journal segments that full tiles cover
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from trainguard.errors import Unavailable, VerificationError
from trainguard.log import journal, tiles
from trainguard.log.disk import Disk, make_folders, sync_folder, write_file
from trainguard.log.merkle import HASH_BYTES, leaf_hash, perfect_root
from trainguard.log.note import NOTE_LIMIT_BYTES, Verifier
from trainguard.log.tiles import ENTRIES, TILE_WIDTH, Tile
from trainguard.log.tree import Tree, read_file
from trainguard.log.tree_head import TreeHead, verify_tree_head

NAME = "checkpoint"
"""The file name C2SP tlog-tiles gives the signed tree head."""
BATCH_FILES = 256
"""Tiles written under tmp/ before they get their names and the folders are synced."""


def read_published(log: Path, verifier: Verifier) -> TreeHead | None:
    """The verified head of what is published, or None where nothing is."""
    path = log / NAME
    try:
        data = read_file(path, NOTE_LIMIT_BYTES)
    except FileNotFoundError:
        return None
    return verify_tree_head(data, verifier, where=str(path))


def rolled_back(log: Path, found: int, signed: int, source: str) -> VerificationError:
    """The error for a journal that ends before something this log signed."""
    return VerificationError(
        f"{log}: the journal ends at {found} entries, but the {source} was signed for {signed}",
        next_step="entries were cut off: keep the folder as evidence and restore the journal from a copy",
    )


def publish(log: Path, disk: Disk, verifier: Verifier, head: TreeHead) -> None:
    """Publish the log up to `head`, whose record is durable in the journal. The caller holds publish.lock."""
    old = read_published(log, verifier)
    if old is not None and old.size > head.size:
        raise rolled_back(log, head.size, old.size, NAME)
    if old is None or old.size < head.size:
        _clear(log / "tmp", disk)
        _write_tiles(log, disk, _new_tiles(log, old, head))
        replace_file(log, disk, NAME, head.note.encode(), durable=True)
    elif old.root != head.root:
        raise VerificationError(f"{log / NAME}: two roots for size {head.size}: {old.root.hex()}, {head.root.hex()}")
    _drop_partials(log, disk, 0 if old is None else old.size, head.size)
    _drop_segments(log, disk, head.size)


def _new_tiles(log: Path, old: TreeHead | None, head: TreeHead) -> Iterator[tuple[Tile, bytes]]:
    """Every tile and bundle that size `head.size` needs and the old size did not, each before the tiles above it.

    Raises VerificationError, after the last full tile and before any partial one, when the journal's entries do not
    have the root of `head`.
    """
    tree = Tree(log, old)
    published = tree.size
    below = published % TILE_WIDTH
    pending = [b"".join(hashes) for hashes in tree.edge]
    pending[0] = b""
    index = [tiles.level_size(level, published) // TILE_WIDTH for level in range(tiles.LEVEL_LIMIT)]
    for entries in _bundles(log, published - below, head.size):
        leaves = [leaf_hash(entry) for entry in entries]
        first = index[0] * TILE_WIDTH
        if first < published and leaves[:below] != tree.edge[0][:below]:
            raise VerificationError(f"{log / 'journal'}: entries from {first} differ from the published ones")
        tree.extend(leaves[max(published - first, 0) :])
        pending[0] = b"".join(leaves)
        yield Tile(ENTRIES, index[0], len(entries)), tiles.encode_bundle(entries)
        if len(entries) == TILE_WIDTH:
            yield from _completed(pending, index)
    if (tree.size, tree.frontier.root()) != (head.size, head.root):
        raise VerificationError(f"{log / 'journal'}: entries up to {head.size} do not have the signed root")
    for level in range(tiles.LEVEL_LIMIT):
        if pending[level]:
            yield Tile(level, index[level], len(pending[level]) // HASH_BYTES), pending[level]


def _completed(pending: list[bytes], index: list[int]) -> Iterator[tuple[Tile, bytes]]:
    """The full tiles at the right edge, from level 0 up; each becomes one hash of the level above."""
    level = 0
    while len(pending[level]) == TILE_WIDTH * HASH_BYTES:
        yield Tile(level, index[level]), pending[level]
        pending[level + 1] += perfect_root(pending[level])
        pending[level] = b""
        index[level] += 1
        level += 1


def _bundles(log: Path, first: int, size: int) -> Iterator[list[bytes]]:
    """Entries [first, size) from the journal, by 256; `first` is a multiple of 256."""
    start = journal.find(log, first)
    waiting: list[bytes] = []
    at = first
    for _, item in () if start is None else journal.walk(log, start):
        if at == size:
            break
        if not isinstance(item, journal.Record) or item.size <= at:
            continue
        taken = item.entries[at - item.first : size - item.first]
        waiting += taken
        at += len(taken)
        full = len(waiting) - len(waiting) % TILE_WIDTH
        for begin in range(0, full, TILE_WIDTH):
            yield waiting[begin : begin + TILE_WIDTH]
        del waiting[:full]
    if at != size:
        raise VerificationError(f"{log / 'journal'}: expected {size} entries, found {at}")
    if waiting:
        yield waiting


def _write_tiles(log: Path, disk: Disk, files: Iterator[tuple[Tile, bytes]]) -> None:
    batch: list[tuple[Tile, bytes]] = []
    for file in files:
        batch.append(file)
        if len(batch) >= BATCH_FILES:
            _write_batch(log, disk, batch)
            batch = []
    _write_batch(log, disk, batch)


def _write_batch(log: Path, disk: Disk, batch: list[tuple[Tile, bytes]]) -> None:
    """Give each file its name with its bytes durable, or find it there with the same bytes."""
    missing = [(tile, data) for tile, data in batch if not _there(log / tile.path, data)]
    for number, (_, data) in enumerate(missing):
        write_file(disk, log / "tmp" / str(number), data)
    for folder in {(log / tile.path).parent for tile, _ in batch}:
        make_folders(disk, folder)
    for number, (tile, _) in enumerate(missing):
        disk.rename(log / "tmp" / str(number), log / tile.path)
    for folder in {(log / tile.path).parent for tile, _ in batch}:
        sync_folder(disk, folder)


def _there(path: Path, data: bytes) -> bool:
    """Whether `path` holds `data` already. Raises VerificationError where it holds something else."""
    try:
        found = read_file(path, len(data))
    except FileNotFoundError:
        return False
    if found != data:
        raise VerificationError(f"{path}: holds other bytes than the signed journal gives; it is not overwritten")
    return True


def replace_file(log: Path, disk: Disk, name: str, data: bytes, *, durable: bool) -> None:
    """Replace the file `name` of the log whole. Raises OSError."""
    temporary = log / "tmp" / name
    with contextlib.suppress(FileNotFoundError):
        disk.unlink(temporary)
    write_file(disk, temporary, data, sync=durable)
    disk.rename(temporary, log / name)
    if durable:
        sync_folder(disk, log)


def _clear(folder: Path, disk: Disk) -> None:
    """Remove what a killed publisher left; numbers only, an edge may be on its way."""
    for path in folder.iterdir():
        if path.name.isdigit():
            disk.unlink(path)


def _drop_partials(log: Path, disk: Disk, old: int, new: int) -> None:
    """Remove partial tiles of `old` and before whose full tile the published size `new` has."""
    for level in (ENTRIES, *range(tiles.LEVEL_LIMIT)):
        first = tiles.level_size(level, old) // TILE_WIDTH
        if first < tiles.level_size(level, new) // TILE_WIDTH:
            folder = log / f"{Tile(level, first).path}.p"
            if folder.is_dir():
                for path in folder.iterdir():
                    disk.unlink(path)
                disk.rmdir(folder)


def _drop_segments(log: Path, disk: Disk, size: int) -> None:
    """Remove journal segments all of whose entries lie in full published bundles. The last one always stays."""
    segments = journal.list_segments(log)
    covered = size - size % TILE_WIDTH
    for segment, following in itertools.pairwise(segments):
        if following > covered:
            break
        try:
            disk.unlink(journal.segment_path(log, segment))
        except FileNotFoundError as error:
            raise Unavailable(f"{log}: the journal changes while it is published") from error
