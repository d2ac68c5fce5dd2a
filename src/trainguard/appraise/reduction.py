"""What became of the ranks' gradients when they were reduced: pure arithmetic over sampled elements.

The gradient right after backward is known on every rank, and so is the one that every rank then used, at the same
secret places. Reduction is linear: used = Σ share_r · local_r. With enough sampled elements the shares can be solved
for, and they say who took part, and with which sign:

    all equal            a mean or a sum, times one factor for all tensors (a clip, a gradient scaler)
    one apart            that rank's part was scaled, dropped or turned after backward and before the reduction
    no shares fit        something was added that no rank's backward made

Three classes of rounding are tried: float32, and what a float16 or bfloat16 communication hook leaves.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

ROUNDOFFS = (2.0**-24, 2.0**-11, 2.0**-8)
"""float32, float16, bfloat16."""
HALF_SMALLEST = 2.0**-24
"""What is below the smallest number of float16 is lost by a hook that reduces in it."""
RANKS_LIMIT = 64
"""Shares are solved for this many ranks at most: the time grows with the third power."""
SHARE_TOLERANCE = 1e-3
NEARLY = 8
"""Roundings of bfloat16 by which shares may seem to differ that are equal."""
SPARE_ELEMENTS = 4
"""Elements needed beyond twice the number of ranks, so that a fit cannot be chance."""

Values = list[float]
Kind = Literal["mean", "shares", "unlike", "nothing"]
Way = Literal["mean", "rounded", "shares", "unlike", "unreduced", "differ", "nothing"]
"""A Kind over all ranks; rounded: a mean in low precision; unreduced: each used its own; differ: no two the same."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the reduced gradient relates to the ranks' own."""

    kind: Kind
    """mean: equal shares; shares: unequal ones; unlike: no shares explain it; nothing: not enough to tell."""
    factor: float = 1.0
    """Reduced gradient over the mean of the ranks' own (kind mean)."""
    shares: tuple[float, ...] = ()
    """One a rank, in units of what most ranks have; positive for most of those that take part."""
    absolute: tuple[float, ...] = ()
    """One a rank: 1 is its share in a plain mean."""
    roundoff: float = ROUNDOFFS[0]
    """The class of rounding that was needed."""

    @property
    def turned(self) -> tuple[int, ...]:
        """Ranks (by position) that took part with the wrong sign."""
        return tuple(i for i, share in enumerate(self.shares) if share < -SHARE_TOLERANCE)

    @property
    def apart(self) -> tuple[int, ...]:
        """Ranks (by position) whose share is another than that of most."""
        return tuple(i for i, share in enumerate(self.shares) if abs(share - 1.0) > SHARE_TOLERANCE)


def reduce_of(locals_: list[list[Values]], reduced: list[Values]) -> Reduction:
    """How `reduced` came from `locals_`.

    locals_: for each rank, for each tensor, the sampled gradient after backward; reduced: for each tensor.
    All lists of one tensor have the same length.
    """
    kept = [i for i, values in enumerate(reduced) if _usable([rank[i] for rank in locals_], values)]
    target = [value for i in kept for value in reduced[i]]
    columns = [[value for i in kept for value in rank[i]] for rank in locals_]
    if not target or not any(target) or not any(map(any, columns)):
        return Reduction("nothing")
    spread = [math.fsum(abs(column[n]) for column in columns) / len(columns) for n in range(len(target))]
    ends = _ends([len(reduced[i]) for i in kept])
    count = len(columns)
    mean = [math.fsum(column[n] for column in columns) / count for n in range(len(target))]
    equal = _quotient(mean, target)
    parts = [i for i, column in enumerate(columns) if any(column)]
    enough = len(target) >= 2 * len(parts) + SPARE_ELEMENTS and len(parts) <= RANKS_LIMIT
    solved = solve([columns[i] for i in parts], target) if enough else None
    weights = [0.0] * count
    for w, i in zip(solved or [], parts, strict=False):
        weights[i] = w
    mixed = [math.fsum(w * column[n] for w, column in zip(weights, columns, strict=True)) for n in range(len(target))]
    wide = max(map(abs, weights)) * count
    for roundoff in ROUNDOFFS:
        if equal is not None and _fits(mean, target, equal, spread, ends, roundoff, count):
            return Reduction("mean", equal, (1.0,) * count, (equal,) * count, roundoff)
        if solved and _fits(mixed, target, 1.0, [each * wide for each in spread], ends, roundoff, count):
            nearly = roundoff == ROUNDOFFS[1] and equal is not None and _nearly(solved)
            if nearly and _fits(mean, target, equal or 0.0, spread, ends, ROUNDOFFS[2], count):
                return Reduction("mean", equal or 0.0, (1.0,) * count, (equal or 0.0,) * count, ROUNDOFFS[2])
            absolute = tuple(weights[i] * count if i in parts else 1.0 for i in range(count))
            return Reduction("shares", shares=_normal(solved, parts, count), absolute=absolute, roundoff=roundoff)
    return Reduction("unlike" if enough or len(target) >= SPARE_ELEMENTS else "nothing")


def way_of(locals_: list[list[Values]], used: list[list[Values]]) -> tuple[Way, Reduction]:
    """How the ranks' gradients became the ones they used (lists by rank, then tensor)."""
    versions = {repr(each): each for each in used}
    times = Counter(map(repr, used))
    if len(versions) > 1 and used == locals_:
        return "unreduced", Reduction("unlike")
    best: Reduction | None = None
    for text, _ in times.most_common(4):
        found = reduce_of(locals_, versions[text])
        if found.kind == "mean":
            return ("mean" if found.roundoff == ROUNDOFFS[0] else "rounded"), found
        best = best or found
    if best is None or best.kind == "nothing":
        return "nothing", Reduction("nothing")
    if len(versions) > 1 and times.most_common(1)[0][1] <= len(used) // 2:
        return "differ", best
    return best.kind, best


def one_tensor(locals_: list[list[Values]], used: list[Values]) -> tuple[int, Reduction] | None:
    """The first tensor to which some rank gave its gradient with the wrong sign, where one does not speak for all."""
    for i, values in enumerate(used):
        found = reduce_of([[rank[i]] for rank in locals_], [values])
        if found.kind == "shares" and found.turned:
            return i, found
    return None


def _usable(locals_: list[Values], reduced: Values) -> bool:
    if any(len(values) != len(reduced) for values in locals_):
        return False
    return all(map(math.isfinite, reduced)) and all(all(map(math.isfinite, values)) for values in locals_)


def _ends(lengths: list[int]) -> list[tuple[int, int]]:
    out, start = [], 0
    for length in lengths:
        out.append((start, start + length))
        start += length
    return out


def _quotient(values: Values, target: Values) -> float | None:
    bottom = math.fsum(v * v for v in values)
    return math.fsum(a * b for a, b in zip(values, target, strict=True)) / bottom if bottom > 0 else None


def _fits(
    values: Values,
    target: Values,
    factor: float,
    spread: Values,
    ends: list[tuple[int, int]],
    roundoff: float,
    count: int,
) -> bool:
    """Whether target = factor · values up to rounding; the parts that cancel (`spread`) carry the rounding.

    A hook in low precision rounds every rank's part once and every sum of two once: count + 1 times.
    """
    times = 16 if roundoff == ROUNDOFFS[0] else count + 2
    for start, end in ends:
        top = max(spread[start:end]) * abs(factor)
        floor = 4 * roundoff * top if roundoff == ROUNDOFFS[0] else 0.0
        floor += 2 * HALF_SMALLEST * abs(factor) if roundoff == ROUNDOFFS[1] else 0.0
        for n in range(start, end):
            allowed = times * roundoff * (abs(target[n]) + abs(factor) * spread[n]) + floor
            if abs(target[n] - factor * values[n]) > allowed:
                return False
    # A coarse class must still leave something to see: not every reduced value may lie within its own error.
    bottom = math.fsum(v * v for v in values) * factor * factor
    error = math.fsum((t - factor * v) ** 2 for t, v in zip(target, values, strict=True))
    return error <= 1e-2 * bottom


def _nearly(solved: list[float]) -> bool:
    """Whether these shares are equal up to what rounding to bfloat16 makes of shares solved for."""
    top = max(solved)
    return top > 0 and min(solved) > (1 - NEARLY * ROUNDOFFS[2]) * top


def _normal(solved: list[float], parts: list[int], count: int) -> tuple[float, ...]:
    """Shares in units of the middle one of the positive ones; ranks whose gradient is zero count as in order."""
    positive = sorted(w for w in solved if w > 0) or sorted(map(abs, solved))
    unit = positive[len(positive) // 2] or 1.0
    shares = [1.0] * count
    for w, i in zip(solved, parts, strict=True):
        shares[i] = w / unit
    return tuple(shares)


def solve(columns: list[Values], target: Values) -> list[float] | None:
    """Least squares by normal equations of scaled columns, in float64; None where the columns are nearly dependent."""
    sizes = [math.sqrt(math.fsum(v * v for v in column)) for column in columns]
    rows = [
        [
            math.fsum(x * y for x, y in zip(a, b, strict=True)) / (size * other)
            for b, other in zip(columns, sizes, strict=True)
        ]
        + [math.fsum(x * y for x, y in zip(a, target, strict=True)) / size]
        for a, size in zip(columns, sizes, strict=True)
    ]
    found = _eliminate(rows)
    return None if found is None else [value / size for value, size in zip(found, sizes, strict=True)]


def _eliminate(rows: list[list[float]]) -> list[float] | None:
    """Gauss with pivots; None where a pivot is too small for the answer to mean anything."""
    count = len(rows)
    for i in range(count):
        pivot = max(range(i, count), key=lambda r: abs(rows[r][i]))
        if abs(rows[pivot][i]) < 1e-9:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, count):
            ratio = rows[r][i] / rows[i][i]
            rows[r] = [a - ratio * b for a, b in zip(rows[r], rows[i], strict=True)]
    out = [0.0] * count
    for i in reversed(range(count)):
        out[i] = (rows[i][count] - math.fsum(rows[i][j] * out[j] for j in range(i + 1, count))) / rows[i][i]
    return out
