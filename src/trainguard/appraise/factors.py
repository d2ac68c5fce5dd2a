"""By what each rank multiplies its loss: the factors of link *truth*, joined over the ranks of one job.

A rank that scales or turns its loss before backward gives what its backward left, and all it says of itself agrees. But
ranks of one job run the same line on other data, so the factor between what a loss function gave and what backward
started from is the same on all of them, unless it follows the data. Only that is judged:

1. The others are constant: every observation of each, two at least, has the same factor.
2. The odd rank's observations lie between steps at which each of the others was observed: a schedule moves all.
3. They have as many rows, and as many calls, as the others' have: a batch of another size may weigh otherwise.
4. There are two of them; one where the sign is turned.

A GradScaler's scale, as the rank states it, is divided out. Frames are an attacker's: what is no call is passed over
here (check *loss* reports it), and everything kept is bounded. Only memory, no findings: see `replicas.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from trainguard.evidence import Evidence

TOLERANCE = 1e-3
"""Relative: factors that differ by less are equal (a factor may be kept in half precision)."""
OFTEN = 2
"""Observations of every other rank, and of the odd one where its sign is not turned."""
KEPT = 16
"""Observations of one rank at one place."""
PLACES_LIMIT = 64
CALLS_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Observation:
    """What one rank's step on tape says of one place."""

    index: int
    factor: float | None
    """None: the calls of this one step have several, or it is not linear."""
    used: tuple[int, int]
    """Fewest and most rows that counted in a call."""
    calls: int
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Odd:
    """A rank whose loss counts otherwise than that of all others."""

    place: str
    rank: int | None
    """None: of two ranks that differ, neither is the odd one."""
    factor: float
    common: float
    turned: bool
    seen: Observation
    other: Observation


@dataclass(slots=True)
class _Place:
    by_rank: dict[int, deque[Observation]] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    """Ranks observed since the last comparison."""
    said: set[tuple[int | None, bool]] = field(default_factory=set)


@dataclass(slots=True)
class Factors:
    """The factors of one optimizer in one attempt; feed it every step."""

    places: dict[str, _Place] = field(default_factory=dict)
    unsteady: int = 0
    """Comparisons that the data, or a schedule, made impossible."""

    def see(self, rank: int, evidence: Evidence) -> bool:
        """Keep what a step says; whether it said anything."""
        found = list(_observations(evidence))
        for place, observation in found:
            if place not in self.places and len(self.places) >= PLACES_LIMIT:
                continue
            kept = self.places.setdefault(place, _Place())
            kept.by_rank.setdefault(rank, deque(maxlen=KEPT)).append(observation)
            kept.fresh.add(rank)
        return bool(found)

    def odd(self, world: int) -> Iterator[Odd]:
        """Each odd rank once, at places that all ranks have been observed at since the last time."""
        for name, place in self.places.items():
            if len(place.by_rank) < world or len(place.fresh) < len(place.by_rank):
                continue
            place.fresh.clear()
            for odd in self._compare(name, place):
                if (odd.rank, odd.turned) not in place.said:
                    place.said.add((odd.rank, odd.turned))
                    yield odd

    def _compare(self, name: str, place: _Place) -> Iterator[Odd]:
        if min(map(len, place.by_rank.values())) < OFTEN:
            return
        steady = {rank: _constant(seen) for rank, seen in place.by_rank.items()}
        values = [factor for factor in steady.values() if factor is not None]
        common = max(values, key=lambda factor: sum(_close(factor, each) for each in values), default=0.0)
        usual = [rank for rank, factor in steady.items() if factor is not None and _close(factor, common)]
        rest = [rank for rank in steady if rank not in usual]
        if len(steady) == 2 and len(values) == 2 and rest:
            yield from _two(name, *(place.by_rank[rank] for rank in (*usual, *rest)))
        elif rest and (len(usual) < 2 or 3 * len(rest) > len(steady)):
            self.unsteady += 1
        else:
            for rank in rest:
                yield from _judged(name, rank, place.by_rank[rank], [place.by_rank[other] for other in usual], common)


def _judged(
    name: str, rank: int, own: deque[Observation], others: list[deque[Observation]], common: float
) -> Iterator[Odd]:
    first, last = max(seen[0].index for seen in others), min(seen[-1].index for seen in others)
    apart = [o for o in own if first <= o.index <= last and o.factor is not None and not _close(o.factor, common)]
    apart = [o for o in apart if _alike(o, others)]
    turned = [o for o in apart if (o.factor or 0.0) * common < 0]
    if not turned and len(apart) < OFTEN:
        return
    shown = (turned or apart)[-1]
    yield Odd(name, rank, shown.factor or 0.0, common, bool(turned), shown, others[0][-1])


def _two(name: str, one: deque[Observation], other: deque[Observation]) -> Iterator[Odd]:
    a, b = _constant(one), _constant(other)
    if a is not None and b is not None and _alike(one[-1], [other]) and _alike(other[-1], [one]):
        yield Odd(name, None, b, a, a * b < 0, other[-1], one[-1])


def _alike(own: Observation, others: list[deque[Observation]]) -> bool:
    """Whether its calls, and the rows that count in them, are within what the others' were."""
    seen = [each for rank in others for each in rank]
    fewest, most = min(each.used[0] for each in seen), max(each.used[1] for each in seen)
    return fewest <= own.used[0] and own.used[1] <= most and own.calls in {each.calls for each in seen}


def _constant(seen: deque[Observation]) -> float | None:
    first = seen[0].factor
    if first is None or any(each.factor is None or not _close(first, each.factor) for each in seen):
        return None
    return first


def _observations(evidence: Evidence) -> Iterator[tuple[str, Observation]]:
    truth, index = evidence.body.get("truth"), evidence.body.get("index")
    losses = truth.get("losses") if isinstance(truth, dict) else None
    calls = losses.get("calls") if isinstance(losses, dict) else None
    if not isinstance(calls, list) or not isinstance(index, int):
        return
    scale = _scale(evidence)
    places: dict[str, list[tuple[float | None, int]]] = {}
    for call in calls[:CALLS_LIMIT]:
        if isinstance(call, dict) and isinstance(call.get("place"), str):
            factor, used = _number(call.get("factor")), call.get("used", 0)
            rows = used if isinstance(used, int) else 0
            places.setdefault(call["place"][:1024], []).append((None if factor is None else factor / scale, rows))
    for place, lines in places.items():
        first = lines[0][0]
        same = first is not None and all(f is not None and _close(first, f) for f, _ in lines)
        used_ = min(rows for _, rows in lines), max(rows for _, rows in lines)
        yield place, Observation(index, first if same else None, used_, len(lines), evidence)


def _scale(evidence: Evidence) -> float:
    gradients = evidence.body.get("gradients")
    scale = _number(gradients.get("scale")) if isinstance(gradients, dict) else None
    return scale if scale is not None and scale > 0 else 1.0


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e30:
        return None
    return float(value) if math.isfinite(value) else None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))
