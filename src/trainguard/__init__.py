"""trainguard: guards PyTorch training against quiet sabotage.

For any PyTorch training run, with no change to its code, trainguard compares what is about to run with what was
approved, watches every step, vets and seals checkpoints, and keeps the evidence in a log that cannot be rewritten
unnoticed. The command line is the public surface; see README.md. From Python:

    state = trainguard.open_checkpoint("checkpoint.pt")     # vetted, verified, and then loaded: or refused
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainguard.loading import LoadRefused as LoadRefused
    from trainguard.loading import open_checkpoint as open_checkpoint

__version__ = "0.1.0"

_LOADING = ("LoadRefused", "open_checkpoint")


def __getattr__(name: str) -> Any:
    """Bring in what loads checkpoints when it is first asked for: `import trainguard` itself imports nothing."""
    if name not in _LOADING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainguard import loading

    return getattr(loading, name)
