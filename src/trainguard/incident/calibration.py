"""How often an account with such a score was the right one: the scores of attribution, held against scripted truth.

The table counts candidates of the rung *account or login* over all scripted incidents (testing/incidents.py,
testing/casebook.py), one history each, by their score. `python bench/bench_incidents.py --calibration` makes it again
and compares; `--across` fits it on one set and reads it on the other.

The share of a band is (right + 1) / (seen + 2) (Laplace's rule of succession: no share is nothing or all), with bands
pooled until shares do not fall where scores rise (isotonic regression; Zadrozny and Elkan, KDD 2002). What is shown is
the smaller of score and share. Scripts hold the ways of framing that somebody thought of, so they may lower a
confidence; that they agree is no reason to raise it.
"""

from __future__ import annotations

from collections.abc import Iterable

BOUNDS = (0.0, 0.25, 0.4, 0.54, 0.7, 0.8)
"""Where bands begin."""

Band = tuple[float, int, int]
"""Where it begins, candidates that were the true account, candidates seen."""

TABLE: tuple[Band, ...] = (
    (0.0, 0, 35),  # 3%
    (0.4, 0, 7),  # 11%
    (0.54, 3, 3),  # 80%
    (0.7, 47, 47),  # 98%
)


def tally(seen: Iterable[tuple[float, bool]]) -> tuple[Band, ...]:
    """Scores and whether the account was the true one, by band; pooled so that shares do not fall."""
    counted = [(0, 0)] * len(BOUNDS)
    for score, right in seen:
        band = max(i for i, begin in enumerate(BOUNDS) if score >= begin)
        counted[band] = (counted[band][0] + right, counted[band][1] + 1)
    pooled: list[Band] = []
    for begin, (borne_out, total) in zip(BOUNDS, counted, strict=True):
        pooled.append((begin, borne_out, total))
        while len(pooled) > 1 and _share(pooled[-2]) > _share(pooled[-1]):
            low, high = pooled[-2:]
            pooled[-2:] = [(low[0], low[1] + high[1], low[2] + high[2])]
    return tuple(pooled)


def calibrated(score: float, table: tuple[Band, ...] = TABLE) -> float:
    """The confidence to show for an account or login with this score, 0 to 1, two decimals."""
    band = max((one for one in table if score >= one[0]), default=None)
    return round(score if band is None else min(score, _share(band)), 2)


def _share(band: Band) -> float:
    _, right, seen = band
    return (right + 1) / (seen + 2)
