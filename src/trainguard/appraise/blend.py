"""Weights that ranks brought together between two steps: pure arithmetic over sampled elements.

Model averaging (local SGD, post-local SGD, hierarchical and gossip averaging, averages written by hand) replaces every
rank's weights by a weighted mean of the ranks' own: new_r = Σ s_i · old_i, with no s_i below 0, and their sum 1. The
values before and after are known on every rank, at the same secret places, so this can be computed again. An edit
of one rank's weights, or of all alike, is no such mean.

    mean    new_r is the mean over all ranks that came out alike
    mixed   new_r lies between its own and the mean, or is another weighted mean of the ranks' weights
    None    no weighted mean of what the ranks held gives what they hold now
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainguard.appraise.reduction import RANKS_LIMIT, ROUNDOFFS, SPARE_ELEMENTS, solve

Values = list[float]
Kind = Literal["mean", "mixed"]

SHARE_TOLERANCE = 1e-3
FLOAT16_NORMAL = 2.0**-14
"""Below this, float16 is not as fine as its roundoff says."""


def blend_of(olds: Sequence[Values], news: Sequence[Values]) -> Kind | None:
    """How `news` came from `olds`: the same elements of every rank before and after; all lists of one length.

    Rounding: what summing the ranks' values once, in the narrowest type that holds all of them, can leave.
    """
    if len(olds) < 2 or not olds[0] or not all(map(math.isfinite, (v for row in (*olds, *news) for v in row))):
        return None
    rounding = _roundings(olds, news)
    alike: dict[tuple[float, ...], list[int]] = {}
    for rank, values in enumerate(news):
        alike.setdefault(tuple(values), []).append(rank)
    # In units of the largest value of any rank: then rounding weighs the same in every element.
    widest = [max(abs(each[i]) for each in olds) or 1.0 for i in range(len(olds[0]))]
    olds, news = _scaled(olds, widest), _scaled(news, widest)
    mean = _mean(olds)
    if len(alike) == 1 and _fits(mean, news[0], olds[0], rounding, len(olds)):
        return "mean"
    for ranks in alike.values():
        own = _mean([olds[rank] for rank in ranks])
        if _fits(own, news[ranks[0]], olds[ranks[0]], rounding, len(olds)):
            continue
        if not all(_mixed(rank, olds, news[rank], mean, rounding) for rank in ranks):
            return None
    return "mixed"


def _mixed(rank: int, olds: Sequence[Values], new: Values, mean: Values, rounding: _Rounding) -> bool:
    """Whether a rank's new values lie between its own and the mean, or are a weighted mean of some ranks'."""
    own, count = olds[rank], len(olds)
    apart = [m - o for m, o in zip(mean, own, strict=True)]
    size = math.fsum(a * a for a in apart)
    if size > 0:
        share = math.fsum(a * (n - o) for a, n, o in zip(apart, new, own, strict=True)) / size
        between = [o + share * a for o, a in zip(own, apart, strict=True)]
        if -SHARE_TOLERANCE <= share <= 1 + SHARE_TOLERANCE and _fits(between, new, own, rounding, count):
            return True
    others = list({tuple(each): each for each in olds if each != own}.values())
    if not others or len(others) > RANKS_LIMIT or len(new) < 2 * len(others) + SPARE_ELEMENTS:
        return False
    columns = [[a - b for a, b in zip(each, own, strict=True)] for each in others]
    shares = solve(columns, [n - o for n, o in zip(new, own, strict=True)])
    if shares is None or min(shares) < -SHARE_TOLERANCE or sum(shares) > 1 + SHARE_TOLERANCE:
        return False
    made = [o + math.fsum(s * column[i] for s, column in zip(shares, columns, strict=True)) for i, o in enumerate(own)]
    return _fits(made, new, own, rounding, count)


@dataclass(frozen=True, slots=True)
class _Rounding:
    """What one rounding can change in each element, in units of the largest value there."""

    unit: float
    units: Values

    @property
    def narrow(self) -> bool:
        """Whether the type is so narrow that an edit of one per cent is a rounding or two."""
        return self.unit != ROUNDOFFS[0]


def _fits(made: Values, new: Values, own: Values, rounding: _Rounding, count: int) -> bool:
    """Whether `new` is `made` up to rounding, and in a narrow type also nearer to it than to what it was before."""
    if rounding.narrow and _within(made, new, rounding, 2):
        return True
    if not _within(made, new, rounding, count + 4):
        return False
    off = math.fsum((m - n) ** 2 for m, n in zip(made, new, strict=True))
    moved = math.fsum((o - n) ** 2 for o, n in zip(own, new, strict=True))
    return not rounding.narrow or 4 * off <= moved


def _within(made: Values, new: Values, rounding: _Rounding, times: int) -> bool:
    return all(abs(m - n) <= times * unit for m, n, unit in zip(made, new, rounding.units, strict=True))


def _mean(rows: Sequence[Values]) -> Values:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def _scaled(rows: Sequence[Values], widest: Values) -> list[Values]:
    return [[value / wide for value, wide in zip(row, widest, strict=True)] for row in rows]


def _roundings(olds: Sequence[Values], news: Sequence[Values]) -> _Rounding:
    """Rounding of the narrowest type that holds all values: bfloat16, float16, or at least float32."""
    values = [value for row in (*olds, *news) for value in row]
    if all(struct.pack("<f", value)[:2] == b"\0\0" for value in values if abs(value) < 3e38):
        unit = ROUNDOFFS[2]
    elif all(abs(value) < 65_504 and struct.unpack("<e", struct.pack("<e", value))[0] == value for value in values):
        unit = ROUNDOFFS[1]
    else:
        unit = ROUNDOFFS[0]
    units = []
    for i in range(len(olds[0])):
        widest = max(abs(each[i]) for each in olds) or 1.0
        units.append(unit * max(1.0, FLOAT16_NORMAL / widest if unit == ROUNDOFFS[1] else 1.0))
    return _Rounding(unit, units)
