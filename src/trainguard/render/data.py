"""Sources of data and what was used of them, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainguard.render.line import plain
from trainguard.render.words import plural
from trainguard.sources.answer import Answer, Used
from trainguard.sources.register import Added, Entry, Source

SHOWN = 20
WORDS = {"not_used": "NOT USED", "used": "USED", "cannot_tell": "CANNOT TELL"}


def added_lines(added: Added) -> Iterator[str]:
    """What was registered, and what to know about it."""
    entry = added.entry
    yield f"{plain(entry.source)}: {plain(_shard(entry))} (leaf {entry.leaf})"
    yield from (f"  note: {plain(note)}" for note in added.notes[:SHOWN])


def list_lines(sources: Sequence[Source], problems: Sequence[str]) -> Iterator[str]:
    """Every source with its shards."""
    for source in sources:
        gone = source.withdrawn
        state = f"WITHDRAWN {gone.when}: {gone.reason}" if gone is not None else "in use"
        yield plain(f"{source.name}  {state}")
        yield from (f"  {plain(_shard(entry))}" for entry in source.added)
    if not sources:
        yield "no source is registered: trainguard data add SOURCE PATH --licence L --use U"
    yield from (f"cannot be read: {plain(problem)}" for problem in problems[:SHOWN])


def answer_lines(answer: Answer) -> Iterator[str]:
    """The word first, then what it rests on."""
    since = f" after its withdrawal on {answer.withdrawn}" if answer.scope == "after withdrawal" else ""
    step = f" up to step {answer.step}" if answer.step is not None else ""
    yield f"{WORDS[answer.answer]}: source {plain(answer.source)} by run {answer.run}{step}{since}"
    if answer.after_withdrawal is not None and answer.scope == "ever":
        yield f"  after its withdrawal on {answer.withdrawn}: {WORDS[answer.after_withdrawal].lower()}"
    yield from (f"  {line}" for used in answer.used[:SHOWN] for line in _used(used))
    if len(answer.used) > SHOWN:
        yield f"  and {len(answer.used) - SHOWN} more (--json has them)"
    yield from _group("opened, and not used:", answer.excluded)
    title = "cannot be told:" if answer.answer != "used" else "besides, this cannot be told:"
    yield from _group(title, answer.reasons)
    yield from _group("takes for granted:", answer.assumes)
    others = [model for model in answer.earlier if model.key != answer.subject]
    if others:
        yield "  models that used it, or were made from one that did:"
        told = [f"{model.label}{'' if model.by == 'read' else ' (through what it was made from)'}" for model in others]
        yield from (f"    - {plain(line)}" for line in told[:SHOWN])
    yield f"  rests on {plural(len(answer.evidence), 'row')} of the log under its head of {answer.head_size} entries"


def _used(used: Used) -> Iterator[str]:
    steps = f"steps {used.steps[0]} to {used.steps[1]}" if used.steps is not None else "steps not known"
    head = f"run {used.run} read {plain(used.path)} (shard {plain(used.shard)}, sha256 {used.sha256[:16]}…)"
    if used.basis == "opened":
        yield f"{head}: {steps} at most; which rows is not known: {plain(used.why or '')}"
        return
    rows = f"{used.rows_total} different rows" if used.rows_total is not None else "more rows than are counted"
    yield f"{head}: {steps}, {_batches(used.batches)}, {plural(used.samples, 'sample')}, {rows}"
    shown = ", ".join(f"{first}" if end == first + 1 else f"{first}-{end - 1}" for first, end in used.rows[:12])
    if shown:
        yield f"  rows {shown}{', …' if len(used.rows) > 12 else ''}"


def _batches(number: int) -> str:
    return "1 batch" if number == 1 else f"{number:,} batches"


def _group(title: str, lines: Sequence[str]) -> Iterator[str]:
    if not lines:
        return
    yield f"  {title}"
    yield from (f"    - {plain(line, 600)}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"    and {len(lines) - SHOWN} more (--json has them)"


def _shard(entry: Entry) -> str:
    rows = f", rows {entry.rows[0]} to {entry.rows[1] - 1}" if entry.rows is not None else ""
    terms = f", {entry.terms}" if entry.terms else ""
    size = f"{plural(entry.files, 'file')}, {entry.bytes:,} bytes{rows}"
    return f"{entry.shard} ({size}); licence {entry.licence}{terms}; use: {entry.use}"
