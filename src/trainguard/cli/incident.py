"""`trainguard incident list|show|report|export|verify`: what belongs together, from where, what it touched."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
@click.option(
    "--kind",
    type=click.Choice(["technical", "plain", "flash", "reach", "review", "authority"]),
    default="technical",
    help="technical: everything; plain: two pages in plain words; flash: a one-page notice. reach: what is affected "
    "and what is not; review: the blameless review; authority: a draft report. Accounts are named "
    "in the first two alone.",
)
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write the page here.")
@click.option("--pdf", "pdf_path", type=click.Path(path_type=Path), help="Write it as PDF/A (needs weasyprint).")
@click.option("--prices", "prices_path", type=click.Path(path_type=Path), help="Prices for what it cost (TOML).")
@click.option("--device", help="Which price to use, where the file has several.")
@click.option("--notes", "notes_path", type=click.Path(path_type=Path), help="What people add (TOML): docs/recover.md.")
@click.argument("name")
def reporting(
    kind: str,
    html_path: Path | None,
    pdf_path: Path | None,
    prices_path: Path | None,
    device: str | None,
    notes_path: Path | None,
    name: str,
) -> int:
    """Write an incident as a document to hand on."""
    from trainguard.cli._documents import write_document
    from trainguard.incident.authored import NOTHING, read_authored
    from trainguard.incident.damage import NO_PRICES, read_prices
    from trainguard.incident.dossier import make_dossier
    from trainguard.render.aftermath import authority_page, blast_page, review_page
    from trainguard.render.documents import flash_page, plain_page
    from trainguard.render.incident import incident_page

    prices = read_prices(prices_path) if prices_path is not None else NO_PRICES
    authored = read_authored(notes_path) if notes_path is not None else NOTHING
    dossier = make_dossier(Home.find(), name, prices=prices, device=device)
    drawn: dict[str, Callable[[], str]] = {
        "technical": lambda: incident_page(dossier.incident, dossier.family),
        "plain": lambda: plain_page(dossier),
        "flash": lambda: flash_page(dossier),
        "reach": lambda: blast_page(dossier),
        "review": lambda: review_page(dossier, authored),
        "authority": lambda: authority_page(dossier, authored),
    }
    page = drawn[kind]()
    write_document(page, html_path, pdf_path, identity=f"{kind} {dossier.incident.id}", verb="incident report")
    return 0


@command.command("writers")
@click.option(
    "--log", "logs", type=click.Path(path_type=Path), multiple=True, required=True, help="A log of the store."
)
@click.option(
    "--map", "maps", metavar="/PREFIX=s3://BUCKET/PREFIX", multiple=True, required=True, help="Where files lie in it."
)
@click.option("--json", "as_json", is_flag=True, help="Print them as one document.")
@click.argument("name")
def writing(logs: tuple[Path, ...], maps: tuple[str, ...], as_json: bool, name: str) -> int:
    """Who wrote the objects behind an incident's files, by the object store's own log. Claimed, not witnessed.

    CloudTrail, S3 server access logs, Cloud Audit Logs and Azure Storage resource logs, plain or gzipped. Exit status:
    0 told, 3 the logs do not cover it.
    """
    from trainguard.incident.correlate import find, incidents
    from trainguard.incident.stores import parse_mapping, writers

    home = Home.find()
    told = writers(find(incidents(home), name), home, logs, parse_mapping(maps))
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode({"gaps": told.gaps, **msgspec.to_builtins(told)}) + b"\n")
    else:
        from trainguard.cli._view import show as put
        from trainguard.render.incident import writers_view

        put(lambda ascii_only: writers_view(told))
    return 3 if told.gaps else 0


@command.command("export")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Write the bundle here.")
@click.argument("name")
def exporting(output: Path, name: str) -> int:
    """Write an incident with its records, proofs and keys as one zip that anyone can check offline."""
    from trainguard.digest import write_durably
    from trainguard.incident.bundle import make_bundle
    from trainguard.incident.correlate import find, incidents

    home = Home.find()
    data = make_bundle(home, find(incidents(home), name))
    write_durably(output, data)
    click.echo(f"{output}: {len(data):,} bytes; check it anywhere with: python verify.py {output.name}", err=True)
    return 0


@command.command("verify")
@click.option("--log-key", help="Fingerprint the log's key must have (SHA-256, hex).")
@click.option("--attestation-key", help="Fingerprint the attestation key must have.")
@click.argument("bundle", type=click.Path(path_type=Path))
def verifying(log_key: str | None, attestation_key: str | None, bundle: Path) -> int:
    """Check a bundle: the same as `python verify.py BUNDLE`. Exit status: 0 holds, 1 does not, 3 cannot be read."""
    from trainguard.incident import offline

    pairs = (("--log-key", log_key), ("--attestation-key", attestation_key))
    words = [str(bundle), *(word for name, value in pairs if value is not None for word in (name, value))]
    status, said = offline.run(words)
    click.echo(said)
    return status
