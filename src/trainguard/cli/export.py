"""`trainguard export ocsf|cyclonedx|openlineage|webhook`: what others' systems take, in their formats."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from trainguard.cli.verdict import is_path, named_run
from trainguard.errors import Misuse, Unavailable
from trainguard.home import Home

OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path), help="Write here instead of stdout.")
ARRAY = click.option("--json", "as_json", is_flag=True, help="One JSON array instead of one event a line.")
INCIDENT = "inc-"


@click.group("export")
def command() -> None:
    """Findings, models and lineage in others' formats. Everything comes from the verified log."""


@command.command("ocsf")
@OUTPUT
@ARRAY
@click.argument("subject")
def ocsf(output: Path | None, as_json: bool, subject: str) -> int:
    """Findings of the run SUBJECT, or the incident SUBJECT (inc-…), as OCSF 1.7.0 events."""
    _put(_encoded(_ocsf(Home.find(), subject), as_json), output)
    return 0


@command.command("openlineage")
@OUTPUT
@ARRAY
@click.argument("run")
def openlineage(output: Path | None, as_json: bool, run: str) -> int:
    """What RUN read and sealed, as OpenLineage run events."""
    _put(_encoded(_openlineage(Home.find(), run), as_json), output)
    return 0


@command.command("cyclonedx")
@OUTPUT
@click.option("--spec", type=click.Choice(["1.6", "1.7"]), default="1.6", show_default=True, help="CycloneDX version.")
@click.option("--json", "as_json", is_flag=True, help="Has no effect: a bill is one document.")
@click.argument("model", type=click.Path(path_type=Path))
def cyclonedx(output: Path | None, spec: str, as_json: bool, model: Path) -> int:
    """The checkpoint MODEL, which a watched run sealed, as a CycloneDX ML-BOM."""
    from trainguard.incident.outward import model_of, terms_of
    from trainguard.render.cyclonedx import bill

    home = Home.find()
    _put(msgspec.json.encode(bill(model_of(home, model), terms=terms_of(home), spec=spec)) + b"\n", output)
    return 0


@command.command("webhook")
@click.option("--url", required=True, help="Where to send it; https, or plain http to this machine.")
@click.option("--secret-file", type=click.Path(path_type=Path), help="File with the shared secret; signs the headers.")
@click.option("--envelope", is_flag=True, help="Send a DSSE envelope, signed by the key of the log's statements.")
@click.option("--format", "kind", type=click.Choice(["ocsf", "openlineage"]), default="ocsf", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print how it went as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("subject")
def webhook(
    url: str, secret_file: Path | None, envelope: bool, kind: str, as_json: bool, quiet: bool, subject: str
) -> int:
    """Send SUBJECT's events, signed: as one JSON array, or in an envelope. Exit status: 0 taken, 3 not delivered.

    With --secret-file a header signs the body for whoever shares the secret; with --envelope anybody who has the
    public key can check it, also later.
    """
    from trainguard.deliver import ENVELOPE_TYPE, deliver, sealed_events
    from trainguard.envelope import load_or_create_key

    if secret_file is None and not envelope:
        raise Misuse("webhook: expected --secret-file, --envelope or both: nothing is sent that nobody can check")
    secret = _secret(secret_file) if secret_file is not None else None
    home = Home.find()
    events = _ocsf(home, subject) if kind == "ocsf" else _openlineage(home, subject)
    if envelope:
        body = sealed_events(events, load_or_create_key(home.keys / "attestation.pem"), at=int(time.time()))
        done = deliver(url, body, secret=secret, content_type=ENVELOPE_TYPE)
    else:
        done = deliver(url, _encoded(events, as_array=True), secret=secret)
    if as_json:
        told = {"events": len(events), "status": done.status, "attempts": done.attempts, "delivery": done.delivery}
        sys.stdout.buffer.write(msgspec.json.encode({"schema": "trainguard/delivered/v1", **told}) + b"\n")
    elif not quiet:
        click.echo(f"{len(events)} events taken with status {done.status}, delivery {done.delivery}")
    return 0


def _secret(path: Path) -> bytes:
    try:
        return path.read_bytes()[: 1 << 16].strip()
    except OSError as error:
        raise Unavailable(f"{path}: secret cannot be read: {error.strerror}") from error


def _ocsf(home: Home, subject: str) -> list[dict[str, Any]]:
    from trainguard.archive import LogLeaves
    from trainguard.incident.facts import run_facts
    from trainguard.render.ocsf import detection_events, incident_event

    leaves = LogLeaves(home)
    if subject.startswith(INCIDENT) and not (home.runs / subject).is_dir():
        from trainguard.incident.correlate import find, incidents

        incident = find(incidents(home), subject)
        return [incident_event(incident, run_facts(home, incident.run, leaves=leaves, findings=incident.findings))]
    from trainguard.appraise.judge import judge_run

    verdict = judge_run(home, _run(home, subject), leaves=leaves)
    facts = run_facts(home, str(verdict.run), leaves=leaves, findings=verdict.findings)
    return list(detection_events(verdict, facts))


def _openlineage(home: Home, subject: str) -> list[dict[str, Any]]:
    from trainguard.appraise.judge import judge_run
    from trainguard.archive import LogLeaves
    from trainguard.incident.facts import run_facts
    from trainguard.incident.outward import seals_of, terms_of
    from trainguard.render.openlineage import run_events

    leaves = LogLeaves(home)
    run = _run(home, subject)
    verdict = judge_run(home, run, leaves=leaves)
    facts = run_facts(home, run, leaves=leaves, seals=seals_of(home))
    return run_events(facts, verdict, origin=leaves.head.origin, terms=terms_of(home, leaves))


def _run(home: Home, subject: str) -> str:
    if is_path(home, subject):
        raise Misuse(
            f"{subject}: expected a run, found a path", next_step="a model goes by: trainguard export cyclonedx"
        )
    return named_run(home, subject)


def _encoded(events: Sequence[dict[str, Any]], as_array: bool) -> bytes:
    if as_array:
        return msgspec.json.encode(events) + b"\n"
    return b"".join(msgspec.json.encode(event) + b"\n" for event in events)


def _put(data: bytes, output: Path | None) -> None:
    if output is None:
        sys.stdout.buffer.write(data)
        return
    from trainguard.digest import write_durably

    write_durably(output.absolute(), data)
    click.echo(f"{output}: {len(data):,} bytes", err=True)
