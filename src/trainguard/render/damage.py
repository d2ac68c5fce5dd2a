"""A damage report as text: totals first, then the rows they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainguard.incident.damage import Damage, Range, WhatIf
from trainguard.incident.losses import Kind, Row
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
    elif report.priced:
        devices = " and ".join(plain(device, 40) for device in report.priced)
        yield f"money: not stated: there are prices for {devices}: choose one with --device"
    else:
        yield "money: not stated: no price was given (--prices FILE)"
    yield from (f"  {PARTS[kind]}: {spread(hours)} h" for kind, hours in report.parts.items())
    groups = grouped(report.rows)
    for group in groups[:ROWS]:
        row, hours = group
        leaf = f" [entry {row.leaf}]" if row.leaf is not None else ""
        yield f"  {row.where}: {spread(hours)} h, {PARTS[row.kind]}{leaf}"
        yield f"      {plain(row.why, 200)}"
    if len(groups) > ROWS:
        yield f"  and {len(groups) - ROWS} more (--json has every row)"
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


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that differ in their rank alone."""

    kind: Kind
    where: str
    """`run r1, ranks 0 to 3, steps 1 to 11`."""
    why: str
    leaf: int | None


def grouped(rows: Sequence[Row]) -> list[tuple[Group, Range]]:
    """Rows of one run, kind, stretch and reason as one, with the sum of their hours; in the order they came."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row.run, row.kind, row.from_step, row.to_step, row.why, row.leaf), []).append(row)
    groups = []
    for members in found.values():
        first, hours = members[0], Range()
        for row in members:
            hours = hours.plus(row.hours)
        ranks = _ranks([row.rank for row in members if row.rank is not None])
        where = f"run {plain(first.run, 60)}{ranks}, steps {first.from_step} to {first.to_step}"
        groups.append((Group(first.kind, where, first.why, first.leaf), hours))
    return groups


def _ranks(ranks: Sequence[int]) -> str:
    known = sorted(set(ranks))
    if not known:
        return ""
    if len(known) == 1:
        return f", rank {known[0]}"
    if known == list(range(known[0], known[-1] + 1)):
        return f", ranks {known[0]} to {known[-1]}"
    return f", ranks {', '.join(map(str, known[:8]))}{' and more' if len(known) > 8 else ''}"


def what_if_lines(told: WhatIf) -> Iterator[str]:
    """The price of delay."""
    price = f"{plain(told.price.device)}, {told.price.basis} price of {told.price.date}"
    yield f"While nobody notices, {told.devices:,} devices cost ({price}):"
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
