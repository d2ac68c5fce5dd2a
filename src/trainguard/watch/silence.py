"""Do weights move while no optimizer reports a step? Looked at when a loader hands over a batch.

Who replaces `optimizer.step` by something that runs none of torch's hooks silences every link of a step. The batches go
on, and so do the weights. An evaluation, or gradient accumulation, hands over batches as well, but its weights stand
still. So after QUIET batches without a step a few elements of some weights and gradients are read at every batch; as
soon as nothing moved, at ever rarer ones.

    kind "sweep", body {"what": "silence", "batches": without a step, "moved": looks in a row at which weights had
                        moved, "gradients": whether gradients moved too}       once for every such silence

Scripts that make their batches themselves are not seen here (surface looks at the step's own function at exit).
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any, List, Optional, Tuple

from . import engine, sample
from .client import Client

QUIET = 4
"""Batches without a step that are nothing to look at."""

MOVED = 6
MOVED_WITH_GRADIENTS = 3
"""Looks in a row at which weights had moved. Averages that are put in place for an evaluation, and snapshots that are
evaluated one after the other, move them once, not with every batch."""

LONGEST = 64
TENSORS = 8
ELEMENTS = 8


class Silence:
    """What one process's loaders and steps say of each other."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.steps = 0
        self.quiet = 0
        """Batches since the last step."""
        self.due = QUIET
        """Batch at which weights are read next."""
        self.wait = 1
        self.last: Optional[Tuple[str, str]] = None
        """Digests of weights and gradients when they were read last."""
        self.moved = self.graded = 0
        self.told = False

    def batch(self) -> None:
        """A batch is handed over to the job."""
        guard = engine.current()
        if guard is None:
            return
        steps = guard.tally.steps
        if steps != self.steps:
            self.steps, self.quiet, self.due, self.wait = steps, 0, QUIET, 1
            self.last, self.moved, self.graded, self.told = None, 0, 0, False
            return
        self.quiet += 1
        if not steps or self.told or self.quiet < self.due:
            return
        self._look(guard)
        self.due = self.quiet + self.wait

    def _look(self, guard: Any) -> None:
        tracks = [track for track in guard.tracks.values() if track.ref() is not None and track.entries]
        found = _read(guard.torch, tracks[:4]) if tracks and not _compiled() else None
        if found is None:
            self.wait = LONGEST
            return
        last, self.last = self.last, found
        if last is None:
            return
        if last[0] == found[0]:
            self.moved = self.graded = 0
            self.wait = min(2 * self.wait, LONGEST)
            return
        self.wait = 1
        self.moved += 1
        self.graded += last[1] != found[1]
        if self.moved >= MOVED or self.graded >= MOVED_WITH_GRADIENTS:
            self.told = True
            body = {"what": "silence", "batches": self.quiet, "moved": self.moved, "gradients": self.graded > 0}
            self.client.send("sweep", body, self.steps)


def _read(torch: Any, tracks: List[Any]) -> Optional[Tuple[str, str]]:
    """Digests of a few elements of some weights, and of their gradients."""
    chosen = []
    for track in tracks:
        usable = [entry for entry in track.entries if entry.reason is None and not sample.shared(entry.param)]
        chosen += usable[:: max(1, len(usable) // TENSORS)][:TENSORS]
    if not chosen:
        return None
    with torch.no_grad():
        weights = [sample.plain(entry.param.detach()) for entry in chosen]
        grads = [sample.plain(entry.param.grad) for entry in chosen if entry.param.grad is not None]
        return _digest(torch, weights), _digest(torch, [g for g in grads if sample.why_not(g) is None])


def _digest(torch: Any, tensors: List[Any]) -> str:
    if not tensors:
        return ""
    views = [sample.view(torch, each, sample.place(each.numel(), ELEMENTS, 0)) for each in tensors]
    kind, data = sample.Gathered(torch, [view.float() for view in views]).raw(torch)
    return hashlib.blake2b(kind.encode() + data, digest_size=8).hexdigest()


def _compiled() -> bool:
    """A compiled step runs no hooks either; that is what the record shows by its end of steps."""
    frame = sys.modules.get("torch._dynamo.convert_frame")
    return bool(frame is not None and getattr(frame, "FRAME_COUNTER", 0))
