"""Values in, rich renderables out: what people read in a terminal. Nothing here prints.

Texts are built as `Text`, never as markup, and pass `plain` first: a tensor called `[red]` or one with an escape
sequence in its name is shown, not obeyed.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainguard.appraise.verdict import Verdict, Word
from trainguard.finding import Citation, Finding, LinkState
from trainguard.render import words
from trainguard.render.line import plain
from trainguard.render.techniques import labelled

if TYPE_CHECKING:  # reading a verdict aloud needs no log reader
    from trainguard.render import listing

WIDTH_LIMIT = 110
"""Lines longer than this are hard to read, however wide the window is."""

SHOWN_PER_GROUP = 4
"""Findings of one check that are shown, the first in full; the rest is counted, and --json has all."""

WORD_STYLE: dict[Word, str] = {
    "VERIFIED": "bold white on green4",
    "TAINTED": "bold white on red3",
    "SUSPECT": "bold black on orange1",
    "UNKNOWN": "bold white on grey37",
}

GLYPHS: dict[str, tuple[str, str, str]] = {
    "held": ("✓", "+", "green"),
    "broken": ("✗", "x", "red"),
    "blind": ("◌", "?", "yellow"),
    "explained": ("≈", "~", "cyan"),
    "unused": ("–", "-", "dim"),
    "violated": ("✗", "x", "red"),
    "suspicious": ("!", "!", "yellow"),
    "not_checked": ("◌", "?", "yellow"),
    "ok": ("✓", "+", "green"),
    "warn": ("!", "!", "yellow"),
    "fail": ("✗", "x", "red"),
    "unknown": ("?", "?", "yellow"),
}
"""state → (glyph, the same for terminals without Unicode, colour)."""


def screen(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that honours NO_COLOR, has colour only on a terminal, and keeps lines readable.

    Where the output is no terminal and COLUMNS is unset, lines are 100 wide: they end up in files and tickets.
    """
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)
    natural = console.width if console.is_terminal or os.environ.get("COLUMNS") else 100
    console.width = min(width or natural, WIDTH_LIMIT)
    return console


def as_text(renderable: RenderableType, *, width: int = 100) -> str:
    """The renderable as plain text, without colour."""
    console = Console(width=width, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def unicode_able(console: Console) -> bool:
    """Whether the console's encoding can carry our glyphs."""
    return console.encoding.lower().startswith("utf")


def glyph(state: str, *, ascii_only: bool = False) -> Text:
    """The sign of a state in its colour. The state is also written out wherever a glyph stands: colour is not all."""
    sign, ascii_sign, colour = GLYPHS[state]
    return Text(ascii_sign if ascii_only else sign, style=colour)


# -- verdict ------------------------------------------------------------------------------------------------------


def verdict_view(verdict: Verdict, *, ascii_only: bool = False) -> RenderableType:
    """The whole verdict: headline, links, findings worst first, reasons, and what to run next."""
    parts: list[RenderableType] = [headline(verdict), Text()]
    if verdict.links:
        parts += [heading("Links"), links_table(verdict.links, ascii_only=ascii_only), Text()]
    parts.append(heading("Findings", words.counted(verdict.findings)))
    for group in words.grouped(verdict.findings):
        parts.append(finding_group(group, ascii_only=ascii_only))
    parts += [Text(), heading("Why"), bullets(verdict.reasons or ("no reason was recorded",)), Text()]
    parts += [heading("Next"), commands(words.next_steps(verdict))]
    return Group(*parts)


def headline(verdict: Verdict) -> RenderableType:
    """Word, run, level; what the word means; coverage; what the level stands on."""
    first = Text.assemble(
        (f" {verdict.verdict} ", WORD_STYLE[verdict.verdict]),
        "  ",
        (plain(verdict.run or "?"), "bold"),
        "  ",
        (verdict.level, "bold cyan"),
        "  ",
        words.coverage_sentence(verdict.coverage),
    )
    meaning = Text(words.MEANING[verdict.verdict])
    level = Text(f"{verdict.level}: {words.level_sentence(verdict.level)}.", style="dim")
    return Group(first, meaning, level)


def heading(title: str, note: str = "") -> Text:
    """A section's title, with a short note beside it."""
    return Text.assemble((title, "bold"), ("  " + note if note else "", "dim"))


def links_table(links: Iterable[LinkState], *, ascii_only: bool = False) -> Table:
    """One line a link: glyph, name, state, counts, and why where there is something to say."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=3, justify="right")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for link in links:
        state = words.link_word(link)
        notes = words.link_notes(link)
        more = f" (and {len(notes) - 2} more: trainguard explain)" if len(notes) > 2 else ""
        table.add_row(
            glyph(state, ascii_only=ascii_only),
            plain(link.link),
            Text(state, style=GLYPHS[state][2]),
            words.link_counts(link),
            Text("; ".join(notes[:2]) + more, style="dim"),
        )
    return table


def finding_group(group: words.Group, *, ascii_only: bool = False) -> RenderableType:
    """The first finding of a group in full, a line for the next ones, then how many more there are and where."""
    first, *others = words.distinct(group.findings)
    parts: list[RenderableType] = [finding_view(first, ascii_only=ascii_only)]
    shown = others[: SHOWN_PER_GROUP - 1]
    for finding in shown:
        place = "  ".join(subject_parts(finding))
        line = Text.assemble((place + "  " if place else "", "cyan"), plain(finding.message))
        parts.append(Padding(line, (0, 0, 0, 4)))
    rest = words.without(group, (first, *shown))
    if rest.findings:
        at = f", {rest.steps}" if rest.steps else ""
        parts.append(
            Text(f"    and {len(rest.findings):,} more of {group.check}{at}; all of them: --json", style="dim")
        )
    return Group(*parts)


def finding_view(finding: Finding, *, ascii_only: bool = False) -> RenderableType:
    """One finding: where, what, expected against found, what it would be called, and the leaf that proves it."""
    colour = GLYPHS[finding.outcome][2]
    title = Text.assemble(
        " ",
        glyph(finding.outcome, ascii_only=ascii_only),
        "  ",
        (words.OUTCOME_WORDS[finding.outcome], f"bold {colour}"),
        "  ",
        (plain(finding.check), "bold"),
    )
    for part in subject_parts(finding):
        title.append("  ")
        title.append(part, style="cyan")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, overflow="fold")
    if finding.expected is not None:
        table.add_row("expected", plain(finding.expected))
    if finding.found is not None:
        table.add_row("found", plain(finding.found))
    if finding.techniques:
        table.add_row("could be", " · ".join(labelled(plain(technique)) for technique in finding.techniques))
    if finding.evidence:
        table.add_row("evidence", cited(finding.evidence))
    body: list[RenderableType] = [Text(plain(finding.message, 1000))]
    if table.row_count:
        body.append(table)
    return Group(title, Padding(Group(*body), (0, 0, 0, 4)))


def subject_parts(finding: Finding) -> list[str]:
    """Step, rank, tensor and path of the subject, those that apply."""
    subject = finding.subject
    parts = [
        f"step {subject.step}" if subject.step is not None else "",
        f"rank {subject.rank}" if subject.rank is not None else "",
        plain(subject.tensor or ""),
        plain(subject.path or ""),
    ]
    return [part for part in parts if part]


def cited(evidence: Iterable[Citation]) -> str:
    """`leaf 812 (9f3a61c0…)`, at most three, then how many more."""
    listed = list(evidence)
    shown = ", ".join(f"leaf {citation.leaf} ({plain(citation.hash[:12])}…)" for citation in listed[:3])
    return shown + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def bullets(lines: Iterable[str]) -> RenderableType:
    """A list, one line an entry, wrapped with a hanging indent."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=3, justify="right")
    table.add_column(ratio=1)
    for line in lines:
        table.add_row("·", plain(line, 1000))
    return table


def commands(steps: Iterable[tuple[str, str]]) -> RenderableType:
    """Commands to copy, each with what it gives."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(ratio=1, style="dim")
    for command, why in steps:
        table.add_row("", command, why)
    return table


# -- list of runs -------------------------------------------------------------------------------------------------


def runs_view(rows: list[listing.Row]) -> RenderableType:
    """The list of runs as a table, newest first, and how to get what is not in it."""
    if not rows:
        return Text("No runs yet. Record one with: trainguard run -- python train.py")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False, expand=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("run", no_wrap=True, overflow="fold")
    table.add_column("began", no_wrap=True)
    table.add_column("record", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("command", ratio=1, no_wrap=True, overflow="ellipsis")
    for row in rows:
        word = Text(row.verdict, style=_plain_style(row.verdict)) if row.verdict else Text("-", style="dim")
        command = shlex.join(plain(part, 200) for part in row.command)
        steps = f"{row.steps:,}" if row.steps is not None else "-"
        table.add_row(word, plain(row.run), moment(row.began), row.state, steps, command)
    skipped = sum(row.verdict is None and row.state != "unrecorded" for row in rows)
    if not skipped:
        return table
    hint = f"{words.plural(skipped, 'run')} not judged, to keep this fast: trainguard runs --all judges every one"
    return Group(table, Text(hint, style="dim"))


def moment(nanoseconds: int | None) -> str:
    """UTC, to the second: `2026-11-22 15:45:01`; `-` where it is not known."""
    if nanoseconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(nanoseconds / 1e9))


def _plain_style(word: Word) -> str:
    return {"VERIFIED": "bold green", "TAINTED": "bold red", "SUSPECT": "bold yellow", "UNKNOWN": "bold"}[word]
