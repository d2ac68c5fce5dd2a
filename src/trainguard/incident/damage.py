"""What it cost: device-hours and money as low, likely and high, every figure with the rows it comes from.

    report = assess(home, prices=read_prices(Path("prices.toml")))
    report.hours.likely, report.rows, report.money

Rows come from the log alone: which run was bad from which step, how long each rank went on after that, what descended
from it. People's time and invoices are claims with an author, listed apart and never mixed into what was measured.
Statements from outside ("8,000 GPUs") are set beside the largest number the log shows.

    low      from the first violated finding to the last, and the time that proved kills and sleeps took
    likely   from the first violated finding to the end of the run, all of every run made from it, and the time that
             kills and sleeps by a named sender or line took
    high     all of every tainted run, suspect runs included

What each row counts stands in `losses`.
"""

from __future__ import annotations

import datetime
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from trainguard.archive import LogLeaves
from trainguard.errors import Misuse, Unavailable
from trainguard.home import Home
from trainguard.incident.lineage import Lineage, read_lineage, run_key
from trainguard.incident.losses import Kind, Range, Row, held, rows_of

__all__ = [
    "Claim",
    "Damage",
    "Outside",
    "Price",
    "Prices",
    "Range",
    "Row",
    "assess",
    "choose_price",
    "read_prices",
    "what_if",
]

SCHEMA = "trainguard/damage/v1"
CURRENCY = re.compile(r"[A-Z]{3}")
LIMIT_BYTES = 1 << 20

Answer = Literal["supported", "not supported", "unknown"]


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an hour of one device costs, and how that is known."""

    device: str
    currency: str
    low: float
    likely: float
    high: float
    basis: Literal["internal transfer", "contract", "list", "posted median"]
    date: str
    """Day the price is of, YYYY-MM-DD."""
    source: str = ""

    @property
    def range(self) -> Range:
        return Range(low=self.low, likely=self.likely, high=self.high)


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cost that somebody states: people's time, an invoice. Not measured."""

    by: str
    """Role of who states it."""
    what: str
    currency: str
    amount: float
    date: str


class Outside(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A statement from outside."""

    text: str
    quantity: Literal["devices", "device-hours", "money", "runs"]
    value: float
    currency: str = ""


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prices file (TOML): tables `price`, `claim` and `outside`."""

    price: tuple[Price, ...] = ()
    claim: tuple[Claim, ...] = ()
    outside: tuple[Outside, ...] = ()


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """An outside statement and what the log shows."""

    text: str
    stated: float
    log_shows: Range
    answer: Answer
    why: str


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """See the module."""

    schema: str = SCHEMA
    hours: Range
    parts: dict[Kind, Range] = {}
    """The same hours by what they were lost to."""
    rows: tuple[Row, ...]
    devices: int
    """Most ranks that stepped at once in one affected run."""
    runs: tuple[str, ...]
    money: Range | None = None
    price: Price | None = None
    priced: tuple[str, ...] = ()
    """Devices that there are prices for, where none was chosen."""
    claims: tuple[Claim, ...] = ()
    outside: tuple[Beside, ...] = ()
    unknown: tuple[str, ...] = ()
    """Runs whose time is in none of the figures because nobody could tell whether they were affected."""


NO_PRICES = Prices()


def read_prices(path: Path) -> Prices:
    """The prices in `path`. Raises Unavailable or Misuse, naming the field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unavailable(f"{path}: prices cannot be read: {error.strerror}") from error
    if len(data) > LIMIT_BYTES:
        raise Misuse(f"{path}: expected prices of at most {LIMIT_BYTES} bytes, found {len(data)}")
    try:
        prices = msgspec.convert(tomllib.loads(data.decode()), Prices)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise Misuse(f"{path}: not a prices file: {error}", next_step="docs/recover.md has an example") from None
    wrong = next(_wrong(prices), None)
    if wrong is not None:
        raise Misuse(f"{path}: {wrong}")
    return prices


def _wrong(prices: Prices) -> Iterator[str]:
    """What cannot be meant in a prices file, each with its place."""
    for price in prices.price:
        where = f"price of {price.device[:60]}"
        if not 0 <= price.low <= price.likely <= price.high or math.isinf(price.high):
            yield f"{where}: expected 0 <= low <= likely <= high, all finite"
        yield from _wrong_words(where, price.currency, price.date)
    devices = [price.device for price in prices.price]
    yield from (
        f"two prices for {device[:60]}: leave the one that counts" for device in devices if devices.count(device) > 1
    )
    for claim in prices.claim:
        if not claim.by.strip():
            yield "claim: expected who states it, found nobody"
        if not 0 <= claim.amount < math.inf:
            yield f"claim of {claim.by[:60]}: expected an amount of 0 or more, found {claim.amount}"
        yield from _wrong_words(f"claim of {claim.by[:60]}", claim.currency, claim.date)
    for said in prices.outside:
        if not 0 <= said.value < math.inf:
            yield f"{said.text[:60]}: expected a value of 0 or more, found {said.value}"
        if said.quantity == "money" and CURRENCY.fullmatch(said.currency) is None:
            yield f"{said.text[:60]}: expected a currency as three letters, found {said.currency[:20]!r}"


def _wrong_words(where: str, currency: str, date: str) -> Iterator[str]:
    if CURRENCY.fullmatch(currency) is None:
        yield f"{where}: expected a currency as three letters, found {currency[:20]!r}"
    try:
        day = datetime.date.fromisoformat(date)
    except ValueError:
        day = None
    if day is None or day.isoformat() != date:
        yield f"{where}: expected a day as YYYY-MM-DD, found {date[:20]!r}"


def choose_price(prices: Prices, device: str | None) -> Price | None:
    """The price of `device`, or the only one there is. Raises Misuse for a device without a price."""
    if device is None:
        return prices.price[0] if len(prices.price) == 1 else None
    for price in prices.price:
        if price.device == device:
            return price
    known = ", ".join(price.device for price in prices.price) or "none"
    raise Misuse(f"device {device!r}: no price for it; there are prices for: {known}")


def assess(
    home: Home,
    *,
    prices: Prices = NO_PRICES,
    device: str | None = None,
    runs: Sequence[str] | None = None,
    lineage: Lineage | None = None,
) -> Damage:
    """The damage over all runs of the log, or over `runs` and what was made from them.

    lineage: where the caller has read it already. Raises as `read_lineage` does.
    """
    lineage = lineage if lineage is not None else read_lineage(home)
    leaves = LogLeaves(home)
    rows: list[Row] = []
    unknown: list[str] = []
    most = _Most()
    for run in _chosen(lineage, runs):
        found = list(rows_of(home, leaves, lineage, run))
        rows.extend(found)
        if lineage.standing_of(run_key(run)).word == "UNKNOWN":
            unknown.append(run)
            most.add(*held(home, leaves, run))
    hours = total(rows)
    affected = tuple(dict.fromkeys(row.run for row in rows))
    devices = max((_devices(row for row in rows if row.run == run) for run in affected), default=0)
    price = choose_price(prices, device)
    money = hours.times(price.range) if price is not None else None
    shown = {"devices": Range(low=devices, likely=devices, high=devices), "device-hours": hours}
    shown["runs"] = Range(low=len(affected), likely=len(affected), high=len(affected))
    return Damage(
        hours=hours,
        parts=by_kind(rows),
        rows=tuple(rows),
        devices=devices,
        runs=affected,
        money=money,
        price=price,
        priced=tuple(each.device for each in prices.price) if price is None else (),
        claims=prices.claim,
        outside=tuple(_beside(each, shown, money, price, most) for each in prices.outside),
        unknown=tuple(unknown),
    )


def _chosen(lineage: Lineage, runs: Sequence[str] | None) -> Iterator[str]:
    if runs is None:
        yield from lineage.verdicts
        return
    wanted = dict.fromkeys(runs)
    for run in runs:
        for key in lineage.graph.descendants(f"start:{run}"):
            node = lineage.graph.nodes.get(key)
            if node is not None and node.run is not None:
                wanted.setdefault(node.run)
    yield from (run for run in lineage.verdicts if run in wanted)


@dataclass(slots=True)
class _Most:
    """What the runs that nobody could judge would add, were all of them affected."""

    devices: int = 0
    hours: float = 0.0
    runs: int = 0

    def add(self, devices: int, hours: float) -> None:
        self.devices = max(self.devices, devices)
        self.hours += hours
        self.runs += 1

    def with_them(self, quantity: str, shown: float, price: Price | None) -> float:
        """The largest figure that this log allows at all."""
        if quantity == "devices":
            return max(shown, self.devices)
        more = {"device-hours": self.hours, "runs": self.runs, "money": self.hours * (price.high if price else 0.0)}
        return shown + more[quantity]


def _beside(said: Outside, shown: dict[str, Range], money: Range | None, price: Price | None, most: _Most) -> Beside:
    if said.quantity == "money":
        if money is None or price is None or price.currency != said.currency:
            return _answered(said, Range(), "unknown", "no price in that currency was given")
        log_shows = money
    else:
        log_shows = shown[said.quantity]
    if log_shows.low <= said.value <= log_shows.high:
        return _answered(said, log_shows, "supported", "within what the log shows")
    if said.value < log_shows.low:
        return _answered(said, log_shows, "not supported", "the log shows more")
    if not most.runs:
        return _answered(said, log_shows, "not supported", "the log shows less, and no run in it is left out")
    limit = most.with_them(said.quantity, log_shows.high, price)
    if said.value > limit:
        why = f"the log allows {limit:,.4g} at most, counting every run that nobody could judge as affected"
        return _answered(said, log_shows, "not supported", why)
    return _answered(said, log_shows, "unknown", "the log shows less, but runs that nobody could judge are left out")


def _answered(said: Outside, log_shows: Range, answer: Answer, why: str) -> Beside:
    return Beside(text=said.text, stated=said.value, log_shows=log_shows, answer=answer, why=why)


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """What a fleet loses while nobody notices."""

    devices: int
    per_minute: Range
    per_hour: Range
    per_day: Range
    price: Price


def what_if(devices: int, price: Price) -> WhatIf:
    """Money that `devices` cost per minute, hour and day of delay. Raises Misuse for a number that is no fleet."""
    if not 0 < devices <= 10_000_000:
        raise Misuse(f"--what-if: expected 1 to 10,000,000 devices, found {devices}")
    hour = Range(low=devices, likely=devices, high=devices).times(price.range)
    return WhatIf(
        devices=devices, per_minute=_scaled(hour, 1 / 60), per_hour=hour, per_day=_scaled(hour, 24), price=price
    )


def _scaled(value: Range, factor: float) -> Range:
    return Range(low=value.low * factor, likely=value.likely * factor, high=value.high * factor)


def total(rows: Iterable[Row]) -> Range:
    """Sum of the rows' hours."""
    hours = Range()
    for row in rows:
        hours = hours.plus(row.hours)
    return hours


def by_kind(rows: Iterable[Row]) -> dict[Kind, Range]:
    """Sum of the rows' hours for each kind of loss."""
    parts: dict[Kind, Range] = {}
    for row in rows:
        parts[row.kind] = parts.get(row.kind, Range()).plus(row.hours)
    return parts


def _devices(rows: Iterable[Row]) -> int:
    """Devices of one run: its ranks; a rank that was started again is one device still."""
    return len({row.rank if row.rank is not None else -1 - row.process for row in rows})
