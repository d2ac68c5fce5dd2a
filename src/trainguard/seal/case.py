"""One verification under way: what is verified, by what, and what was found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.finding import Citation, Finding, Outcome, Subject
from trainguard.seal.bundle import Seal
from trainguard.seal.ledger import Ledger, SealLeaf
from trainguard.seal.manifest import SINGLE
from trainguard.seal.signers import Signers


@dataclass(slots=True)
class Case:
    """One verification under way."""

    path: Path
    place: Path
    public: ec.EllipticCurvePublicKey
    ledger: Ledger | None
    seal_file: Path
    others: tuple[ec.EllipticCurvePublicKey, ...] = ()
    """Further keys of the trust file: entries of the log may be by them."""
    trust: Signers | None = None
    """Who may sign and when; None where one key is trusted for good."""
    signed_by: str | None = None
    """The signer's name in it."""
    seal: Seal | None = None
    leaf: SealLeaf | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    blocking: bool = False
    files: int = 0
    bytes: int = 0

    def say(
        self,
        outcome: Outcome,
        techniques: tuple[str, ...],
        message: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        cites: tuple[Citation, ...] = (),
    ) -> None:
        """Add a finding about this checkpoint."""
        facts = self.seal.facts if self.seal is not None else None
        own = (self.leaf.citation,) if self.leaf is not None else ()
        self.findings.append(
            Finding(
                check="seal",
                outcome=outcome,
                techniques=() if outcome == "not_checked" else techniques,
                subject=Subject(
                    run=facts.run if facts else self.leaf.run if self.leaf else None,
                    step=facts.step if facts else self.leaf.step if self.leaf else None,
                    tensor=tensor,
                    path=self.place.name if file in (None, SINGLE) else f"{self.place.name}/{file}",
                ),
                message=message,
                expected=expected,
                found=found,
                evidence=cites or own,
            )
        )

    @property
    def broken(self) -> bool:
        return any(finding.outcome == "violated" for finding in self.findings)
