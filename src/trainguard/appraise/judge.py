"""From a run's name to its verdict: read what the log proves, appraise it, and say what could not be proved.

Broken evidence is a finding like any other: the log with a flipped bit, a spool that was cut or edited, a run
without an end. It never raises for bad evidence, so that there is always a document to read.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

import msgspec

from trainguard.appraise.engine import Appraiser
from trainguard.appraise.interface import Context
from trainguard.appraise.replay import Replayed, replayed
from trainguard.appraise.verdict import Verdict, decide
from trainguard.archive import LogLeaves, RunReader, TruncatedRecord
from trainguard.errors import TrainguardError, VerificationError
from trainguard.finding import Finding, LinkState, Subject
from trainguard.home import Home
from trainguard.policy import Policy
from trainguard.seal.verify import verify_seal
from trainguard.veil import MAINTENANCE, Veil, approver_keys, read_veil
from trainguard.waiver import Waiver


def judge_run(
    home: Home, run: str, *, policy: Policy | None = None, leaves: LogLeaves | None = None, lifted: bool = False
) -> Verdict:
    """The verdict on `run`, by `policy` or by the one it was recorded under, as this machine shows it (veil.py).

    lifted: the verdict itself, whatever is muted: for decisions, which a mute must never soften.
    leaves: the log's statements where the caller has read them already, to judge many runs with one reading.
    Raises Misuse when there is no such run or no log, Unavailable when they cannot be read.
    """
    try:
        leaves = leaves if leaves is not None else LogLeaves(home)
    except VerificationError as error:
        return broken_evidence(run, error)
    verdict = waived(_judged(home, run, policy, leaves), leaves)
    return verdict if lifted else veiled(verdict, read_veil(lambda: leaves.sealed))


def _judged(home: Home, run: str, policy: Policy | None, leaves: LogLeaves) -> Verdict:
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
    again = replayed(run, leaves.audits.get(run, ()), home.blob)
    appraiser.findings.extend(again.findings)
    if reader.running:
        return _still_running(appraiser, run)
    return with_replay(appraiser.verdict(), again)


def maintained(home: Home, runs: Iterable[str] | None = None) -> bool:
    """Whether this machine hides something of one of `runs`, by default of any run of the log."""
    leaves = LogLeaves(home)
    if len(read_veil(lambda: leaves.sealed).approvers) < 2:
        return False
    return any(
        MAINTENANCE in judge_run(home, run, leaves=leaves).gaps for run in (leaves.runs if runs is None else runs)
    )


def waived(verdict: Verdict, leaves: LogLeaves) -> Verdict:
    """The verdict of a run that somebody let off: at best UNKNOWN, and it says who agreed and until when."""
    begin = leaves.runs.get(verdict.run or "") or {}
    text = str(begin.get("began_ns"))
    began = int(text) // 10**9 if text.isdigit() else 0
    covering = [waiver for waiver in leaves.waivers if waiver.covers(verdict.run or "", began)]
    return _redrawn(verdict, [_waiver_said(waiver) for waiver in covering]) if covering else verdict


def _waiver_said(waiver: Waiver) -> str:
    until = datetime.datetime.fromtimestamp(waiver.until, datetime.UTC).strftime("%Y-%m-%d")
    try:
        who = f"agreed by {' and '.join(waiver.approved(approver_keys()))}"
    except TrainguardError as error:
        who = f"which does not hold ({error})"
    return f"a waiver covers runs {waiver.runs} until {until}, {who}: {waiver.reason}"


def _redrawn(verdict: Verdict, gaps: Iterable[str]) -> Verdict:
    """The same verdict with further gaps, decided anew."""
    drawn = decide(
        verdict.findings,
        verdict.links,
        run=verdict.run,
        steps=verdict.coverage.steps,
        watched_steps=verdict.coverage.watched_steps,
        gaps=(*verdict.gaps, *gaps),
        policy=verdict.policy,
        lock=verdict.lock,
    )
    return msgspec.structs.replace(drawn, coverage=verdict.coverage, level=verdict.level)


def veiled(verdict: Verdict, veil: Veil) -> Verdict:
    """The verdict as ordinary lists show it: what is muted is left out, and the word is then at best UNKNOWN.

    Findings that are not muted keep their weight, so another proof in the same run still makes it TAINTED.
    """
    whole = verdict.run is not None and veil.hides("run", verdict.run)
    kept = tuple(
        finding
        for finding in verdict.findings
        if finding.outcome == "not_checked" or not (whole or veil.hides_path(finding.subject.path))
    )
    if not whole and len(kept) == len(verdict.findings):
        return verdict
    shown = {finding.check for finding in kept if finding.outcome != "not_checked"}
    links = tuple(_blurred(link, shown) for link in verdict.links)
    return _redrawn(msgspec.structs.replace(verdict, findings=kept, links=links), [MAINTENANCE])


def _blurred(link: LinkState, shown: set[str]) -> LinkState:
    """A link without what a muted finding counted in it."""
    if not link.broken or link.link in shown:
        return link
    return LinkState(
        link=link.link, held=link.held, blind=(MAINTENANCE,), installed=link.installed, required=link.required
    )


def with_replay(verdict: Verdict, again: Replayed) -> Verdict:
    """The verdict with what audits replayed: coverage, the link's balance, and the level where it was done apart."""
    if again.link is None:
        return verdict
    coverage = msgspec.structs.replace(
        verdict.coverage, replayed_steps=again.steps, detection_probability=again.detection
    )
    level = "TIL-3" if again.apart and verdict.lock is not None else verdict.level
    reasons = (*verdict.reasons, *again.tolerances)
    links = (*verdict.links, again.link)
    return msgspec.structs.replace(verdict, coverage=coverage, links=links, level=level, reasons=reasons)


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
