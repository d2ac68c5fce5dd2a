"""What the checks of inventories share: origins, counts, approvals, and the balance of their link.

An inventory check reads the frames of kind `sweep` whose `what` is its name (spec/evidence.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import Origins, Standing, dicts, text
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

LISTED_LIMIT = 500
"""Findings of one check; past it they are only counted."""


class SweepCheck:
    """Base of the inventory checks. A subclass names itself and judges one line of an inventory."""

    name = ""

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._origins = Origins(context)
        self._held = 0
        self._broken = 0
        self._blind: dict[str, None] = {}
        self._explained: dict[str, None] = {}
        self._installed: dict[str, None] = {}
        self._steps = False
        self._clean: dict[int | None, int | None] = {}
        """Process → step of its last sweep in which nothing was found."""

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        self._origins.see(evidence)
        if evidence.source != "process":
            return
        if evidence.kind == "step":
            self._steps = True
            yield from self.step(evidence)
        elif evidence.kind == "sweep" and evidence.body.get("what") == self.name:
            yield from self._sweep(evidence)

    def step(self, evidence: Evidence) -> Iterator[Finding]:
        """Findings in a step frame."""
        yield from ()

    def line(self, evidence: Evidence, line: dict[str, Any]) -> Iterator[Finding]:
        """Findings about one line of the inventory."""
        yield from ()

    def _sweep(self, evidence: Evidence) -> Iterator[Finding]:
        checked = evidence.body.get("checked")
        before = self._broken
        lines = dicts(evidence.body.get("found")) + dicts(evidence.body.get("differ"))
        for line in lines:
            yield from self.line(evidence, line)
        if self._broken == before:
            self._held += 1 if isinstance(checked, int) and checked > 0 else 0
            self._clean[evidence.process] = evidence.step

    def end(self) -> Iterator[Finding | LinkState]:
        for problem in self._origins.problems:
            self._blind[problem] = None
        if not self._held and not self._broken:
            self._blind["no sweep was completed" if self._steps else "no optimizer step was seen"] = None
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(self._blind),
            explained=tuple(self._explained),
            installed=tuple(self._installed)[:LISTED_LIMIT],
        )

    def _since(self, evidence: Evidence) -> str:
        """Between which steps something appeared."""
        clean = self._clean.get(evidence.process)
        if clean is None:
            return f"present when first looked at, in step {evidence.step}"
        if clean == evidence.step:
            return f"appeared in step {evidence.step}"
        return f"appeared after step {clean}, seen in step {evidence.step}"

    def _finding(
        self,
        evidence: Evidence,
        outcome: Outcome,
        message: str,
        *,
        place: str | None,
        techniques: tuple[str, ...],
        expected: str | None = None,
        found: str | None = None,
    ) -> Iterator[Finding]:
        """One finding, unless the policy approves this check at this place."""
        if place is not None and self._origins.approves(self.name, place):
            self._explained[self._origins.relative(place)] = None
            return
        self._broken += 1
        if self._broken > LISTED_LIMIT:
            return
        yield finding_from(
            self.name,
            outcome,
            message,
            evidence,
            run=self._run,
            techniques=techniques,
            path=place,
            expected=expected,
            found=found,
        )


def whose(standing: Standing) -> str:
    """How a sentence names a file of this standing."""
    return {
        "library": "an installed package",
        "approved": "the approved code",
        "own": "the job's own code",
        "guard": "trainguard",
        "cache": "a code cache",
        "foreign": "a file outside the job's code and its libraries",
        "planted": "a file that is not in the lock, or not as locked or measured",
        "generated": "code without a file",
    }[standing]


def place_of(line: dict[str, Any]) -> str | None:
    """The `file:line` of an inventory line."""
    return text(line.get("origin"), 4096)
