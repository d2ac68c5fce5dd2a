"""Why a checkpoint was not loaded. Nothing of it was imported, called or unpickled when one of these is raised.

VerificationError                (errors.py)
└── LoadRefused                  catch this one to catch them all
    ├── UnsafeCheckpoint         it runs code, hides something or is broken
    ├── UnvettedCheckpoint       it names something nobody vetted; `next_step` says how to trust it
    ├── NotWhatWasSealed         its seal is not believed, or the bytes are not those that were sealed
    ├── SealMissing              a seal was required and there is none
    └── ModuleShadowed           a module it names resolves to a file that has no business there
"""

from __future__ import annotations

from trainguard.errors import VerificationError
from trainguard.finding import Finding


class LoadRefused(VerificationError):
    """A checkpoint that was not loaded; one sentence says what was expected, what was found and where."""

    def __init__(self, message: str, *, next_step: str | None = None, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message, next_step=next_step)
        self.findings = findings
        """Everything that was found, worst first, for machines."""

    def __str__(self) -> str:
        return super().__str__() + (f"; {self.next_step}" if self.next_step else "")


class UnsafeCheckpoint(LoadRefused):
    """Loading it would run code, or two readers read it differently."""


class UnvettedCheckpoint(LoadRefused):
    """It names something on no list, or has a format nobody here reads."""


class NotWhatWasSealed(LoadRefused):
    """Its seal does not hold for these bytes."""


class SealMissing(LoadRefused):
    """A seal was asked for and there is none."""


class ModuleShadowed(LoadRefused):
    """A library it needs would be imported from somewhere else than where that library is installed."""
