"""Everything trainguard raises on purpose.

    TrainguardError
    ├── Misuse                  yours: a wrong call, flag or setting            exit 2
    ├── VerificationError       theirs: a signature, proof or digest is wrong   exit 1
    │   └── MalformedEvidence   theirs: bytes that are not what they claim      exit 1
    └── Unavailable             the way there: disk, socket, permission         exit 3

A message says what was expected, what was found and where; `next_step` says what to do about it.
Only `VerificationError` and its child leave a `verify_` or `parse_` function.
"""


class TrainguardError(Exception):
    """Base of the tree. `exit_status` is the process status a verb ends with (DESIGN: 0, 1, 2, 3)."""

    exit_status = 3

    def __init__(self, message: str, *, next_step: str | None = None) -> None:
        super().__init__(message)
        self.next_step = next_step
        """One sentence in the imperative, or None where there is nothing sensible to suggest."""


class Misuse(TrainguardError):
    """The caller asked for something that cannot be meant: unknown run, bad flag, wrong file kind."""

    exit_status = 2


class VerificationError(TrainguardError):
    """Evidence was checked and does not hold."""

    exit_status = 1


class MalformedEvidence(VerificationError):
    """Bytes could not be read as the format they claim, or exceed its limits."""


class Unavailable(TrainguardError):
    """The check could not be made: the file, disk, network or permission was not there."""

    exit_status = 3
