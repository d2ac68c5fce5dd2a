"""Geometry of the report's drawings: numbers in, SVG path data and labels out. The template does the drawing.

Every string made here consists of digits, signs and letters of our own, so nothing of a record reaches an attribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainguard.render import readings
from trainguard.render.story import Curve, Process, Story
from trainguard.render.words import duration, plural

WIDTH, HEIGHT = 520, 190
LEFT, RIGHT, TOP, BOTTOM = 76, 12, 12, 26
MARK_LIMIT = 60
LANE_LIMIT = 12
LANE_HEIGHT = 22
STRIP_WIDTH = 1000


@dataclass(frozen=True, slots=True)
class Tick:
    """A line of the grid with its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Plot:
    """One curve, ready to draw in a box of WIDTH x HEIGHT."""

    name: str
    title: str
    summary: str
    """The curve in one sentence, for those who do not see it."""
    band: str
    """Path of the range between lowest and highest value."""
    line: str
    """Path of the mean."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[float, ...]
    """Where findings stand, as x positions."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def plot(curve: Curve, marked_steps: Sequence[int] = ()) -> Plot:
    """`curve` as a drawing, with a mark at each of `marked_steps` that lies within it."""
    first, last = curve.points[0].first, curve.points[-1].last
    low, high = _padded(curve.low, curve.high)
    y_ticks = _nice_ticks(low, high)

    def x(step: float) -> float:
        return LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    middles = [((point.first + point.last) / 2, point) for point in curve.points]
    upper = [f"{x(step):.1f} {y(point.high):.1f}" for step, point in middles]
    lower = [f"{x(step):.1f} {y(point.low):.1f}" for step, point in reversed(middles)]
    mean = [f"{x(step):.1f} {y(point.mean):.1f}" for step, point in middles]
    if len(mean) == 1:
        mean.append(f"{x(last) + 2:.1f} {y(curve.points[0].mean):.1f}")
    shown = [readings.shown(curve.name, value) for value in (curve.low, curve.mean, curve.high)]
    return Plot(
        name=curve.name,
        title=readings.title(curve.name),
        summary=f"from {shown[0]} to {shown[2]}, mean {shown[1]}, over {plural(curve.count, 'step')}",
        band=f"M{' L'.join(upper + lower)} Z",
        line=f"M{' L'.join(mean)}",
        x_ticks=tuple(Tick(round(x(step), 1), f"{step:,}") for step in _step_ticks(first, last)),
        y_ticks=tuple(Tick(round(y(value), 1), readings.shown(curve.name, value)) for value in y_ticks),
        marks=tuple(round(x(step), 1) for step in sorted(set(marked_steps))[:MARK_LIMIT] if first <= step <= last),
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range to draw in: from zero where the values come near it, never empty."""
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    if high <= low:
        margin = abs(high) * 0.1 or 1.0
        return low - margin, high + margin
    return (low if low == 0.0 else low - 0.05 * (high - low)), high + 0.05 * (high - low)


def _nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """About `wanted` round values within the range."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [index * step for index in range(first, first + wanted + 3) if low <= index * step <= high]


def _step_ticks(first: int, last: int) -> list[int]:
    if last - first < 4:
        return sorted({first, last})
    return sorted({first, *(first + (last - first) * part // 4 for part in (1, 2, 3)), last})


# -- the strip: who was alive when, and where findings fall ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lane:
    """One process on the strip."""

    y: float
    x: float
    width: float
    label: str
    steps: int
    orderly: bool


@dataclass(frozen=True, slots=True)
class Flag:
    """One finding on the strip."""

    x: float
    tone: str


@dataclass(frozen=True, slots=True)
class Strip:
    """The run from its first record to its last, one lane a process."""

    lanes: tuple[Lane, ...]
    more: int
    flags: tuple[Flag, ...]
    ticks: tuple[Tick, ...]
    height: float
    summary: str
    width: int = STRIP_WIDTH
    left: int = LEFT
    right: int = STRIP_WIDTH - RIGHT


def strip(story: Story) -> Strip | None:
    """The strip, or None where the record has no extent in time."""
    if story.began is None or story.ended is None or story.ended <= story.began or not story.processes:
        return None
    began, span = story.began, story.ended - story.began

    def x(at: int) -> float:
        return round(LEFT + min(1.0, max(0.0, (at - began) / span)) * (STRIP_WIDTH - LEFT - RIGHT), 1)

    chosen = sorted(story.processes, key=lambda process: (not process.steps, process.number))[:LANE_LIMIT]
    chosen.sort(key=lambda process: process.number)
    lanes = tuple(_lane(process, index, x, story.ended) for index, process in enumerate(chosen))
    flags = tuple(
        Flag(x(event.at), event.tone) for event in story.events if event.kind == "finding" and event.at is not None
    )
    ticks = tuple(
        Tick(x(began + span * part // 4), f"+{duration(span * part / 4)}" if part else "0") for part in range(5)
    )
    return Strip(
        lanes=lanes,
        more=len(story.processes) + story.processes_more - len(lanes),
        flags=flags,
        ticks=ticks,
        height=24 + LANE_HEIGHT * len(lanes) + 26,
        summary=f"{plural(len(lanes), 'process')} over {duration(span)}, {plural(len(flags), 'finding')} on the way",
    )


def _lane(process: Process, index: int, x: Callable[[int], float], ended: int) -> Lane:
    left, right = x(process.began), x(process.ended if process.ended is not None else ended)
    label = f"rank {process.rank}" if process.rank is not None else f"process {process.number}"
    return Lane(
        y=24 + LANE_HEIGHT * index,
        x=left,
        width=max(2.0, round(right - left, 1)),
        label=label,
        steps=process.steps,
        orderly=process.said_bye is not False,
    )
