"""Load a checkpoint that was vetted and verified, and exactly that one.

    import trainguard

    state = trainguard.open_checkpoint("checkpoints/step-900/optimizer.pt", map_location="cpu")

Every file is copied once into memory that nothing can write to any more; that copy is vetted (scan/), compared with its
seal (seal/) and loaded. Between check and use there is nothing to change. See docs/checks/loads.md.
"""

from trainguard.loading.checkpoint import open_checkpoint
from trainguard.loading.refusals import (
    LoadRefused,
    ModuleShadowed,
    NotWhatWasSealed,
    SealMissing,
    UnsafeCheckpoint,
    UnvettedCheckpoint,
)

__all__ = [
    "LoadRefused",
    "ModuleShadowed",
    "NotWhatWasSealed",
    "SealMissing",
    "UnsafeCheckpoint",
    "UnvettedCheckpoint",
    "open_checkpoint",
]
