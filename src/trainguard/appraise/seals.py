"""Check *seals*: what the job saved was sealed, and what it opened is what was sealed (E3, E5, E6, E7).

The work is done as the run goes on, outside the job: the record `seal` says how a saved checkpoint was sealed, the
record `opened` what verifying a checkpoint found that the job opened and our log has a seal of.

A version that the job wrote over before it could be read has no seal, and exists no more: it does not count where a
later version of the same file was sealed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from trainguard.appraise.interface import Context, cite
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState

PATH_LIMIT = 20


class Seals:
    """See the module."""

    name = "seals"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._held = 0
        self._broken = 0
        self._unsealed: dict[str, list[str]] = {}
        """File → why versions of it have no seal, none of which was followed by one that has."""

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        if evidence.source != "supervisor" or evidence.kind not in ("seal", "opened"):
            return
        if "left_out" in evidence.body:
            return
        unsealed = evidence.body.get("unsealed")
        path = str(evidence.body.get("path"))
        if isinstance(unsealed, str):
            self._unsealed.setdefault(path, []).append(unsealed)
            return
        if evidence.kind == "seal":
            self._unsealed.pop(path, None)
        findings = [self._own(finding, evidence) for finding in _findings(evidence.body.get("findings"))]
        broken = any(finding.outcome != "not_checked" for finding in findings)
        self._broken += broken
        self._held += not findings
        yield from findings

    def end(self) -> Iterator[LinkState]:
        unsealed = [reason for reasons in self._unsealed.values() for reason in reasons]
        more = len(unsealed) - PATH_LIMIT
        blind = [*unsealed[:PATH_LIMIT], *([f"and {more} more"] if more > 0 else [])]
        # A run that saves nothing has nothing to seal, so the link is not asked for.
        yield LinkState(
            link=self.name, held=self._held, broken=self._broken, blind=tuple(blind), required=bool(unsealed)
        )

    def _own(self, finding: Finding, evidence: Evidence) -> Finding:
        subject = msgspec.structs.replace(finding.subject, run=self._run)
        return msgspec.structs.replace(finding, subject=subject, evidence=(*finding.evidence, *cite(evidence)))


def _findings(value: Any) -> tuple[Finding, ...]:
    """Findings as they were recorded; none where the record is not as its specification says."""
    try:
        return msgspec.convert(value, tuple[Finding, ...])
    except msgspec.ValidationError:
        return ()
