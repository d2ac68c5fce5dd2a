"""Which steps are checked in full, so that the guard's own time stays within its budget.

A token bucket: every process may first use `credit_seconds`, after that `budget_percent` of the wall time since it
began. Once the credit is gone the level rises: at level L one step in every aligned block of 2**L steps of an
optimizer is checked, at a place within the block that only the supervisor's key tells. Ranks with the same key and
level check the same steps, so what they report can be compared.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, Dict, List, Tuple

TOP_LEVEL = 6
"""At least one step in 64 is checked in full, even where that costs more than the budget."""

BAND_SECONDS = 0.05
"""The level changes when the account is this far from zero, so that it does not flutter."""


class Governor:
    """The account of one process. Times in nanoseconds; the clock is passed in."""

    def __init__(self, settings: Dict[str, Any], began_ns: int) -> None:
        self.key = bytes.fromhex(settings["key"])
        self.always = int(settings.get("always_steps", 20))
        self.everything = settings.get("links") == "all"
        self.share = float(settings.get("budget_percent", 1.0)) / 100.0
        self.credit_ns = float(settings.get("credit_seconds", 1.0)) * 1e9
        commits = float(settings.get("commit_percent", 0.4)) if settings.get("commits") is True else 0.0
        self.reserved = min(commits / 100.0, self.share / 2)
        """Part of the share that commits may take (watch/commits.py); what they leave is the links'."""
        self.began_ns = began_ns
        self.own_ns = 0
        self.level = 0
        self.in_debt = False
        self.block_of: Dict[int, Tuple[int, int, int]] = {}
        """Optimizer → (number of its present block, its level, the step of it that is checked)."""
        self.full_ns = 0.0
        """Running mean of what a checked step costs."""
        self.idle_ns = 0.0
        """Running mean of what an unchecked step costs."""
        self.wall_ns = 0.0
        """Running mean of the time between steps."""

    def spend(self, own_ns: int, wall_ns: int, full: bool, aside_ns: int = 0) -> None:
        """Book one step: our own time, time since the previous step began, and whether it was checked.

        aside_ns: further time that is no matter of whether it was.
        """
        self.own_ns += own_ns + aside_ns
        if full:
            self.full_ns += (own_ns - self.full_ns) * (0.1 if self.full_ns else 1.0)
        else:
            self.idle_ns += (own_ns - self.idle_ns) * (0.1 if self.idle_ns else 1.0)
        if wall_ns:
            self.wall_ns += (wall_ns - self.wall_ns) * (0.1 if self.wall_ns else 1.0)

    @property
    def pressed(self) -> bool:
        """Whether even one step in 64 costs more than the budget: what is not owed so often then gives way."""
        return self.in_debt and self.level == TOP_LEVEL

    def balance_ns(self, now_ns: int) -> float:
        """What may still be spent; negative when overdrawn."""
        return self.credit_ns + self.share * (now_ns - self.began_ns) - self.own_ns

    def wants(self, opt: int, index: int, now_ns: int) -> bool:
        """Whether step `index` (from 1) of optimizer `opt` is to be checked in full."""
        if self.everything or index <= self.always:
            return True
        if index & ((1 << self.level) - 1) == 0:
            self._adjust(now_ns)
        return self.chosen(opt, index)

    def block(self, index: int) -> int:
        """Number of the block that step `index` lies in at the present level; the rotation advances by it."""
        return index if self.everything or index <= self.always else index >> self.level

    def chosen(self, opt: int, index: int) -> bool:
        """Whether `index` is the one step of its block, by the key alone."""
        if self.level == 0:
            return True
        level, number = self.level, index >> self.level
        known = self.block_of.get(opt)
        if known is None or known[0] != number or known[1] != level:
            turn = self.draw(b"when", opt, level, number) % (1 << level)
            known = self.block_of[opt] = (number, level, (number << level) + turn)
        return index == known[2]

    def until(self, opt: int, index: int) -> int:
        """The first step from `index` on, which is unchecked, whose end decides anew which step is checked."""
        if self.level == 0:
            return index
        last = index | ((1 << self.level) - 1)  # of its block
        known = self.block_of.get(opt)
        if known is not None and known[1] == self.level and index < known[2] <= last:
            return known[2] - 1
        return last

    def draw(self, label: bytes, *numbers: int) -> int:
        """A secret number of 128 bits, the same in every process of the run."""
        data = label + struct.pack("<%dq" % len(numbers), *numbers)
        return int.from_bytes(hashlib.blake2b(data, key=self.key, digest_size=16).digest(), "little")

    def draws(self, label: bytes, count: int, *numbers: int) -> List[int]:
        """`count` such numbers."""
        data = label + struct.pack("<%dq" % len(numbers), *numbers)
        out: List[int] = []
        for turn in range(0, count, 4):
            block = hashlib.blake2b(data + turn.to_bytes(4, "little"), key=self.key).digest()
            out.extend(int.from_bytes(block[start : start + 16], "little") for start in (0, 16, 32, 48))
        return out[:count]

    def _adjust(self, now_ns: int) -> None:
        balance = self.balance_ns(now_ns)
        if not self.in_debt:
            if balance > 0:
                return
            self.in_debt = True
            self.level = self._affordable()
        elif balance < -BAND_SECONDS * 1e9:
            self.level = min(self.level + 1, TOP_LEVEL)
        elif balance > BAND_SECONDS * 1e9:
            self.level = max(self.level - 1, 0)

    def _affordable(self) -> int:
        spare = (self.share - self.reserved) * self.wall_ns - self.idle_ns
        level = 0
        while level < TOP_LEVEL and spare * (1 << level) < self.full_ns:
            level += 1
        return level
