"""trainguard scan PATH…: vet model files without loading them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import msgspec

from trainguard.errors import Misuse, Unavailable
from trainguard.scan import Report, ScanPolicy, Verdict, parse_trust, vet, worst
from trainguard.scan.verdict import SCHEMA

TRUST_BYTES = 1 << 20


@click.command("scan")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout (spec/scan.md).")
@click.option("--sarif", "as_sarif", is_flag=True, help="SARIF 2.1.0 on stdout.")
@click.option("--trust", type=click.Path(path_type=Path), help="File with names you vouch for, one a line.")
@click.option(
    "--tier",
    type=click.Choice(["weights", "training", "framework"]),
    default="training",
    show_default=True,
    help="Which lists count: tensors only; + training state; + whole modules and estimators.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["unknown", "unsafe"]),
    default="unknown",
    show_default=True,
    help="What ends with status 1. With 'unsafe', unknown files end with 3: could not tell. Never with 0.",
)
@click.option("--digest", type=click.Choice(["sha256", "blake3"]), default="sha256", show_default=True)
@click.option("--quiet", is_flag=True, help="Say nothing about safe files.")
def command(
    paths: tuple[Path, ...],
    as_json: bool,
    as_sarif: bool,
    trust: Path | None,
    tier: str,
    fail_on: str,
    digest: str,
    quiet: bool,
) -> None:
    """Vet model files, or whole folders, without loading them.

    Exit status: 0 all safe, 1 something unsafe or unknown, 3 something could not be judged, 2 usage error.
    """
    if as_json and as_sarif:
        raise click.UsageError("--json and --sarif exclude each other")
    policy = msgspec.convert(
        {"tier": tier, "digest": digest, "trust": _trust_lines(trust) if trust else ()}, ScanPolicy
    )
    reports = [vet(path, policy) for path in paths]
    click.echo(_document(reports, as_json, as_sarif, quiet), nl=not (quiet and not as_json and not as_sarif))
    sys.exit(exit_status(reports, fail_on))


def exit_status(reports: list[Report], fail_on: str) -> int:
    """0 only when every file is safe; 1 when one is as bad as `fail_on` says; 3 for everything between."""
    verdicts = {file.verdict for report in reports for file in report.files}
    verdicts |= {report.verdict for report in reports}
    failing = {Verdict.UNSAFE} if fail_on == "unsafe" else {Verdict.UNSAFE, Verdict.UNKNOWN}
    if verdicts & failing:
        return 1
    return 0 if verdicts == {Verdict.SAFE} else 3


def _document(reports: list[Report], as_json: bool, as_sarif: bool, quiet: bool) -> str:
    if as_sarif:
        from trainguard.render.sarif import sarif

        return json.dumps(sarif(reports), indent=1)
    if as_json:
        verdict = worst(report.verdict for report in reports)
        document = {"schema": SCHEMA, "verdict": verdict.value, "reports": msgspec.to_builtins(reports)}
        return json.dumps(document, indent=1)
    from trainguard.render.scan import render_scan

    text = render_scan(reports, quiet=quiet)
    return text + "\n" if quiet and text else text


def _trust_lines(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            data = file.read(TRUST_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path}: trust file cannot be read: {error.strerror}") from error
    if len(data) > TRUST_BYTES:
        raise Misuse(f"{path}: trust file of more than {TRUST_BYTES} bytes")
    return parse_trust(data, where=str(path))
