"""The answers of `gate`, `recover` and `lineage` as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainguard.incident.gate import Answer
from trainguard.incident.lineage import Family, Line
from trainguard.incident.recover import Candidate, Ends, Moved, Plan, shell
from trainguard.render.line import plain
from trainguard.render.terminal import heading
from trainguard.render.words import plural

LISTED = 40


def gate_lines(answer: Answer) -> Iterator[str]:
    """One line that says yes or no, then what it rests on, or every reason against."""
    need = f"{answer.required} at {answer.required_level}"
    if answer.passed:
        yield f"{plain(answer.model)}: may be used: {answer.verdict} at {answer.level} ({need} is required)"
    else:
        yield f"{plain(answer.model)}: NOT to be used: {answer.verdict} at {answer.level}, {need} is required"
        yield from (f"  - {plain(reason, 400)}" for reason in answer.reasons)
    if answer.run is not None:
        step = f", step {answer.step}" if answer.step is not None else ""
        yield f"  made by run {answer.run}{step}"
        yield from (f"  from what run {run} made" for run in answer.ancestors if run != answer.run)
    if answer.root is not None:
        yield f"  root digest {answer.root}"


def recover_lines(plan: Plan, moved: Sequence[Moved]) -> Iterator[str]:
    """Where to go on from, what to set aside, what to type."""
    bad = f" from step {plan.first_bad_step}" if plan.first_bad_step is not None else ""
    yield f"run {plan.run}: {plan.verdict}{bad}"
    if plan.reason:
        yield f"  {plain(plan.reason, 400)}"
    chosen = plan.checkpoint
    if chosen is None:
        yield "No checkpoint of this run can be gone on from:"
        yield from (f"  - {_candidate(c)}" for c in (*plan.passed_over, *plan.later))
        return
    yield f"Go on from: {plain(chosen.place)}"
    yield f"  step {chosen.step}, {chosen.word}, byte for byte what was sealed (leaf {chosen.leaf})"
    yield from (f"  passed over: {_candidate(c)}" for c in plan.passed_over)
    if moved:
        yield f"Set aside ({plural(len(moved), 'checkpoint')}, moved, not deleted):"
        yield from (f"  {plain(m.place)} -> {plain(m.to)}" for m in moved)
    elif plan.later:
        yield f"Made after it, to be set aside with --quarantine ({plural(len(plan.later), 'checkpoint')}):"
        yield from (f"  {_candidate(c)}" for c in plan.later)
    yield f"Resume ({plan.command_from}):"
    yield f"  trainguard run -- {shell(plan.command)}"
    yield "What sampled checks saw first may have begun some steps earlier; trainguard audit settles it by replay."


def _candidate(candidate: Candidate) -> str:
    step = f"step {candidate.step}, " if candidate.step is not None else ""
    why = f": {plain(candidate.why, 300)}" if candidate.why else ""
    return f"{plain(candidate.place)} ({step}{candidate.word}){why}"


def ends_lines(ends: Ends) -> Iterator[str]:
    """Whether two runs end in the same tensors."""
    pair = f"{plain(ends.resumed_checkpoint)} and {plain(ends.reference_checkpoint)}"
    if ends.equal:
        yield f"equal: {pair}: {plural(ends.tensors, 'tensor')}, bit for bit"
        return
    count = len(ends.differing) + ends.differing_more
    yield f"different: {pair}: {count} of {plural(ends.tensors, 'tensor')}"
    yield from (f"  {plain(name)}" for name in ends.differing[:LISTED])
    if count > LISTED:
        yield f"  and {count - LISTED} more"


def lineage_view(family: Family, *, ascii_only: bool = False) -> RenderableType:
    """Affected first, then what could not be told, then the cleared list."""
    parts: list[RenderableType] = []
    for title, note, lines in (
        ("Affected", "tainted or suspect, by itself or by what it was made from", family.affected),
        ("Not known", "not measured, or made from what was not", family.unknown),
        ("Not affected", "VERIFIED, with everything it was made from", family.cleared),
    ):
        parts += [heading(f"{title} ({len(lines)})", note), _table(lines, ascii_only), Text()]
    return Group(*parts[:-1])


def _table(lines: Sequence[Line], ascii_only: bool) -> Table:
    arrow = "<-" if ascii_only else "←"
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_column(no_wrap=True, width=8)
    table.add_column(ratio=1, overflow="fold")
    for line in lines[:LISTED]:
        text = Text(plain(line.label))
        if line.made_from:
            text.append(f" {arrow} " + ", ".join(plain(source) for source in line.made_from[:6]), style="dim")
        for reason in line.because:
            text.append("\n" + plain(reason, 300), style="dim")
        table.add_row("", line.word, text)
    if len(lines) > LISTED:
        table.add_row("", "", f"and {len(lines) - LISTED} more (--json has all)")
    if not lines:
        table.add_row("", "", Text("none", style="dim"))
    return table
