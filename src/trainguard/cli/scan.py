"""trainguard scan PATH…: vet model files without loading them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from trainguard.cli._progress import working
from trainguard.errors import Misuse, Unavailable
from trainguard.scan import Report, ScanPolicy, Verdict, parse_trust, vet, worst
from trainguard.scan.baseline import Known, is_accepted, load_baseline, save_baseline
from trainguard.scan.verdict import SCHEMA

TRUST_BYTES = 1 << 20


@click.command("scan")
@click.argument("paths", nargs=-1, required=True)
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
@click.option("--baseline", type=click.Path(path_type=Path), help="Unknown files in it do not fail (spec/scan.md).")
@click.option("--write-baseline", type=click.Path(path_type=Path), help="Write what is unknown now to a baseline.")
@click.option("--quiet", is_flag=True, help="Say nothing about safe files.")
def command(
    paths: tuple[str, ...],
    as_json: bool,
    as_sarif: bool,
    trust: Path | None,
    tier: str,
    fail_on: str,
    digest: str,
    baseline: Path | None,
    write_baseline: Path | None,
    quiet: bool,
) -> None:
    """Vet model files, or whole folders, without loading them.

    A PATH may be an address (s3://, gs://, https://, memory:// …): then only the parts that can name code are fetched.

    Exit status: 0 all safe, 1 something unsafe or unknown, 3 something could not be judged, 2 usage error.
    """
    if as_json and as_sarif:
        raise click.UsageError("--json and --sarif exclude each other")
    policy = msgspec.convert(
        {"tier": tier, "digest": digest, "trust": _trust_lines(trust) if trust else ()}, ScanPolicy
    )
    known = load_baseline(baseline) if baseline is not None else frozenset()
    reports = _all_vetted(paths, policy, shown=not quiet)
    accepted = [file.path for report in reports for file in report.files if is_accepted(file, known)]
    click.echo(_document(reports, accepted, as_json, as_sarif, quiet), nl=not (quiet and not as_json and not as_sarif))
    if write_baseline is not None:
        count = save_baseline(write_baseline, reports)
        click.echo(f"{write_baseline}: {count} unknown files", err=True)
    sys.exit(exit_status(reports, fail_on, known))


def _all_vetted(paths: Sequence[str], policy: ScanPolicy, *, shown: bool) -> list[Report]:
    with working("", shown=shown) as say:
        reports = []
        for number, path in enumerate(paths, 1):
            say(f"vetting {path}" + (f" ({number} of {len(paths)})" if len(paths) > 1 else ""))
            reports.append(_vet(path, policy))
        return reports


def _vet(path: str, policy: ScanPolicy) -> Report:
    if "://" not in path:
        return vet(path, policy)
    from trainguard.scan.remote import vet_remote

    return vet_remote(path, policy)


def exit_status(reports: list[Report], fail_on: str, known: frozenset[Known] = frozenset()) -> int:
    """0 only when every file is safe or accepted; 1 when one is as bad as `fail_on` says; 3 for everything between."""
    files = [file for report in reports for file in report.files]
    verdicts = {Verdict.SAFE if is_accepted(file, known) else file.verdict for file in files}
    verdicts |= {reason.verdict for report in reports for reason in report.reasons}
    failing = {Verdict.UNSAFE} if fail_on == "unsafe" else {Verdict.UNSAFE, Verdict.UNKNOWN}
    if verdicts & failing:
        return 1
    return 0 if verdicts == {Verdict.SAFE} else 3


def _document(reports: list[Report], accepted: list[str], as_json: bool, as_sarif: bool, quiet: bool) -> str:
    if as_sarif:
        from trainguard.render.sarif import sarif

        return json.dumps(sarif(reports), indent=1)
    if as_json:
        verdict = worst(report.verdict for report in reports)
        document = {"schema": SCHEMA, "verdict": verdict.value, "reports": msgspec.to_builtins(reports)}
        if accepted:
            document["accepted"] = accepted
        return json.dumps(document, indent=1)
    from trainguard.render.scan import render_scan

    text = render_scan(reports, quiet=quiet)
    if accepted:
        text = f"{text}\n" * bool(text) + f"accepted by the baseline: {len(accepted)} unknown files"
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
