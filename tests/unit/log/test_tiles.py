"""Names and bytes of tiles and bundles, as C2SP tlog-tiles has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainguard.errors import MalformedEvidence, Misuse
from trainguard.log.tiles import (
    ENTRIES,
    Tile,
    decode_bundle,
    decode_tile,
    encode_bundle,
    level_size,
    parse_path,
    partial_tile,
    tiles_of,
)


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        (Tile(0, 0), "tile/0/000"),
        (Tile(1, 273, 112), "tile/1/273.p/112"),
        (Tile(0, 1234067), "tile/0/x001/x234/067"),
        (Tile(ENTRIES, 1000, 1), "tile/entries/x001/000.p/1"),
    ],
)
def test_names_are_those_of_the_specification(tile: Tile, path: str) -> None:
    """1234067 is x001/x234/067."""
    assert tile.path == path
    assert parse_path(path) == tile


def test_a_tree_of_70000_has_the_tiles_the_specification_counts() -> None:
    """273 full level-0 tiles and one of 112; one full level-1 tile and one of 17; one level-2 tile of 1."""
    shape = [[tile.width for tile in tiles_of(level, 70_000)] for level in (0, 1, 2, 3)]
    assert shape == [[256] * 273 + [112], [256, 17], [1], []]
    assert partial_tile(0, 256) is None
    assert partial_tile(1, 256) == Tile(1, 0, 1)
    assert level_size(ENTRIES, 70_000) == 70_000


@pytest.mark.parametrize(
    "path",
    [
        "tile/0/0",
        "tile/0/0000",
        "tile/00/000",
        "tile/8/000",
        "tile/-1/000",
        "tile/0/x000/001",
        "tile/0/001/002",
        "tile/0/x001/x002",
        "tile/0/000.p/0",
        "tile/0/000.p/01",
        "tile/0/000.p/256",
        "tile/0/000.p",
        "tile/0/٠٠٠",
        "tile/entries",
        "../tile/0/000",
        "tile/0/000\n",
        "tile/0/" + "x999/" * 12 + "999",
    ],
)
def test_any_other_spelling_of_a_name_is_refused(path: str) -> None:
    """One name per tile."""
    with pytest.raises(MalformedEvidence):
        parse_path(path)


@settings(deadline=None)
@given(st.integers(-1, 7), st.integers(0, 2**40), st.integers(1, 256))
def test_names_round_trip(level: int, index: int, width: int) -> None:
    """parse ∘ path is the identity."""
    assert parse_path(Tile(level, index, width).path) == Tile(level, index, width)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=30))
def test_bundles_round_trip(entries: list[bytes]) -> None:
    """decode ∘ encode is the identity, empty entries and empty bundles too."""
    assert decode_bundle(encode_bundle(entries), len(entries), where="b") == entries


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(0, 10))
def test_any_bytes_are_a_bundle_or_malformed(data: bytes, count: int) -> None:
    """What decodes encodes to the same bytes; nothing else is taken."""
    try:
        entries = decode_bundle(data, count, where="b")
    except MalformedEvidence:
        return
    assert encode_bundle(entries) == data
    assert len(entries) == count


def test_the_longest_entry_fits_and_one_byte_more_does_not() -> None:
    """65,535 bytes."""
    assert decode_bundle(encode_bundle([bytes(65535)]), 1, where="b") == [bytes(65535)]
    with pytest.raises(Misuse, match="65536 bytes, limit 65535"):
        encode_bundle([bytes(65536)])


@pytest.mark.parametrize("change", [-32, -1, 1, 32])
def test_a_tile_has_exactly_its_width(change: int) -> None:
    """Not a byte more or less."""
    with pytest.raises(MalformedEvidence):
        decode_tile(bytes(96 + change), Tile(0, 0, 3), where="t")
    assert decode_tile(bytes(96), Tile(0, 0, 3), where="t") == [bytes(32)] * 3


def test_vectors_of_bundles_hold() -> None:
    """tests/vectors/log/bundles.json."""
    vectors = json.loads((Path(__file__).parents[2] / "vectors/log/bundles.json").read_text())
    for vector in vectors:
        data = bytes.fromhex(vector["bundle"])
        if vector["error"] is None:
            assert [entry.hex() for entry in decode_bundle(data, vector["count"], where="v")] == vector["entries"]
        else:
            with pytest.raises(MalformedEvidence):
                decode_bundle(data, vector["count"], where="v")
