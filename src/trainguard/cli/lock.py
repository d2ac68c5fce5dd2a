"""`trainguard lock -- CMD…`: approve what CMD would run now, as the reference for preflight and run."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from trainguard.cli._progress import working
from trainguard.digest import write_durably
from trainguard.errors import Misuse
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.lockfile import LOCK_NAME, Lock, Measurement, Plan, make_lock
from trainguard.policy import Approval


@click.command("lock", context_settings={"allow_interspersed_args": False})
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path(LOCK_NAME), show_default=True)
@click.option(
    "--approve", multiple=True, metavar="CHECK=PLACE", help="Approve one honest oddity, as a finding prints it."
)
@click.option("--data", multiple=True, metavar="PATH", help="Data the job reads that CMD does not name.")
@click.option("--output", multiple=True, metavar="PATH", help="File or folder the job writes: never compared.")
@click.option(
    "--plan",
    "references",
    multiple=True,
    metavar="RUN",
    help="An approved run of CMD, at least two: seeds, order, optimizer and rates that they agree in are held, too.",
)
@click.option("--deep", is_flag=True, help="Compile every installed source again and compare its bytecode (minutes).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document about the lock.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    out: Path,
    approve: tuple[str, ...],
    data: tuple[str, ...],
    output: tuple[str, ...],
    references: tuple[str, ...],
    deep: bool,
    as_json: bool,
    quiet: bool,
    cmd: tuple[str, ...],
) -> int:
    """Write the approved reference values of CMD: code, packages, start-up hooks, environment, data."""
    from trainguard.appraise.environment import intrinsic
    from trainguard.measure import measure

    approvals = [_approval(text) for text in approve]
    home = Home.find()
    home.prepare()
    with working("measuring code, packages, environment and data", shown=not quiet):
        measurement = measure(
            cmd,
            cwd=Path.cwd(),
            env=dict(os.environ),
            cache=home.cache,
            data_paths=data,
            outputs=output,
            compare_bytecode="all" if deep else "new",
            read_flags=True,
            trust_cache=False,
        )
    oddities = list(intrinsic(measurement))
    refused = [finding for finding in oddities if finding.outcome == "violated"]
    plan = _planned(home, references, measurement, shown=not quiet) if references else None
    lock = None if refused else _signed(home, measurement, approvals, plan, out)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(_document(out, lock, measurement, oddities)) + b"\n")
    elif not quiet or refused:
        from trainguard.render.preflight import lock_text

        click.echo(lock_text(str(out), lock, measurement, oddities), nl=False)
    return 1 if refused else 0


def _approval(text: str) -> Approval:
    check, equals, place = text.partition("=")
    if not equals or not check or not place:
        raise Misuse(f"--approve {text!r}: expected CHECK=PLACE, such as weights=train.py:45")
    return Approval(check=check, place=place)


def _planned(home: Home, references: tuple[str, ...], measurement: Measurement, *, shown: bool) -> Plan:
    from trainguard.appraise.references import plan_from
    from trainguard.cli.verdict import named_run

    with working("reading what the reference runs have in common", shown=shown):
        return plan_from(home, [named_run(home, run) for run in references], measurement)


def _signed(home: Home, measurement: Measurement, approvals: list[Approval], plan: Plan | None, out: Path) -> Lock:
    from trainguard.envelope import load_or_create_key
    from trainguard.measure.contents import pack_sources

    key = load_or_create_key(home.keys / "attestation.pem")
    contents = home.store_blob(pack_sources(measurement))
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lock = make_lock(measurement, key, made=made, approvals=approvals, contents=contents, plan=plan)
    write_durably(out.absolute(), lock.data)
    return lock


def _document(out: Path, lock: Lock | None, measurement: Measurement, oddities: list[Finding]) -> dict[str, object]:
    return {
        "schema": "trainguard/locked/v1",
        "lock": str(out) if lock else None,
        "digest": lock.digest if lock else None,
        "measurement": measurement.digest,
        "signer": lock.signer if lock else None,
        "packages": len(measurement.distributions),
        "files": measurement.file_count,
        "findings": oddities,
        "notes": measurement.notes,
        "plan": lock.plan if lock else None,
    }
