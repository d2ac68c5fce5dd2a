"""What link *shards* of one rank says of one step, strictly parsed (spec/evidence.md "shards")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainguard.appraise.steps import parse_blob
from trainguard.errors import MalformedEvidence

TENSORS_LIMIT = 64
ELEMENTS_LIMIT = 4096

Place = tuple[str, int, int, int, int]
"""Tensor, rank that holds the shard, offset, stride, count."""


@dataclass(frozen=True, slots=True)
class Shards:
    """One rank's part: its own gradients and weights everywhere, what was reduced and held only in its shards."""

    places: tuple[Place, ...]
    local: list[list[float]]
    """By place: the gradient that backward left on this rank, over all passes."""
    gathered: list[list[float]]
    """By place: the weight that this rank worked with."""
    reduced: dict[int, list[float]]
    """Number of a place in this rank's own shard → the gradient that the optimizer used."""
    held: dict[int, list[float]]
    """The same → the weight before the update, in the type it is gathered in."""


def parse_shards(value: Any) -> Shards:
    """The value of link *shards*. Raises MalformedEvidence for what is not as specified."""
    if not isinstance(value, dict):
        raise MalformedEvidence(f"shards: expected an object, found {type(value).__name__}")
    rank, rows = value.get("rank"), value.get("tensors")
    if not isinstance(rank, int) or not isinstance(rows, list) or len(rows) > TENSORS_LIMIT:
        raise MalformedEvidence(f"shards: expected a rank and at most {TENSORS_LIMIT} tensors")
    places = tuple(_place(row) for row in rows)
    counts = [place[4] for place in places]
    own = [i for i, place in enumerate(places) if place[1] == rank]
    reduced, held = (parse_blob(value.get(key)) for key in ("reduced", "held"))
    if len(reduced) != len(held) or len(reduced) not in (0, sum(counts[i] for i in own)):
        own = []  # a shard without a gradient: nothing is said of any
    return Shards(
        places,
        _split(value.get("local"), counts),
        _split(value.get("gathered"), counts),
        dict(zip(own, _cut(reduced, [counts[i] for i in own]), strict=True)) if reduced else {},
        dict(zip(own, _cut(held, [counts[i] for i in own]), strict=True)) if held else {},
    )


def _place(row: object) -> Place:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str) or not isinstance(row[1], int):
        raise MalformedEvidence(f"shards: expected [name, rank, place], found {str(row)[:80]}")
    where = row[2]
    if not isinstance(where, list) or len(where) != 3 or not all(isinstance(n, int) and n >= 0 for n in where):
        raise MalformedEvidence(f"shards: expected [offset, stride, count], found {str(where)[:80]}")
    if where[2] > ELEMENTS_LIMIT:
        raise MalformedEvidence(f"shards: {where[2]} elements, at most {ELEMENTS_LIMIT}")
    return row[0][:512], row[1], where[0], where[1], where[2]


def _split(blob: object, counts: list[int]) -> list[list[float]]:
    values = parse_blob(blob)
    if len(values) != sum(counts):
        raise MalformedEvidence(f"shards: expected {sum(counts)} values, found {len(values)}")
    return _cut(values, counts)


def _cut(values: list[float], counts: list[int]) -> list[list[float]]:
    out, start = [], 0
    for count in counts:
        out.append(values[start : start + count])
        start += count
    return out
