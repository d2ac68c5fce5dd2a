"""A damage report as text: totals first, then the rows they are made of."""

from __future__ import annotations

from collections.abc import Iterator

from trainguard.incident.damage import Damage, Range, WhatIf
from trainguard.incident.losses import Kind
from trainguard.render.line import plain
from trainguard.render.words import plural

ROWS = 40
PARTS: dict[Kind, str] = {
    "tainted": "spoilt work",
    "descendant": "work on top of spoilt work",
    "suspect": "work that is in doubt",
    "redone": "work lost with a killed process",
    "idle": "waiting for a restart",
    "slowed": "slower than before",
}
"""What the hours of each kind are, in words."""


def damage_lines(report: Damage) -> Iterator[str]:
    """What was lost, from what, and what was said."""
    yield f"device-hours: {spread(report.hours)} over {plural(len(report.runs), 'affected run')}"
    if report.money is not None and report.price is not None:
        price = report.price
        yield f"money: {spread(report.money)} {price.currency} ({_basis(report)})"
    else:
        yield "money: not stated: no price was given (--prices FILE)"
    yield from (f"  {PARTS[kind]}: {spread(hours)} h" for kind, hours in report.parts.items())
    for row in report.rows[:ROWS]:
        rank = f" rank {row.rank}" if row.rank is not None else ""
        leaf = f" [leaf {row.leaf}]" if row.leaf is not None else ""
        yield f"  {row.kind:10} {row.run}{rank} steps {row.from_step} to {row.to_step}: {spread(row.hours)} h{leaf}"
        yield f"             {plain(row.why, 200)}"
    if len(report.rows) > ROWS:
        yield f"  and {len(report.rows) - ROWS} more rows (--json has all)"
    if report.unknown:
        yield f"not counted, because nobody could judge them: {', '.join(report.unknown[:10])}"
    if report.claims:
        yield "stated by people, not measured:"
        yield from (
            f"  {claim.date} {plain(claim.by)}: {plain(claim.what)}: {claim.amount:,.2f} {claim.currency}"
            for claim in report.claims
        )
    if report.outside:
        yield "said outside:"
        yield from (
            f"  {plain(each.text)}: {each.answer} (the log shows {spread(each.log_shows)}): {each.why}"
            for each in report.outside
        )


def what_if_lines(told: WhatIf) -> Iterator[str]:
    """The price of delay."""
    yield f"{told.devices:,} devices ({plain(told.price.device)}, {told.price.basis} of {told.price.date})"
    for name, value in (("minute", told.per_minute), ("hour", told.per_hour), ("day", told.per_day)):
        yield f"  per {name}: {spread(value)} {told.price.currency}"


def spread(value: Range) -> str:
    """`low 1.2, likely 3.4, high 5.6`, or one number where they agree."""
    if value.low == value.likely == value.high:
        return number(value.low)
    return f"low {number(value.low)}, likely {number(value.likely)}, high {number(value.high)}"


def number(value: float) -> str:
    """Three significant digits, or whole with separators from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _basis(report: Damage) -> str:
    price = report.price
    if price is None:
        return ""
    hour = f"{price.low}/{price.likely}/{price.high} {price.currency} an hour of {plain(price.device)}"
    return f"{hour}, {price.basis} of {price.date}" + (f", {plain(price.source, 100)}" if price.source else "")
