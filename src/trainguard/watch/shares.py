"""Where there are other ranks: what this rank gave to the reduction, and what it got back, at some secret places.

Part of link *commits* (spec/replay.md, "Ranks"). A rank that scales or turns its part leaves all ranks with the same
wrong gradient, so fingerprints of that cannot name it. Samples can: reduction is linear, and a replay knows what every
rank should have given.

The own gradient is read right after backward has added to `.grad`: before DistributedDataParallel's reducer, which
comes later at the same node, and before anything the script does by hand. Nothing is written to.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Tuple

from . import sample

if TYPE_CHECKING:
    from .engine import Entry

ELEMENTS = 512
"""Elements a step, of all tensors together."""

EACH_LIMIT = 64
"""Elements of one tensor; what is needed to solve for the shares of all ranks is twice their number and some."""


def world(torch: Any) -> Tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where there are no others."""
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return int(distributed.get_rank()), int(distributed.get_world_size())


class Shares:
    """Samples of one optimizer's gradients, before and after the ranks' are reduced to one."""

    def __init__(
        self, torch: Any, entries: List[Entry], ranks: int, seed: bytes, wanted: Callable[[], bool], fault: Any
    ) -> None:
        self.torch = torch
        self.wanted = wanted
        self.fault = fault
        self.chosen = _chosen(entries, ranks, seed)
        """The same on every rank that has the same tensors."""
        self.own: List[Any] = [None] * len(self.chosen)
        self.own_ns = 0
        """Time spent within backward, not booked yet."""
        self.handles = [self._arm(number, entry) for number, (entry, _) in enumerate(self.chosen)]

    @property
    def told(self) -> List[List[int]]:
        """[position of a tensor among the optimizer's, elements] for each that is sampled."""
        return [[entry.position, where[2]] for entry, where in self.chosen]

    def _arm(self, number: int, entry: Entry) -> Any:
        if not entry.param.requires_grad or not entry.param.is_leaf:
            return None

        def copy(param: Any) -> None:
            try:
                if self.wanted():
                    start = time.thread_time_ns()
                    self.own[number] = self._read(param, number)
                    self.own_ns += time.thread_time_ns() - start
            except Exception as error:
                self.fault("shares.copy", error)

        return entry.param.register_post_accumulate_grad_hook(copy)

    def _read(self, param: Any, number: int) -> Any:
        grad = param.grad
        if grad is None or sample.why_not(grad) is not None:
            return None
        with self.torch.no_grad():
            plain = sample.plain(grad)
            return sample.view(self.torch, plain, self.chosen[number][1]).to(self.torch.float32, copy=True)

    def take(self, value: Dict[str, Any]) -> None:
        """Say both, before the update. What the reduction gave is read now."""
        own, self.own = self.own, [None] * len(self.chosen)
        if not any(each is not None for each in own):
            return
        value["own"] = self._text(own)
        value["got"] = self._text([self._read(entry.param, number) for number, (entry, _) in enumerate(self.chosen)])

    def _text(self, values: List[Any]) -> str:
        """Little-endian float32, base64; not-a-number where there is no gradient."""
        torch = self.torch
        nothing = float("nan")
        filled = [
            torch.full((where[2],), nothing) if value is None or value.numel() != where[2] else value.cpu()
            for value, (_, where) in zip(values, self.chosen)
        ]
        flat = torch.cat(filled)
        return base64.b64encode(ctypes.string_at(flat.data_ptr(), 4 * flat.numel())).decode("ascii")

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            if handle is not None:
                handle.remove()
        self.handles = []


def _chosen(entries: List[Entry], ranks: int, seed: bytes) -> List[Tuple[Entry, sample.Place]]:
    """Tensors and places, secret and the same in every step."""
    whole = (entry for entry in entries if not hasattr(entry.param, "to_local"))  # a shard is reduced when it gets here
    usable = [entry for entry in whole if entry.reason is None]
    each = min(2 * ranks + 4, EACH_LIMIT)
    drawn = sorted(usable, key=lambda entry: _number(seed, b"tensor", entry.position))[: max(1, ELEMENTS // each)]
    drawn.sort(key=lambda entry: entry.position)
    return [(e, sample.place(e.numel, min(each, e.numel), _number(seed, b"place", e.position))) for e in drawn]


def _number(seed: bytes, label: bytes, position: int) -> int:
    text = b"%s %d" % (label, position)
    return int.from_bytes(hashlib.blake2b(text, key=seed[:64], digest_size=16).digest(), "little")
