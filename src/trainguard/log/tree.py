"""The tree as it lies on disk, every hash checked against a signed root before it is used.

    tree = Tree(path, head)         # head: a verified TreeHead whose tiles were published, or None for an empty tree
    tree.extend(leaf_hashes)        # go on with entries that are only in the journal yet
    tree.node(height, index)        # what merkle's proofs ask for

Trust runs from the root down: at construction the partial tiles of `head.size`, which hold the whole right edge, are
hashed up to `head.root`; a full tile is believed when its root is the hash that its parent, already believed, has for
it. So a tile that was altered is named, and none can be used before its turn.
"""

from __future__ import annotations

import os
from pathlib import Path

from trainguard.errors import MalformedEvidence, Unavailable, VerificationError
from trainguard.log import tiles
from trainguard.log.merkle import HASH_BYTES, TILE_HEIGHT, Frontier, perfect_root
from trainguard.log.tiles import ENTRIES, Tile
from trainguard.log.tree_head import TreeHead

CACHE_TILES = 4096
"""Checked tiles kept in memory: 32 MiB."""


class Tree:
    """A checked view of one log at one size. Not safe for use by several threads at once."""

    def __init__(self, log: Path, head: TreeHead | None) -> None:
        """Read the right edge. Raises VerificationError, MalformedEvidence or Unavailable naming the tile."""
        self._log = log
        self.published = 0 if head is None else head.size
        """Entries that tiles hold; those after them came by `extend`."""
        self._cache: dict[tuple[int, int], bytes] = {}
        self._starts: list[int] = []
        self._levels: list[list[bytes]] = [[]]
        for level in range(tiles.LEVEL_LIMIT):
            self._read_edge(level)
        self.frontier = Frontier.of(self.published, self.node)
        if head is not None and self.frontier.root() != head.root:
            raise VerificationError(
                f"{log}: the partial tiles of size {head.size} have root {self.frontier.root().hex()}, "
                f"the signed tree head says {head.root.hex()}"
            )

    def _read_edge(self, level: int) -> None:
        partial = tiles.partial_tile(level, self.published)
        count = tiles.level_size(level, self.published)
        self._starts.append(count - count % tiles.TILE_WIDTH)
        while len(self._levels) <= level:
            self._levels.append([])
        if partial is not None:
            self._levels[level] = tiles.decode_tile(
                read_tile(self._log, partial), partial, where=str(self._log / partial.path)
            )

    @property
    def edge(self) -> list[list[bytes]]:
        """Per tile level, the hashes after its last published full tile. Read only."""
        return self._levels

    @property
    def size(self) -> int:
        return self.frontier.size

    def extend(self, leaves: list[bytes]) -> None:
        """Append leaf hashes of entries that come after the published ones."""
        self.frontier.extend(leaves, self._levels)

    def node(self, height: int, index: int) -> bytes:
        """Hash of the perfect subtree over leaves [index << height, (index + 1) << height)."""
        level, rest = divmod(height, TILE_HEIGHT)
        return perfect_root(self.span(level, index << rest, 1 << rest))

    def span(self, level: int, first: int, count: int) -> bytes:
        """`count` hashes of tile level `level`, from number `first`, concatenated; they lie in one tile."""
        start = self._starts[level]
        if first >= start:
            hashes = self._levels[level][first - start : first - start + count]
            if len(hashes) != count:
                raise VerificationError(f"{self._log}: no hash {first + count - 1} at tile level {level} of this tree")
            return b"".join(hashes)
        index, at = divmod(first, tiles.TILE_WIDTH)
        return self.full_tile(level, index)[at * HASH_BYTES : (at + count) * HASH_BYTES]

    def full_tile(self, level: int, index: int) -> bytes:
        """The bytes of a full published tile, checked against its parent."""
        cached = self._cache.get((level, index))
        if cached is not None:
            return cached
        tile = Tile(level, index)
        data = read_tile(self._log, tile)
        self.check_root(tile, perfect_root(data))
        if len(self._cache) >= CACHE_TILES:
            self._cache.clear()
        self._cache[level, index] = data
        return data

    def check_root(self, tile: Tile, root: bytes) -> None:
        """Raise VerificationError unless `root` is what the tree has for the full tile (or entry bundle) `tile`."""
        if root != self.span(max(tile.level, 0) + 1, tile.index, 1):
            raise VerificationError(f"{self._log / tile.path}: does not hash to what the signed tree has for it")


def read_tile(log: Path, tile: Tile) -> bytes:
    """The bytes of a hash tile; a partial one that was dropped is cut from the full one, as tlog-tiles allows."""
    data = _read_or_full(log, tile, tiles.TILE_WIDTH * HASH_BYTES)
    expected = tile.width * HASH_BYTES
    if data is None:
        return read_tile(log, tile.full)[:expected]
    if len(data) != expected:
        raise MalformedEvidence(f"{log / tile.path}: expected {expected} bytes, found {len(data)}")
    return data


def read_bundle(log: Path, tile: Tile) -> list[bytes]:
    """The entries of a bundle, not yet checked; from the full bundle where the partial one was dropped."""
    data = _read_or_full(log, tile, tiles.BUNDLE_LIMIT_BYTES)
    if data is None:
        return read_bundle(log, tile.full)[: tile.width]
    return tiles.decode_bundle(data, tile.width, where=str(log / tile.path))


def _read_or_full(log: Path, tile: Tile, limit: int) -> bytes | None:
    """The file's bytes; None where a partial tile is gone and its full tile may stand in."""
    try:
        return read_file(log / tile.path, limit)
    except FileNotFoundError:
        if tile.width == tiles.TILE_WIDTH:
            kind = "entry bundle" if tile.level == ENTRIES else "tile"
            raise VerificationError(f"{log / tile.path}: this {kind} of the signed tree is missing") from None
        return None


def read_file(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes. FileNotFoundError passes through."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from error
    if data is None or len(data) > limit:
        raise MalformedEvidence(f"{path}: expected at most {limit} bytes")
    return data
