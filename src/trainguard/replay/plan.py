"""Which segments of a run are replayed: drawn after its end from what nobody could know before, riskiest first.

A segment is the stretch from one sealed state to the next: the start of the run to the first point, point to point,
last point to the end. The nonce is a digest over the run, the log's signed tree head as it stood when the run's last
record was in it, and a random number of the auditor's, drawn now; it is written into the audit's statement, so anyone
can draw the same segments again. With m bad of N segments and n drawn, the chance to find one is
1 - C(N-m, n) / C(N, n).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from trainguard.appraise.replay import detection
from trainguard.replay.committed import Committed


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Steps first … last, replayed from the state after step first - 1."""

    number: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        """How many."""
        return self.last - self.first + 1


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit is going to replay, and why."""

    nonce: str
    """64 hex digits."""
    segments: tuple[Segment, ...]
    """All segments of the run."""
    chosen: tuple[int, ...]
    """Numbers of the ones to replay, in this order."""
    risky: tuple[int, ...]
    """Of these, the ones chosen for a reason and not by lot."""


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """One segment of a run that was followed, decided on while the run went on (follow.py)."""

    segment: int
    first: int
    last: int
    size: int
    """Of the first tree head seen that held every rank's sealed state after step `last`."""
    root: str
    """Of that head, hex."""
    why: str
    """`first`, `lot` or `unusual` where it is replayed; empty where it is not."""


def segments(run: Committed, *, longest: int | None = None) -> tuple[Segment, ...]:
    """The segments of a run. longest: leave out points so that none gets shorter than needed; None takes all."""
    ends = [point.step for point in run.points if 0 < point.step < run.last]
    starts = [0, *ends]
    stops = [*ends, run.last]
    return tuple(
        Segment(number=number, first=start + 1, last=stop)
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )


def make_nonce(run: str, root: str, size: int, drawn: str) -> str:
    """The nonce. root, size: of the signed tree head; drawn: the auditor's own random number, hex."""
    text = f"trainguard/audit/v1\n{run}\n{size}\n{root}\n{drawn}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def lot(nonce: str, number: int) -> float:
    """Where segment `number` falls by this nonce, 0 to 1."""
    return int.from_bytes(hashlib.sha256(f"{nonce}/{number}".encode()).digest()[:8], "big") / 2.0**64


def draw(
    run: Committed,
    nonce: str,
    *,
    budget: float,
    confidence: float | None = None,
    tampered: float = 0.05,
    only: Sequence[int] | None = None,
) -> Plan:
    """The plan. budget: share of the run's steps that may be replayed (0 to 1). confidence: chance to find tampering
    of a share `tampered` of the segments; it replaces the budget. only: exactly these segments, nothing by lot."""
    everything = segments(run)
    risky = _risky(run, everything)
    if only is not None:
        return Plan(nonce=nonce, segments=everything, chosen=tuple(only), risky=tuple(only))
    order = sorted(range(len(everything)), key=lambda n: hashlib.sha256(f"{nonce}/{n}".encode()).digest())
    order = [*risky, *(number for number in order if number not in risky)]
    if confidence is not None:
        count = max(len(risky), needed(len(everything), tampered, confidence))
        chosen = order[:count]
    else:
        chosen = _within(order, everything, budget * run.last, least=1)
    return Plan(nonce=nonce, segments=everything, chosen=tuple(chosen), risky=tuple(n for n in chosen if n in risky))


def neighbours(plan: Plan) -> list[list[Segment]]:
    """The chosen segments, those that follow one another together: one process replays each group."""
    groups: list[list[Segment]] = []
    for number in sorted(plan.chosen):
        if groups and groups[-1][-1].number == number - 1:
            groups[-1].append(plan.segments[number])
        else:
            groups.append([plan.segments[number]])
    return groups


def _risky(run: Committed, everything: Sequence[Segment]) -> tuple[int, ...]:
    """The first segment, and those with something unusual in the record."""
    return tuple(dict.fromkeys((0, *unusual(run, everything))))


def unusual(run: Committed, everything: Sequence[Segment]) -> tuple[int, ...]:
    """Segments with a step at which the record itself has something unusual."""
    return tuple(s.number for s in everything if any(s.first <= step <= s.last for step in run.alarms))


def _within(order: Sequence[int], everything: Sequence[Segment], steps: float, *, least: int) -> list[int]:
    chosen: list[int] = []
    spent = 0
    for number in order:
        cost = everything[number].steps
        if len(chosen) >= least and spent + cost > steps:
            continue
        chosen.append(number)
        spent += cost
    return chosen


def needed(total: int, tampered: float, confidence: float) -> int:
    """Fewest segments that give this chance."""
    return next((n for n in range(1, total + 1) if detection(total, n, tampered) >= confidence), total)
