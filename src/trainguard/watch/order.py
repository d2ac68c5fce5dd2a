"""Link *order*: which samples were in the batches of every step.

Value of the link in a step frame, in checked steps, absent where no
loader of torch delivered anything since the one before:

    [[loader, epoch, batches delivered so far in this pass, chain, marks], …]

The chain is 8 bytes of BLAKE2b over the chain before (eight zero bytes at first) and the indices of one batch as 64-bit
little-endian numbers. `marks` are the first four hex digits of the chain after each batch since the line before: a
departure between two checked steps is known to the batch. What a sampler draws from is told when a pass begins (kind
`loader`, watch/loaders.py), so a judge who has no torch can draw the same order and the same chain. Batches that a
script makes itself have no indices here: they follow from the random streams (link *rng*).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import loaders
from .client import Client

if TYPE_CHECKING:
    from .engine import Step

PASSES_LIMIT = 16


class Order:
    """Says where every loader stands."""

    name = "order"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.observer = loaders.install(client)
        self.booked_ns = 0

    def before(self, step: Step) -> None:
        """Batches of this step were delivered before it."""
        observer = self.observer
        if observer is None or not observer.moved:
            return
        step.own_ns += observer.own_ns - self.booked_ns
        step.aside_ns += observer.own_ns - self.booked_ns
        self.booked_ns = observer.own_ns
        moved, observer.moved = observer.moved, {}
        lines = []
        for each in moved.values():
            marks, each.marks = each.marks, ""
            lines.append([each.loader, each.epoch, each.delivered, each.chains.get(each.delivered), marks])
        step.scratch[self.name] = lines[-PASSES_LIMIT:]

    def after(self, step: Step) -> Any:
        """What was delivered."""
        return step.scratch.get(self.name)

    def forked(self) -> None:
        """A child has loaders of its own, or none."""
        loaders.remove()
