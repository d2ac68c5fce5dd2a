"""`trainguard incident list|show|report`: what belongs together, from where, what it touched."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from trainguard.home import Home


@click.group("incident")
def command() -> None:
    """Incidents: findings that belong together, with candidates for where they come from. Names no person."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print them as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
def listing(as_json: bool, quiet: bool) -> int:
    """Every incident of the log, worst first. Exit status: 0 none, 1 some."""
    from trainguard.incident.correlate import incidents

    known = incidents(Home.find())
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode({"schema": "trainguard/incidents/v1", "incidents": known}) + b"\n")
    elif not quiet:
        from trainguard.cli._view import show as put
        from trainguard.render.incident import list_view

        put(lambda ascii_only: list_view(known))
    return 1 if known else 0


@command.command("show")
@click.option("--json", "as_json", is_flag=True, help="Print it as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("name")
def showing(as_json: bool, quiet: bool, name: str) -> int:
    """One incident: what, when, from where (with what speaks against it), and what it touched."""
    from trainguard.incident.correlate import find, incidents

    incident = find(incidents(Home.find()), name)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(incident) + b"\n")
    elif not quiet:
        from trainguard.cli._view import show as put
        from trainguard.render.incident import incident_view

        put(lambda ascii_only: incident_view(incident))
    return 1


@command.command("report")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write the page here.")
@click.option("--pdf", "pdf_path", type=click.Path(path_type=Path), help="Write it as PDF (needs weasyprint).")
@click.argument("name")
def reporting(html_path: Path | None, pdf_path: Path | None, name: str) -> int:
    """Write an incident as a report to hand on."""
    from trainguard.errors import Misuse
    from trainguard.incident.correlate import find, incidents
    from trainguard.incident.lineage import family, read_lineage
    from trainguard.render.html import write_page
    from trainguard.render.incident import incident_page, write_pdf

    if html_path is None and pdf_path is None:
        raise Misuse("incident report: expected --html FILE or --pdf FILE")
    home = Home.find()
    lineage = read_lineage(home)
    incident = find(incidents(home, lineage=lineage), name)
    page = incident_page(incident, family(lineage))
    if html_path is not None:
        write_page(html_path, page)
    if pdf_path is not None:
        write_pdf(pdf_path, page, identity=incident.id)
    return 0
