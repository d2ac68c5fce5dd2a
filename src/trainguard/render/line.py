"""One finding or verdict in one plain line, for stderr while and after a command runs."""

from __future__ import annotations

from trainguard.appraise.verdict import Verdict
from trainguard.finding import Finding, Subject


def plain(text: str, limit: int = 400) -> str:
    """`text` without control characters (a finding quotes what an attacker wrote), cut to `limit` characters."""
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def finding_line(finding: Finding) -> str:
    """`VIOLATED optimizer [C4] step 120 rank 0 lm_head.weight: message`."""
    ids = f" [{' '.join(finding.techniques)}]" if finding.techniques else ""
    place = where(finding.subject)
    return plain(f"{finding.outcome.upper()} {finding.check}{ids}{' ' + place if place else ''}: {finding.message}")


def where(subject: Subject) -> str:
    """Step, rank, tensor and path of a subject, those that apply."""
    parts = (
        f"step {subject.step}" if subject.step is not None else "",
        f"rank {subject.rank}" if subject.rank is not None else "",
        subject.tensor or "",
        subject.path or "",
    )
    return " ".join(part for part in parts if part)


def verdict_line(verdict: Verdict) -> str:
    """`run X: VERIFIED (TIL-1), 400 of 400 steps checked in full; reason`."""
    coverage = verdict.coverage
    steps = f"{coverage.watched_steps} of {coverage.steps} steps checked in full" if coverage.steps else "no steps"
    reason = f"; {verdict.reasons[0]}" if verdict.reasons else ""
    return plain(f"run {verdict.run}: {verdict.verdict} ({verdict.level}), {steps}{reason}", 1000)
