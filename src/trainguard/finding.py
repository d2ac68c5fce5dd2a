"""What a judge may say: findings, and how each link of a run ended.

A `Finding` is a claim with its evidence. A `LinkState` is the balance of one link over a whole run: how often it
held, how often it broke, why it was blind, which oddities an approval explains. Blind is never held: a link
nobody looked at has `held == 0` and a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Outcome = Literal["violated", "suspicious", "not_checked"]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What a finding is about. Fields that do not apply are None (they are printed as null)."""

    run: str | None = None
    """Run id."""
    rank: int | None = None
    """Rank in the job; 0 for a single process."""
    step: int | None = None
    """Optimizer step, counted from 1; None before the first step."""
    tensor: str | None = None
    """Parameter name as `named_parameters` gives it, or `param[i]` where no module names it."""
    path: str | None = None
    """File, or `file:line`, the finding points at."""


class Citation(msgspec.Struct, frozen=True, kw_only=True):
    """One log leaf a finding rests on."""

    leaf: int
    """Index of the leaf in the transparency log."""
    hash: str
    """SHA-256 of the spool line (for evidence inside a segment) or of the leaf's entry, hex."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that does not hold, looks wrong, or could not be checked."""

    check: str
    """Name of the check, the same in watch/, appraise/ and docs/checks/."""
    outcome: Outcome
    """violated: proved; suspicious: cause open; not_checked: `message` gives the reason."""
    techniques: tuple[str, ...] = ()
    """Ids of the threat catalogue, most likely first; empty for not_checked."""
    subject: Subject = Subject()
    message: str
    """One sentence: what was seen, where. Names hosts, processes and accounts, never a person."""
    expected: str | None = None
    found: str | None = None
    evidence: tuple[Citation, ...] = ()


class LinkState(msgspec.Struct, frozen=True, kw_only=True):
    """How one link of a run ended."""

    link: str
    held: int = 0
    """Checks that were made and held."""
    broken: int = 0
    """Checks that were made and failed."""
    blind: tuple[str, ...] = ()
    """Why (part of) the link could not be checked; empty when all of it was."""
    explained: tuple[str, ...] = ()
    """Approved `file:line` entries that account for departures; coverage is reduced by them."""
    installed: tuple[str, ...] = ()
    """What installed packages put in the place of other code, `name: file:line`. Their files are verified, so this is
    no departure; it is told so that somebody can look."""
    required: bool = True
    """Whether VERIFIED needs this link to have held at least once (False: extra, or not part of this run)."""

    @property
    def state(self) -> Literal["broken", "blind", "explained", "held"]:
        """The one word shown: broken outweighs blind, blind outweighs explained, explained outweighs held."""
        if self.broken:
            return "broken"
        if self.blind or (self.required and not self.held and not self.explained):
            return "blind"
        return "explained" if self.explained else "held"


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Findings in reading order: violated, suspicious, not_checked; within each by step, then rank."""
    order = {"violated": 0, "suspicious": 1, "not_checked": 2}
    return sorted(
        findings,
        key=lambda f: (
            order[f.outcome],
            f.subject.step if f.subject.step is not None else -1,
            f.subject.rank or 0,
            f.check,
        ),
    )
