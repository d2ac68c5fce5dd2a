"""`trainguard preflight -- CMD…`: compare what would run now with the lock, before anything runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from trainguard.appraise.verdict import Verdict, decide
from trainguard.cli._lock import with_trust
from trainguard.cli._progress import working
from trainguard.errors import Misuse, TrainguardError, Unavailable, VerificationError
from trainguard.finding import Finding, LinkState, Subject
from trainguard.home import Home
from trainguard.lockfile import LOCK_NAME, Lock, Measurement, read_lock, unpack_contents
from trainguard.policy import Policy, load_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a preflight found."""

    verdict: Verdict
    lock: Lock | None = None
    measurement: Measurement | None = None


@click.command("preflight", context_settings={"allow_interspersed_args": False})
@click.option("--lock", "lock_path", type=click.Path(path_type=Path), default=Path(LOCK_NAME), show_default=True)
@click.option("--key", multiple=True, type=click.Path(path_type=Path), help="Public key (PEM) that may sign the lock.")
@click.option("--policy", "policy_path", type=click.Path(path_type=Path), help="Policy file (TOML).")
@click.option(
    "--deep", is_flag=True, help="Read every file again; compile every source and compare its bytecode (minutes)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
def command(
    lock_path: Path,
    key: tuple[Path, ...],
    policy_path: Path | None,
    deep: bool,
    as_json: bool,
    quiet: bool,
    cmd: tuple[str, ...],
) -> int:
    """Compare what CMD would run now with the lock; without CMD, the approved command.

    Exit status: 0 as approved, 1 something is not, 3 could not tell (no lock, unknown signer, unreadable file).
    """
    home = Home.find()
    result = preflight(home, cmd, lock_path=lock_path, keys=key, policy=load_policy(policy_path), deep=deep)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(result.verdict) + b"\n")
    elif not quiet:
        from trainguard.render.preflight import preflight_text

        approved = _approved_texts(home, result.lock)
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        click.echo(preflight_text(result.verdict, result.lock, result.measurement, approved, colour=colour), nl=False)
    return result.verdict.exit_status


def preflight(
    home: Home,
    command: Sequence[str],
    *,
    lock_path: Path,
    keys: Sequence[Path] = (),
    policy: Policy,
    deep: bool = False,
) -> Result:
    """Measure `command` (or, when empty, the approved one) and compare it with the lock.

    Raises Misuse when there is neither a command nor a lock, or the command names no program.
    """
    from trainguard.appraise.environment import compare, intrinsic
    from trainguard.measure import measure

    lock: Lock | None = None
    findings: list[Finding] = []
    try:
        lock = with_trust(home, read_lock(lock_path), keys=keys, where=str(lock_path))
        findings += [] if lock.trusted else [_unknown_signer(lock, lock_path)]
    except VerificationError as error:
        return Result(verdict=decide([_lock_finding(error, lock_path)], (), policy=policy.digest))
    except Unavailable as error:
        if not command:
            raise Misuse(f"no command given, and {error}", next_step=error.next_step) from error
        findings.append(Finding(check="environment", outcome="not_checked", message=str(error)))
    home.prepare()
    with working("measuring code, packages, environment and data"):
        measurement = measure(
            command or (lock.measurement.launch.argv if lock else ()),
            cwd=Path.cwd(),
            env=dict(os.environ),
            cache=home.cache,
            against=lock.measurement if lock else None,
            compare_bytecode="all" if deep else "new",
            trust_cache=not deep,
        )
    findings += compare(lock, measurement, policy) if lock else intrinsic(measurement)
    links = [_link(findings, measurement, lock)]
    digest = lock.digest if lock else None
    return Result(
        verdict=decide(findings, links, policy=policy.digest, lock=digest), lock=lock, measurement=measurement
    )


def _link(findings: Sequence[Finding], measurement: Measurement, lock: Lock | None) -> LinkState:
    broken = sum(finding.outcome != "not_checked" for finding in findings)
    blind = tuple(finding.message for finding in findings if finding.outcome == "not_checked")
    held = max(0, measurement.file_count - broken) if lock else 0
    return LinkState(link="environment", held=held, broken=broken, blind=blind)


def _unknown_signer(lock: Lock, where: Path) -> Finding:
    return Finding(
        check="environment",
        outcome="not_checked",
        subject=Subject(path=str(where)),
        message=f"{where} is signed by key {lock.signer[:16]}…, which this machine does not know; name the approver's "
        "public key with --key, or put it into keys/approvers/",
    )


def _lock_finding(error: VerificationError, where: Path) -> Finding:
    step = f"; {error.next_step}" if error.next_step else ""
    return Finding(
        check="environment",
        outcome="violated",
        techniques=("G6",),
        subject=Subject(path=str(where)),
        message=f"{error}{step}",
    )


def _approved_texts(home: Home, lock: Lock | None) -> dict[str, bytes]:
    """Source texts kept at lock time; none where the lock was made on another machine."""
    if lock is None or lock.contents is None:
        return {}
    try:
        return unpack_contents(home.blob(lock.contents), where="contents")
    except TrainguardError:
        return {}
