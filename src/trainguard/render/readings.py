"""The few numbers of a step frame that are drawn as curves. Everything else of a frame is for the judges.

Values come from the training process: whatever is not a finite number in its range is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainguard.render.line import plain
from trainguard.render.words import duration

UNITS: dict[str, str] = {
    "step_time": "ns",
    "own_time": "ns",
    "learning_rate": "",
    "gradient_norm": "",
    "loss": "",
}
"""curve → unit; the order is the order of the plots."""

CLAIMED: dict[str, str] = {
    "loss": "loss",
    "train_loss": "loss",
    "train/loss": "loss",
    "learning_rate": "learning rate as logged",
}
"""Metric as frameworks call it → curve."""


class Reader:
    """Takes the step frames of one process in order. Rates are sent only when they change, so the last is kept.

    Where a process has several optimizers or parameter groups, the curve is that of the first group of the first.
    """

    def __init__(self) -> None:
        self._rate: float | None = None

    def of_step(self, body: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """(curve, value) for each reading in the body of a `step` record."""
        first = body.get("opt", 0) == 0
        if first:
            self._rate = _rate(body.get("hyperparameters"), self._rate)
        gradients = body.get("gradients")
        norm = gradients.get("norm") if first and isinstance(gradients, dict) else None
        candidates = (
            ("step_time", body.get("wall_ns") or None),  # 0 at the first step: nothing came before it
            ("own_time", body.get("own_ns")),
            ("learning_rate", self._rate if first else None),
            ("gradient_norm", norm),
        )
        for name, value in candidates:
            number = finite(value)
            if number is not None:
                yield name, number


def of_metrics(body: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(curve, value) for each number in the body of a `metric` record: what the job itself said it measured."""
    values = body.get("values")
    for name, value in values.items() if isinstance(values, dict) else ():
        number = finite(value)
        if number is not None and isinstance(name, str):
            yield CLAIMED.get(name, plain(name, 60)), number


def ordered(names: Iterable[str]) -> list[str]:
    """Curves in the order they are drawn: our own readings first, then the job's metrics by name."""
    given = set(names)
    return [name for name in UNITS if name in given] + sorted(given - UNITS.keys())


def title(name: str) -> str:
    """What a curve is called on a page."""
    return TITLES.get(name, name)


def _rate(link: object, before: float | None) -> float | None:
    """The learning rate of the first group after a frame's `hyperparameters` value."""
    if not isinstance(link, dict):
        return before
    groups, changed = link.get("groups"), link.get("changed")
    if isinstance(groups, list) and groups and isinstance(groups[0], dict):
        return finite(groups[0].get("lr"))
    if isinstance(changed, list):
        for entry in changed:
            if isinstance(entry, list) and len(entry) == 3 and entry[:2] == [0, "lr"]:
                return finite(entry[2])
    return before


def finite(value: object) -> float | None:
    """`value` as a float if it is a finite number of a plain size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) < 1e30 else None


TITLES: dict[str, str] = {
    "step_time": "step time",
    "own_time": "guard's own time",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm as used",
    "loss": "loss",
}


def shown(name: str, value: float) -> str:
    """A reading with its unit, three significant digits."""
    if UNITS.get(name) == "ns":
        return duration(value)
    return f"{value:.3g}"
