"""Rules: what each kind of listed name may be used for. One file per library."""

from trainguard.scan.rules.arrays import NUMPY
from trainguard.scan.rules.boosted import BOOSTED
from trainguard.scan.rules.interface import Kind, Refused
from trainguard.scan.rules.plain import PLAIN
from trainguard.scan.rules.tensors import TORCH

KINDS: dict[str, Kind] = {**PLAIN, **NUMPY, **TORCH, **BOOSTED}
"""Every kind by name, as the lists name them."""

__all__ = ["KINDS", "Kind", "Refused"]
