"""Tiles and entry bundles: a log as static files (C2SP tlog-tiles).

    tile/<L>/<N>[.p/<W>]          W hashes (256 without .p): level-0 ones are leaf hashes, those above are roots of
                                  full tiles of the level below
    tile/entries/<N>[.p/<W>]      W entries, each:  | length, 2 bytes big-endian | entry |
    <N> in groups of three digits, all but the last with an x: 1234067 is x001/x234/067

Pruned logs (the specification's minimum index) are not implemented: entry 0 is always there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainguard.errors import MalformedEvidence, Misuse
from trainguard.log.merkle import HASH_BYTES, TILE_HEIGHT

TILE_WIDTH = 1 << TILE_HEIGHT
ENTRY_LIMIT_BYTES = 65535
"""What a 2-byte length can say."""
BUNDLE_LIMIT_BYTES = TILE_WIDTH * (2 + ENTRY_LIMIT_BYTES)
LEVEL_LIMIT = 8
"""Levels 0 to 7 hold every tree below 2**63 entries."""
ENTRIES = -1
"""The `level` of entry bundles."""

_PATH = re.compile(r"tile/(entries|[0-7])/((?:x[0-9]{3}/)*[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?")
_length = struct.Struct(">H")


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """The name of one tile or bundle."""

    level: int
    """0 to 7, or ENTRIES."""
    index: int
    """Position within the level."""
    width: int = TILE_WIDTH
    """Hashes or entries in it, 1 to 256; 256 is a full tile."""

    @property
    def path(self) -> str:
        """Relative to the log; `parse_path` is the inverse."""
        kind = "entries" if self.level == ENTRIES else str(self.level)
        partial = "" if self.width == TILE_WIDTH else f".p/{self.width}"
        return f"tile/{kind}/{_index_path(self.index)}{partial}"

    @property
    def full(self) -> Tile:
        """The tile this becomes once 256 wide."""
        return Tile(self.level, self.index)

    @property
    def first(self) -> int:
        """Index, within the level, of its first hash or entry."""
        return self.index * TILE_WIDTH


def _index_path(index: int) -> str:
    groups = [f"{index % 1000:03d}"]
    while index >= 1000:
        index //= 1000
        groups.append(f"x{index % 1000:03d}")
    return "/".join(reversed(groups))


def parse_path(path: str) -> Tile:
    """The tile that lies at `path`; raises MalformedEvidence for any other spelling."""
    match = _PATH.fullmatch(path)
    if match is not None and len(path) < 60:
        kind, index, width = match.groups()
        level = ENTRIES if kind == "entries" else int(kind)
        tile = Tile(level, int(index.replace("x", "").replace("/", "")), int(width or TILE_WIDTH))
        if tile.path == path and tile.width <= TILE_WIDTH:
            return tile
    raise MalformedEvidence(f"{path[:120]}: expected the path of a tile or entry bundle")


def level_size(level: int, size: int) -> int:
    """How many hashes (or entries) there are at `level` in a tree of `size` entries."""
    return size if level == ENTRIES else size >> (TILE_HEIGHT * level)


def tiles_of(level: int, size: int) -> Iterator[Tile]:
    """The tiles of `level` in a tree of `size` entries, the last one possibly partial."""
    count = level_size(level, size)
    for index in range(count // TILE_WIDTH):
        yield Tile(level, index)
    if count % TILE_WIDTH:
        yield Tile(level, count // TILE_WIDTH, count % TILE_WIDTH)


def levels_of(size: int) -> range:
    """The tile levels a tree of `size` entries has."""
    return range(max(size.bit_length() + TILE_HEIGHT - 1, 0) // TILE_HEIGHT)


def partial_tile(level: int, size: int) -> Tile | None:
    """The partial tile of `level` at that size, or None where the level ends with a full one."""
    count = level_size(level, size)
    return Tile(level, count // TILE_WIDTH, count % TILE_WIDTH) if count % TILE_WIDTH else None


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """Entries, each after its length. Raises Misuse for one that is too long."""
    pack = _length.pack
    try:
        return b"".join([part for entry in entries for part in (pack(len(entry)), entry)])
    except struct.error:
        longest = max(map(len, entries))
        raise Misuse(
            f"log entry: {longest} bytes, limit {ENTRY_LIMIT_BYTES}; log a digest of larger evidence"
        ) from None


def decode_bundle(data: bytes, count: int, *, where: str) -> list[bytes]:
    """Exactly `count` entries; the inverse of encode_bundle. Raises MalformedEvidence for anything else."""
    entries, at, end = [], 0, len(data)
    for number in range(count):
        if at + 2 > end:
            raise MalformedEvidence(f"{where}: expected {count} entries, found {number} and {end - at} bytes")
        start = at + 2
        at = start + (data[at] << 8 | data[at + 1])
        entries.append(data[start:at])
    if at != end:
        raise MalformedEvidence(f"{where}: expected {at} bytes for {count} entries, found {end}")
    return entries


def decode_tile(data: bytes, tile: Tile, *, where: str) -> list[bytes]:
    """The hashes of a tile. Raises MalformedEvidence unless it has exactly its width."""
    if len(data) != tile.width * HASH_BYTES:
        raise MalformedEvidence(f"{where}: expected {tile.width * HASH_BYTES} bytes, found {len(data)}")
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]
