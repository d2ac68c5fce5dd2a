"""What `trainguard doctor` shows: one line a question, with the remedy below it where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainguard.render.line import plain
from trainguard.render.terminal import GLYPHS, glyph


class Answer(Protocol):
    """What is shown of a reading; `measure.machine.Reading` is one, and render does not import measure."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def found(self) -> str: ...
    @property
    def remedy(self) -> str | None: ...


class Varied(Protocol):
    """What is shown of a variation of replay.tolerance."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def changes(self) -> bool: ...
    @property
    def weights(self) -> Mapping[str, Mapping[str, float]]: ...


class Measured(Protocol):
    """What is shown of a calibration."""

    @property
    def steps(self) -> Sequence[int]: ...
    @property
    def variations(self) -> Sequence[Varied]: ...


def checkup_view(readings: Sequence[Answer], *, ascii_only: bool = False) -> RenderableType:
    """A line for each reading, then the sum."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=2, justify="right")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for reading in readings:
        text = Text(plain(reading.found))
        if reading.remedy and reading.state != "ok":
            text.append(f"\nremedy: {plain(reading.remedy)}", style="dim")
        state = Text(reading.state, style=GLYPHS[reading.state][2])
        table.add_row(glyph(reading.state, ascii_only=ascii_only), reading.name, state, text)
    return Group(table, Text(), Text(conclusion([reading.state for reading in readings]), style="bold"))


def numerics_view(calibration: Measured, path: str) -> RenderableType:
    """A line for each variation: by how much weights and gradients differ, and where it is kept."""
    table = Table.grid(padding=(0, 2))
    for _ in range(2 + len(calibration.steps)):
        table.add_column()
    table.add_row("variation", "kind", *(f"{steps} steps" for steps in calibration.steps), style="bold")
    for each in calibration.variations:
        told = [_readings(each.weights, steps) if each.changes else "no bit" for steps in calibration.steps]
        table.add_row(plain(each.name), each.kind, *told)
    about = (
        "Shares of their own movement by which weights differ, float32 / bfloat16. A replay on another build is "
        "held to these, with a margin."
    )
    return Group(table, Text(), Text(about), Text(f"kept, signed, in {plain(path)}", style="dim"))


def _readings(weights: Mapping[str, Mapping[str, float]], steps: int) -> str:
    full = max((told.get(str(steps), 0.0) for name, told in weights.items() if name != "mixed"), default=0.0)
    mixed = weights.get("mixed", {}).get(str(steps))
    return f"{full:.1e}" + (f" / {mixed:.1e}" if mixed is not None else "")


def conclusion(states: Sequence[str]) -> str:
    """One sentence on all of them."""
    if "fail" in states:
        return f"{states.count('fail')} must be put right before a verdict from this machine means anything."
    if "unknown" in states:
        return f"{states.count('unknown')} could not be told."
    if "warn" in states:
        return f"Usable. {states.count('warn')} left open; verdicts hold, with less against an insider on this machine."
    return "This machine is set up well."
