"""From a run's name to its verdict: read what the log proves, appraise it, and say what could not be proved.

Broken evidence is a finding like any other: the log with a flipped bit, a spool that was cut or edited, a run
without an end. It never raises for bad evidence, so that there is always a document to read.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from trainguard.appraise.engine import Appraiser
from trainguard.appraise.interface import Context
from trainguard.appraise.replay import Replayed, replayed
from trainguard.appraise.verdict import Verdict, decide
from trainguard.archive import LogLeaves, RunReader, TruncatedRecord
from trainguard.errors import TrainguardError, VerificationError
from trainguard.finding import Finding, Subject
from trainguard.home import Home
from trainguard.policy import Policy
from trainguard.seal.verify import verify_seal


def judge_run(home: Home, run: str, *, policy: Policy | None = None, leaves: LogLeaves | None = None) -> Verdict:
    """The verdict on `run`, by `policy` or by the one it was recorded under.

    leaves: the log's statements where the caller has read them already, to judge many runs with one reading.
    Raises Misuse when there is no such run or no log, Unavailable when they cannot be read.
    """
    try:
        leaves = leaves if leaves is not None else LogLeaves(home)
    except VerificationError as error:
        return broken_evidence(run, error)
    reader = RunReader(home, run, leaves=leaves)
    if reader.begin is None:
        return decide((), (), run=run, gaps=("the log holds no statement of this run",))
    context = Context(run=run, policy=policy or recorded_policy(home, reader), blob=home.blob)
    appraiser = Appraiser(context)
    try:
        for evidence in reader.records():
            appraiser.see(evidence)
    except VerificationError as error:
        appraiser.findings.append(_evidence_finding(run, error))
    if reader.running:
        return _still_running(appraiser, run)
    again = replayed(run, leaves.audits.get(run, ()), home.blob)
    appraiser.findings.extend(again.findings)
    return with_replay(appraiser.verdict(), again)


def with_replay(verdict: Verdict, again: Replayed) -> Verdict:
    """The verdict with what audits replayed: coverage, the link's balance, and the level where it was done apart."""
    if again.link is None:
        return verdict
    coverage = msgspec.structs.replace(
        verdict.coverage, replayed_steps=again.steps, detection_probability=again.detection
    )
    level = "TIL-3" if again.apart and verdict.lock is not None else verdict.level
    return msgspec.structs.replace(verdict, coverage=coverage, links=(*verdict.links, again.link), level=level)


def judge_checkpoint(home: Home, path: Path, *, policy: Policy | None = None) -> Verdict:
    """The verdict on a checkpoint: that of the run that saved it, and whether the file still is what that run sealed.

    Raises Misuse or Unavailable where there is no such file, or no seal of it.
    """
    report = verify_seal(path, home=home)
    if report.run is None:
        return decide(report.findings, (), gaps=(f"{path.name} was sealed by hand: no watched run is known for it",))
    of_run = judge_run(home, report.run, policy=policy)
    if not report.findings:
        return of_run
    return decide(
        (*of_run.findings, *report.findings),
        of_run.links,
        run=report.run,
        steps=of_run.coverage.steps,
        watched_steps=of_run.coverage.watched_steps,
        gaps=of_run.reasons if of_run.verdict == "UNKNOWN" else (),
        policy=of_run.policy,
        lock=of_run.lock,
    )


def recorded_policy(home: Home, reader: RunReader) -> Policy:
    """The policy the run was recorded under, from its `run/v1` statement; the default where it names none."""
    digest = (reader.begin or {}).get("policy")
    if not isinstance(digest, str):
        return Policy()
    try:
        return msgspec.json.decode(home.blob(digest), type=Policy)
    except (msgspec.DecodeError, TrainguardError):
        return Policy()


def broken_evidence(run: str, error: VerificationError) -> Verdict:
    """The verdict when the log itself does not verify: nothing it says can be relied on."""
    return decide([_evidence_finding(run, error)], (), run=run)


def _evidence_finding(run: str, error: VerificationError) -> Finding:
    truncated = isinstance(error, TruncatedRecord)
    return Finding(
        check="log",
        outcome="suspicious" if truncated else "violated",
        techniques=("G2", "G4") if truncated else ("G1", "G3"),
        subject=Subject(run=run),
        message=str(error),
    )


def _still_running(appraiser: Appraiser, run: str) -> Verdict:
    """What is certain so far; a run that goes on is never VERIFIED."""
    return decide(
        appraiser.findings,
        (),
        run=run,
        steps=appraiser.steps,
        watched_steps=appraiser.watched_steps,
        gaps=("the run is still going on",),
    )
