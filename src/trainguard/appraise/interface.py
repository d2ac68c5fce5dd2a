"""What a check is: it sees the records of one run in order and says what does not hold.

One class per check, one file per check, listed in `engine.CHECKS`. A check is a small state machine over values:
no clock, no file, no torch. It never raises for bad evidence: a body that is not as its spec says is itself a
finding (`malformed`). `end` always yields at least one LinkState, so a check that saw nothing says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from trainguard.evidence import Evidence
from trainguard.finding import Citation, Finding, LinkState, Outcome, Subject
from trainguard.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every check is given."""

    run: str
    policy: Policy
    blob: Callable[[str], bytes]
    """Content by SHA-256, verified; locks and measurements are read through it."""


class Check(Protocol):
    """A check over one run."""

    name: str

    def __init__(self, context: Context) -> None: ...

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Findings that this record makes certain. Called once per record, in spool order."""
        ...

    def end(self) -> Iterator[Finding | LinkState]:
        """Findings that only the whole run shows, and the balance of each link this check keeps."""
        ...


def cite(*records: Evidence) -> tuple[Citation, ...]:
    """Citations of records that were read from the log; records not yet sealed are left out."""
    return tuple(Citation(leaf=r.leaf, hash=r.hash) for r in records if r.leaf is not None and r.hash is not None)


def finding_from(
    check: str,
    outcome: Outcome,
    message: str,
    *records: Evidence,
    run: str,
    techniques: tuple[str, ...] = (),
    tensor: str | None = None,
    path: str | None = None,
    step: int | None = None,
    expected: str | None = None,
    found: str | None = None,
) -> Finding:
    """A finding about `records`: rank and step come from the last of them unless `step` is given.

    A step of a process without a rank is rank 0's: a job of one process.
    """
    last = records[-1] if records else None
    rank = last.rank if last else None
    if rank is None and last is not None and last.step is not None:
        rank = 0
    return Finding(
        check=check,
        outcome=outcome,
        techniques=techniques,
        subject=Subject(
            run=run,
            rank=rank,
            step=step if step is not None else (last.step if last else None),
            tensor=tensor,
            path=path,
        ),
        message=message,
        expected=expected,
        found=found,
        evidence=cite(*records),
    )
