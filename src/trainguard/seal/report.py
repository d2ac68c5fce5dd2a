"""What sealing or verifying a checkpoint found: one frozen value, the JSON of `trainguard seal|verify --json`."""

from __future__ import annotations

from typing import Literal

import msgspec

from trainguard.finding import Finding

SCHEMA = "trainguard/seal/v1"
Status = Literal["upheld", "violated", "unknown"]

CONTENT = "content"
SIGNATURE = "signature"
SIGNER = "signer"
LOGGED = "logged"
NEWEST = "newest"


class SealReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one checkpoint."""

    schema: str = SCHEMA
    path: str
    """As it was asked for."""
    status: Status
    """upheld: is what was sealed; violated: is not; unknown: could not tell."""
    seal: str | None = None
    """The bundle's file."""
    name: str | None = None
    """What the checkpoint was called when it was sealed."""
    run: str | None = None
    step: int | None = None
    signer: str | None = None
    """Fingerprint of the key whose signature held: SHA-256 of its PEM, hex."""
    signed_by: str | None = None
    """What the trust file calls that key."""
    root: str | None = None
    """OMS root digest, SHA-256 hex: what `cosign --digest` takes."""
    dir_hash: str | None = None
    """dirHash, hex; binds file names too."""
    hash_type: str | None = None
    files: int = 0
    bytes: int = 0
    """Of all files."""
    leaf: int | None = None
    """The seal's entry in the log; the entry before it is its signature."""
    lock: str | None = None
    live: str | None = None
    """`equal` or `differs`: against the digest taken while it was saved."""
    checked: tuple[str, ...] = ()
    """Which of signature, signer (its time, by a trust file), logged, newest and content were checked and held."""
    notes: tuple[str, ...] = ()
    """What is worth knowing and no finding: later checkpoints that are gone, as retention leaves them."""
    findings: tuple[Finding, ...] = ()

    @property
    def exit_status(self) -> int:
        """0 upheld, 1 violated, 3 could not tell."""
        return {"upheld": 0, "violated": 1, "unknown": 3}[self.status]


def status_of(findings: tuple[Finding, ...], *, blocking: bool) -> Status:
    """The word for a list of findings; `blocking` when something that had to be checked was not."""
    outcomes = {finding.outcome for finding in findings}
    if "violated" in outcomes:
        return "violated"
    return "unknown" if blocking or "suspicious" in outcomes else "upheld"
