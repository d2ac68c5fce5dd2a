"""Weighted means of what ranks held are told from edits, in every type of weights."""

from __future__ import annotations

import math
import random
import struct

import pytest

from trainguard.appraise.blend import Values, blend_of


def float32(value: float) -> float:
    """Rounded once."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def bfloat16(value: float) -> float:
    """Rounded once, to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def held(ranks: int, spread: float = 1e-3, count: int = 48) -> list[Values]:
    """Weights of ranks that came apart by some steps of their own; a third of them near 1, as norms have."""
    draw = random.Random(ranks)
    base = [draw.gauss(1.0 if i % 3 else 0.0, 0.02) for i in range(count)]
    return [[float32(b + spread * draw.gauss(0, 1)) for b in base] for _ in range(ranks)]


def mean(rows: list[Values]) -> Values:
    """Summed in float32, one after the other, as a ring does."""
    out = []
    for column in zip(*rows, strict=True):
        total = 0.0
        for value in column:
            total = float32(total + value)
        out.append(float32(total / len(rows)))
    return out


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_a_mean_over_all_ranks_is_one(ranks: int) -> None:
    """Averaging every N steps, by an averager of torch or by hand."""
    olds = held(ranks)
    assert blend_of(olds, [mean(olds)] * ranks) == "mean"


def test_a_mean_of_equal_weights_that_only_rounds_is_one() -> None:
    """Three equal numbers do not always have themselves as their mean."""
    olds = held(1) * 3
    new = mean(olds)
    assert new != olds[0]
    assert blend_of(olds, [new] * 3) == "mean"


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_a_part_of_the_way_to_the_mean_is_a_blend(share: float) -> None:
    """Elastic averaging: every rank keeps some of its own."""
    olds = held(3)
    middle = mean(olds)
    news = [[float32(o + share * (m - o)) for o, m in zip(old, middle, strict=True)] for old in olds]
    assert blend_of(olds, news) == "mixed"


def test_groups_pairs_and_uneven_weights_are_blends() -> None:
    """Hierarchical averaging, gossip, and a mean weighted by what each rank has seen."""
    olds = held(4)
    groups = [mean(olds[:2])] * 2 + [mean(olds[2:])] * 2
    assert blend_of(olds, groups) == "mixed"
    ring = [[float32((a + b) / 2) for a, b in zip(olds[r], olds[(r + 1) % 4], strict=True)] for r in range(4)]
    assert blend_of(olds, ring) == "mixed"
    shares = [0.4, 0.3, 0.2, 0.1]
    uneven = [
        float32(math.fsum(s * v for s, v in zip(shares, column, strict=True))) for column in zip(*olds, strict=True)
    ]
    assert blend_of(olds, [uneven] * 4) == "mixed"


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("factor", [1.01, 1.0001, -1.0])
def test_an_edit_is_no_blend(ranks: int, factor: float) -> None:
    """Before, after, or in place of averaging; of one rank, or of all alike."""
    olds = held(ranks)
    edited = [float32(factor * v) for v in olds[0]]
    middle = mean(olds)
    assert blend_of(olds, [edited, *olds[1:]]) is None
    assert blend_of(olds, [[float32(factor * v) for v in middle]] * ranks) is None
    assert blend_of(olds, [mean([edited, *olds[1:]])] * ranks) is None
    alike = [olds[0]] * ranks
    assert blend_of(alike, [edited] * ranks) is None


def test_means_and_edits_of_bfloat16_are_told_apart() -> None:
    """An edit of one per cent is no more than three roundings there; the ranks came apart by more."""
    olds = [[bfloat16(v) for v in row] for row in held(4, spread=0.05)]
    middle = [bfloat16(math.fsum(column) / 4) for column in zip(*olds, strict=True)]
    assert blend_of(olds, [middle] * 4) == "mean"
    assert blend_of([olds[0]] * 4, [[bfloat16(1.02 * v) for v in olds[0]]] * 4) is None
    assert blend_of(olds, [[bfloat16(1.2 * v) for v in middle]] * 4) is None


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf], [0.0]])
def test_what_is_no_number_harms_nobody(values: Values) -> None:
    """Evidence is an attacker's."""
    blend_of([values, values], [values, values])
    assert blend_of([values], [values]) is None
