"""`trainguard damage`: device-hours and money as ranges, with the rows they come from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from trainguard.cli._progress import working
from trainguard.cli.verdict import named_run
from trainguard.errors import Misuse
from trainguard.home import Home

if TYPE_CHECKING:
    from trainguard.incident.damage import Damage


@click.command("damage")
@click.option(
    "--prices", "prices_path", type=click.Path(path_type=Path), help="Prices, claims, outside statements (TOML)."
)
@click.option("--device", help="Which price to use, where the file has several.")
@click.option("--what-if", "fleet", type=int, metavar="DEVICES", help="What so many devices cost per minute of delay.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write a damage statement here.")
@click.option("--pdf", "pdf_path", type=click.Path(path_type=Path), help="Write it as PDF/A (needs weasyprint).")
@click.option("--json", "as_json", is_flag=True, help="Print it as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("runs", nargs=-1)
def command(
    prices_path: Path | None,
    device: str | None,
    fleet: int | None,
    html_path: Path | None,
    pdf_path: Path | None,
    as_json: bool,
    quiet: bool,
    runs: tuple[str, ...],
) -> int:
    """Damage over all runs, or over RUNS and what was made from them.

    Exit status: 0 no run is affected, 1 some are, 3 there are runs that nobody could judge.
    """
    from trainguard.incident import damage
    from trainguard.render.damage import damage_lines, what_if_lines

    prices = damage.read_prices(prices_path) if prices_path is not None else damage.Prices()
    if fleet is not None:
        price = damage.choose_price(prices, device)
        if price is None:
            raise Misuse(
                "--what-if: expected one price", next_step="name a prices file, and the device: --prices F --device D"
            )
        told = damage.what_if(fleet, price)
        _print(told, list(what_if_lines(told)), as_json=as_json, quiet=quiet)
        return 0
    home = Home.find()
    chosen = [named_run(home, run) for run in runs] or None
    with working("judging runs", shown=not quiet):
        report = damage.assess(home, prices=prices, device=device, runs=chosen)
    if html_path is not None or pdf_path is not None:
        _write(home, report, html_path, pdf_path, chosen)
    _print(report, list(damage_lines(report)), as_json=as_json, quiet=quiet)
    return 1 if report.rows else 3 if report.unknown else 0


def _print(document: object, lines: list[str], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(document) + b"\n")
    elif not quiet:
        click.echo("\n".join(lines))


def _write(
    home: Home, report: Damage, html_path: Path | None, pdf_path: Path | None, chosen: Sequence[str] | None
) -> None:
    from trainguard.cli._documents import write_document
    from trainguard.incident.dossier import source_of
    from trainguard.render.documents import damage_page

    scope = f"{', '.join(chosen)} and what was made from them" if chosen else "all runs of this log"
    page = damage_page(report, source_of(home), scope=scope)
    write_document(page, html_path, pdf_path, identity=f"damage {scope}", verb="damage")
