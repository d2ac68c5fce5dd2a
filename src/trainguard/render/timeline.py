"""A story in the terminal: facts, timeline, curves as sparklines, cost."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainguard.render import readings, words
from trainguard.render.line import plain
from trainguard.render.story import Curve, Event, Point, Story
from trainguard.render.terminal import commands, heading, headline, links_table, moment

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40

TONES: dict[str, tuple[str, str, str]] = {
    "plain": ("•", "*", ""),
    "good": ("✓", "+", "green"),
    "bad": ("✗", "x", "bold red"),
    "warn": ("!", "!", "yellow"),
    "quiet": ("·", ".", "dim"),
}
"""tone → (sign, the same without Unicode, style)."""


def story_view(story: Story, *, ascii_only: bool = False) -> RenderableType:
    """One run: verdict, facts, what happened when, how fast, what it cost."""
    parts: list[RenderableType] = [headline(story.verdict), Text(), facts_table(story), Text()]
    parts += [heading("Timeline"), timeline_table(story, ascii_only=ascii_only), Text()]
    drawn = story.drawn_curves()
    if drawn:
        of = "process" if story.curve("step_time") is None else f"process {drawn[0].process}"
        parts += [heading("Curves", f"{of}, each column a stretch of steps"), curves_table(drawn, ascii_only), Text()]
    if story.verdict.links:
        parts += [heading("Links"), links_table(story.verdict.links, ascii_only=ascii_only), Text()]
    run = shlex.quote(story.run)
    steps = [
        (f"trainguard verdict {run}", "findings in full, with their reasons"),
        (f"trainguard show {run} --html report.html", "this as a page, to read and to hand on"),
    ]
    parts += [heading("Next"), commands(steps)]
    return Group(*parts)


def facts(story: Story) -> list[tuple[str, str]]:
    """What, when, where, how it ended, what it rests on and what it cost; shared with the HTML report."""
    lines = [("command", shlex.join(story.command) or "not recorded")]
    lasted = f", lasted {words.duration(story.wall_ns)}" if story.wall_ns is not None else ""
    lines.append(("began", f"{moment(story.began)} UTC{lasted}; {ending(story)}"))
    where = [story.host or "host not recorded", story.account or "", f"kernel {story.kernel}" if story.kernel else ""]
    lines.append(("where", ", ".join(part for part in where if part)))
    lines.append(("processes", processes_sentence(story)))
    lines.append(("record", record_sentence(story)))
    lines.append(("guard", cost_sentence(story)))
    return lines


def facts_table(story: Story) -> Table:
    """`facts`, one a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for name, value in facts(story):
        table.add_row(name, value)
    return table


def ending(story: Story) -> str:
    """How the command ended, as far as the record tells."""
    if story.signal is not None:
        return f"ended by {story.signal}"
    if story.status is not None:
        return f"ended with status {story.status}"
    return "still running" if story.state == "running" else "the record has no end"


def processes_sentence(story: Story) -> str:
    """How many processes reported and on how many ranks steps were seen."""
    count = len(story.processes) + story.processes_more
    stepping = [process for process in story.processes if process.steps]
    if not stepping:
        return f"{words.plural(count, 'guarded process')}, none stepped an optimizer"
    ranks = {process.rank for process in stepping if process.rank is not None}
    on = f" on {len(ranks)} ranks" if len(ranks) > 1 else ""
    return f"{words.plural(count, 'guarded process')}, {len(stepping)} of them stepped{on}"


def record_sentence(story: Story) -> str:
    """Size of the record and where it stands in the log."""
    record = story.record
    if record.run_leaf is None:
        return "the log holds nothing of this run"
    size = f"{words.plural(record.records, 'record')}, {words.size(record.bytes)}"
    segments = words.plural(record.segments, "segment")
    leaves = f"leaves {record.run_leaf} to {record.last_leaf}" if record.last_leaf is not None else "no leaf yet"
    text = f"{size} in {segments}; {leaves} of {plain(record.origin)}, tree size {record.tree_size}"
    if record.unsealed_bytes:
        text += f"; {words.size(record.unsealed_bytes)} after the last seal are not proved and not told here"
    return text


def cost_sentence(story: Story) -> str:
    """The guard's own time in the training processes, in all, a step, and as a share of the steps' time."""
    if not story.steps:
        return "no step was timed"
    share = f", {story.own_ns / story.step_ns:.2%} of their time" if story.step_ns else ""
    return f"own time {words.duration(story.own_ns)} in {words.plural(story.steps, 'step')}{share}; " + (
        f"{words.duration(story.own_ns / story.steps)} a step"
    )


def timeline_table(story: Story, *, ascii_only: bool = False) -> Table:
    """One line an event: time since the beginning, sign, what happened, and beneath it what it was about."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True, style="dim", width=10)
    table.add_column(width=1)
    table.add_column(ratio=1, overflow="fold")
    for event in story.events:
        sign, ascii_sign, style = TONES[event.tone]
        text = Text(event_title(event), style=style)
        if event.detail:
            text.append("\n" + event.detail, style="dim")
        table.add_row(since(story, event), Text(ascii_sign if ascii_only else sign, style=style), text)
    if story.record.broken is not None:
        text = Text(f"from here on the record is not what was sealed: {plain(story.record.broken)}", style="bold red")
        table.add_row("", Text("x" if ascii_only else "✗", style="bold red"), text)
    return table


def event_title(event: Event) -> str:
    """The event with its step and rank, where they apply and are not said already."""
    place = [f"step {event.step}" if event.step is not None and event.kind != "quiet" else ""]
    place.append(f"rank {event.rank}" if event.rank is not None and event.kind == "finding" else "")
    shown = ", ".join(part for part in place if part)
    return f"{event.title} ({shown})" if shown else event.title


def since(story: Story, event: Event) -> str:
    """Time since the first record: `+12.3 s`, `+1:20`, `+2:05:10`; nothing for what concerns the whole run."""
    if event.at is None or story.began is None:
        return ""
    elapsed = max(0, event.at - story.began)
    if elapsed < 60e9:
        return f"+{words.duration(elapsed)}" if elapsed else "+0 s"
    minutes, seconds = divmod(round(elapsed / 1e9), 60)
    return f"+{minutes}:{seconds:02}" if minutes < 60 else f"+{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def curves_table(curves: Iterable[Curve], ascii_only: bool = False) -> Table:
    """Each curve as a sparkline with its lowest, mean and highest value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    for _ in range(3):
        table.add_column(no_wrap=True)
    for curve in curves:
        low, mean, high = (readings.shown(curve.name, value) for value in (curve.low, curve.mean, curve.high))
        drawn = sparkline(curve.points, ascii_only=ascii_only)
        table.add_row("", readings.title(curve.name), Text(drawn, style="cyan"), f"{low} to {high}, mean {mean}")
    return table


def sparkline(points: Iterable[Point], *, width: int = SPARK_WIDTH, ascii_only: bool = False) -> str:
    """The highest value of each stretch as a bar of one character; a flat curve is a low line."""
    bars = ".:-=+*#%" if ascii_only else BARS
    listed = list(points)
    if not listed:
        return ""
    columns = min(width, len(listed))
    tops = [
        max(point.high for point in listed[index * len(listed) // columns : (index + 1) * len(listed) // columns])
        for index in range(columns)
    ]
    low, high = min(tops), max(tops)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((top - low) * scale)] for top in tops)
