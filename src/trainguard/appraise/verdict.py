"""The verdict of a run: four values, a level, the coverage, and the reasons (spec/verdict.md).

    TAINTED    a finding is violated
    SUSPECT    none is, but one is suspicious
    UNKNOWN    neither, but something that the level claims was not measured
    VERIFIED   every claim of the level holds

The decision is a pure function of findings and link states, so anyone with the log can make it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from trainguard.finding import Finding, LinkState, worst_first

SCHEMA = "trainguard/verdict/v1"
Word = Literal["VERIFIED", "TAINTED", "SUSPECT", "UNKNOWN"]
Level = Literal["TIL-0", "TIL-1", "TIL-2", "TIL-3", "TIL-4"]

TAMPERED_FRACTIONS = (0.1, 0.01)
"""Fractions of tampered segments for which the detection probability of replay is stated."""

EXIT_STATUS: dict[Word, int] = {"VERIFIED": 0, "TAINTED": 1, "SUSPECT": 3, "UNKNOWN": 3}


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the run the verdict rests on."""

    steps: int = 0
    """Optimizer steps recorded, over all ranks."""
    watched_steps: int = 0
    """Steps that were checked in full; the budget may skip the rest."""
    replayed_steps: int = 0
    """Steps re-run on a clean host."""
    detection_probability: dict[str, float] = {}
    """Fraction of segments tampered → chance that replay had found it; 0 where nothing was replayed."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The document that `verdict`, `preflight`, `probe` and `audit --json` print."""

    schema: str = SCHEMA
    run: str | None = None
    verdict: Word
    level: Level
    coverage: Coverage = Coverage()
    findings: tuple[Finding, ...] = ()
    reasons: tuple[str, ...] = ()
    links: tuple[LinkState, ...] = ()
    """Per link: held, broken, blind or explained."""
    gaps: tuple[str, ...] = ()
    """What else the level claims and nobody measured, one sentence each."""
    policy: str | None = None
    """SHA-256 of the policy it was judged by."""
    lock: str | None = None
    """SHA-256 of the lock it was compared with."""

    @property
    def exit_status(self) -> int:
        """0 upheld, 1 violated, 3 could not tell."""
        return EXIT_STATUS[self.verdict]


def decide(
    findings: Iterable[Finding],
    links: Sequence[LinkState],
    *,
    run: str | None = None,
    steps: int = 0,
    watched_steps: int = 0,
    gaps: Sequence[str] = (),
    policy: str | None = None,
    lock: str | None = None,
) -> Verdict:
    """The verdict on one run. gaps: what else the level claims and nobody measured, one sentence each."""
    ordered = worst_first(list(findings))
    word = _word(ordered, links, gaps)
    return Verdict(
        run=run,
        verdict=word,
        level="TIL-1",
        coverage=Coverage(
            steps=steps,
            watched_steps=watched_steps,
            detection_probability={str(fraction): 0.0 for fraction in TAMPERED_FRACTIONS},
        ),
        findings=tuple(ordered),
        reasons=_reasons(word, ordered, links, gaps, steps=steps, watched_steps=watched_steps),
        links=tuple(links),
        gaps=tuple(gaps),
        policy=policy,
        lock=lock,
    )


def _word(findings: Sequence[Finding], links: Sequence[LinkState], gaps: Sequence[str]) -> Word:
    outcomes = {finding.outcome for finding in findings}
    if "violated" in outcomes:
        return "TAINTED"
    if "suspicious" in outcomes:
        return "SUSPECT"
    if "not_checked" in outcomes or gaps or any(_blind(link) for link in links):
        return "UNKNOWN"
    return "VERIFIED"


def _blind(link: LinkState) -> bool:
    return link.required and link.state in ("blind", "broken")


def _reasons(
    word: Word,
    findings: Sequence[Finding],
    links: Sequence[LinkState],
    gaps: Sequence[str],
    *,
    steps: int,
    watched_steps: int,
) -> tuple[str, ...]:
    reasons: list[str] = []
    decisive = {"TAINTED": "violated", "SUSPECT": "suspicious", "UNKNOWN": "not_checked"}.get(word)
    checks = [finding.check for finding in findings if finding.outcome == decisive]
    if checks:
        counted = {check: checks.count(check) for check in dict.fromkeys(checks)}
        reasons.append(f"{decisive}: " + ", ".join(f"{check} ({count})" for check, count in counted.items()))
    reasons.extend(gaps)
    for link in links:
        if link.required and link.state == "blind":
            reasons.append(f"{link.link}: blind: {'; '.join(link.blind) or 'nothing was checked'}")
        if link.explained:
            reasons.append(f"{link.link}: explained by approval of {', '.join(link.explained)}; coverage is reduced")
    if word == "VERIFIED":
        reasons.append(f"every link held; {watched_steps} of {steps} steps were checked in full")
    return tuple(reasons)


def until(verdict: Verdict, step: int, *, concerns: Callable[[Finding], bool] | None = None) -> Verdict:
    """The verdict on a run's work up to and including optimizer step `step`: later findings do not reach back.

    concerns: tells of a finding with a step whether it is of that work; by default by its step alone.

    A finding without a step concerns all of the run. A link that broke later counts as held where it held before; a
    link that was blind stays blind. What a sampled check saw at a step may have begun some steps before: replay of the
    steps in between (`trainguard audit`) settles that, this function does not.
    """
    concerns = concerns or (lambda finding: finding.subject.step is None or finding.subject.step <= step)
    kept = tuple(finding for finding in verdict.findings if finding.subject.step is None or concerns(finding))
    if len(kept) == len(verdict.findings):
        return verdict
    links = tuple(msgspec.structs.replace(link, broken=0) if link.broken else link for link in verdict.links)
    word = _word(kept, links, verdict.gaps)
    reasons = _reasons(word, kept, links, verdict.gaps, steps=step, watched_steps=verdict.coverage.watched_steps)
    return msgspec.structs.replace(verdict, verdict=word, findings=kept, reasons=reasons)
