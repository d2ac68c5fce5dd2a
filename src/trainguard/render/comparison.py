"""Two runs side by side in the terminal: one sentence, what differs in causal order, what was not compared."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainguard.appraise.difference import LAYERS, Comparison, Difference
from trainguard.render.line import plain
from trainguard.render.terminal import bullets, heading
from trainguard.render.words import plural

SHOWN_PER_LAYER = 8


def comparison_view(comparison: Comparison) -> RenderableType:
    """See the module."""
    word = {True: "EQUAL", False: "DIFFERENT", None: "CANNOT TELL"}[comparison.equal]
    style = {True: "bold white on green4", False: "bold black on orange1", None: "bold white on grey37"}[
        comparison.equal
    ]
    first, second = (plain(run) for run in comparison.runs)
    parts: list[RenderableType] = [
        Text.assemble((f" {word} ", style), "  ", (first, "bold"), " and ", (second, "bold"), "  ")
        + Text(f"{plural(comparison.steps_compared, 'step')} compared", style="dim"),
        Text(comparison.sentence),
        Text(),
    ]
    for layer in LAYERS:
        listed = [difference for difference in comparison.differences if difference.layer == layer]
        if listed:
            mark = "likeliest" if layer == comparison.likeliest else ""
            parts += [
                heading(layer.capitalize(), mark),
                *(_difference(d, first, second) for d in listed[:SHOWN_PER_LAYER]),
            ]
            if len(listed) > SHOWN_PER_LAYER:
                parts.append(Text(f"   and {len(listed) - SHOWN_PER_LAYER} more: --json", style="dim"))
            parts.append(Text())
    if comparison.notes:
        parts += [heading("Not compared"), bullets(comparison.notes), Text()]
    return Group(*parts[:-1])


def _difference(difference: Difference, first: str, second: str) -> RenderableType:
    title = Text("· ")
    if difference.step is not None:
        title.append(f"step {difference.step}  ", style="cyan")
    title.append(plain(difference.what, 600))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, overflow="fold")
    table.add_row(first, plain(difference.first or "–", 300))
    table.add_row(second, plain(difference.second or "–", 300))
    return Padding(Group(title, Padding(table, (0, 0, 0, 2))), (0, 0, 0, 2))
