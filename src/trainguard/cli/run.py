"""`trainguard run -- CMD…`: guard a command; its output, input and exit status pass through untouched."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import click
import msgspec

from trainguard.cli._lock import with_trust
from trainguard.cli._session import Outcome, Session, warn
from trainguard.errors import Misuse
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.lockfile import Lock, read_lock
from trainguard.policy import Approval, Policy, load_policy

EXIT_STOPPED = 4
"""The guard ended the job (--enforce stop)."""

DEFAULT_LOCK = Path("trainguard.lock")


@click.command("run", context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option("--name", help="Name the run; default: date, time and a random suffix.")
@click.option("--lock", "lock_path", type=click.Path(path_type=Path), help="Lock to run against [./trainguard.lock].")
@click.option("--policy", "policy_path", type=click.Path(path_type=Path), help="Policy file (TOML).")
@click.option("--links", type=click.Choice(["governed", "all", "none"]), help="Which in-process checks run.")
@click.option(
    "--enforce",
    multiple=True,
    type=click.Choice(["log", "stop", "deny-signals"]),
    help="log: only record; stop: end the job at the first proved violation (exit status 4); deny-signals: refuse "
    "signals between strangers in the job. Can be given twice; can only tighten the policy.",
)
@click.option("--gate", is_flag=True, help="Do not start when preflight fails; TAINTED gives 1, SUSPECT 3.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict document as the last line of stdout.")
@click.option("--quiet", is_flag=True, help="Print nothing of our own but errors.")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    name: str | None,
    lock_path: Path | None,
    policy_path: Path | None,
    links: str | None,
    enforce: tuple[str, ...],
    gate: bool,
    as_json: bool,
    quiet: bool,
    cmd: tuple[str, ...],
) -> int:
    """Run CMD guarded and unmodified, against trainguard.lock if there is one."""
    home = Home.find()
    lock = _lock(home, lock_path)
    session = Session(
        home,
        cmd,
        policy=_enforcing(_policy(policy_path, links, lock), enforce),
        lock=lock,
        name=name,
        gate=gate,
        notify=(lambda _finding: None) if quiet else _announce,
    )
    if not quiet:
        against = f"against {lock_path or DEFAULT_LOCK}" if lock else "without a lock"
        warn(f"run {session.run_id}: watching {against}")
    outcome = session.run()
    _conclude(outcome, as_json=as_json, quiet=quiet)
    return _exit_status(outcome, gate=gate)


def _lock(home: Home, path: Path | None) -> Lock | None:
    if path is None and not DEFAULT_LOCK.exists():
        return None
    where = path or DEFAULT_LOCK
    return with_trust(home, read_lock(where), where=str(where))


def _policy(path: Path | None, links: str | None, lock: Lock | None) -> Policy:
    policy = load_policy(path)
    if lock is not None:
        approved = tuple(msgspec.convert(msgspec.to_builtins(a), Approval) for a in lock.approvals)
        policy = msgspec.structs.replace(policy, approve=policy.approve + approved)
    if links is not None:
        policy = msgspec.structs.replace(policy, links=links)
    return policy


def _enforcing(policy: Policy, given: tuple[str, ...]) -> Policy:
    """The policy with what the flags add to it. Raises Misuse where they would take something away."""
    wanted = frozenset(given) - {"log"}
    if "log" in given and (wanted or policy.measures):
        other = ", ".join(sorted(wanted or policy.measures))
        raise Misuse(f"--enforce log: {'given together with' if wanted else 'the policy enforces'} {other}")
    measures = policy.measures | wanted
    if "deny-signals" in measures and policy.kills == "off":
        raise Misuse("deny-signals needs the kill ledger", next_step='take kills = "off" out of the policy')
    return msgspec.structs.replace(policy, enforce=tuple(sorted(measures)) if measures else "log")


def _announce(finding: Finding) -> None:
    """One line on stderr as a finding becomes certain."""
    from trainguard.render.line import finding_line

    if finding.outcome != "not_checked":
        warn(finding_line(finding))


def _conclude(outcome: Outcome, *, as_json: bool, quiet: bool) -> None:
    from trainguard.render.line import verdict_line

    if not quiet:
        warn(verdict_line(outcome.verdict))
    if as_json:
        sys.stdout.flush()
        sys.stdout.buffer.write(msgspec.json.encode(outcome.verdict) + b"\n")
        sys.stdout.flush()


def _exit_status(outcome: Outcome, *, gate: bool) -> int:
    """The command's own status if it is not 0; with --gate, the verdict's. Dies by the signal the command died of."""
    ended = outcome.ended
    if ended is None:
        warn(f"the command was not started: preflight found differences from the lock ({'--gate' if gate else 'stop'})")
        return 1
    if outcome.stopped:
        return EXIT_STOPPED
    if ended.signal is not None:
        _die_by(ended.signal)
    if ended.status:
        return ended.status
    if gate and outcome.verdict.verdict in ("TAINTED", "SUSPECT"):
        return outcome.verdict.exit_status
    return 0


def _die_by(number: int) -> None:
    """End this process by the same signal, so that whoever waits for us sees what the command's end was."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
