"""Follows one generator of one process from reading to reading: is each state reached from the one before by drawing?

Every state of MT19937 comes after every other some day, so "reached" means: within a bounded number of draws. The bound
grows with what this generator usually draws, and one run has one account of blocks, so a judge's time is bounded too.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from trainguard.appraise.streams import STATE_BYTES, WORDS, Twister, block_digest, renewed

ACCOUNT_BLOCKS = 300_000
"""Blocks that may be renewed while one run is judged: some 190 million draws, a few seconds."""
LEAST_BLOCKS = 4_000
MOST_BLOCKS = 60_000
USUAL_TIMES = 50
"""A walk may be this many times longer than the longest before it."""
PROOF_TIMES = 10
"""A walk that was given up says something only if it was this many times longer than this generator's usual ones."""
ORIGIN_BLOCKS = 4_000
"""From a seed to the state at a beginning: weights are drawn in between."""
GUESS_BLOCKS = 8
GUESSES = (*range(128), 1234, 1337, 2020, 2021, 2022, 2023, 2024, 2025, 2026, 3407, 12345, 31337)
"""Seeds that people take; tried where a generator was seeded again and nobody says with what."""

Kind = Literal["began", "reached", "seeded", "left", "unknown", "exhausted"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one reading of a state says."""

    kind: Kind
    """began: first state seen; reached: by drawing; seeded: follows from `seed`; left: by no bounded walk; unknown:
    nothing to walk from; exhausted: the account of blocks is used up."""
    draws: int = 0
    seed: int | None = None
    limit: int = 0
    """Draws after which a walk was given up (left)."""


class Account:
    """Blocks that may still be renewed in this run."""

    def __init__(self, blocks: int = ACCOUNT_BLOCKS) -> None:
        self.left = blocks

    def spend(self, blocks: int) -> None:
        """Book a walk."""
        self.left -= blocks


class Walk:
    """One generator of one process."""

    def __init__(self, account: Account, from_seed: Callable[[int], Twister] = Twister.from_seed) -> None:
        self._account = account
        self._from_seed = from_seed
        self.stream: Twister | None = None
        self.longest = 0
        """Blocks of the longest walk that reached its end."""
        self.reached = 0
        """Walks that did."""

    def outlasts(self, limit: int, *, steps: int = 1) -> bool:
        """Whether `limit` draws are far more than this generator usually makes in so many steps.

        steps: from the reading before to this one; a guard short of time reads none in between. Ask when the run is
        over: a training whose every step draws more than a judge walks shows that only later.
        """
        times = PROOF_TIMES + 2 * (steps - 1)
        return self.reached > 0 and limit >= times * self.longest * WORDS

    def read(
        self, text: str, whole: object, seeds: Iterable[int] = (), *, beginning: bool = False, guess: bool = False
    ) -> Reading:
        """Take the state `text` (`digest.position`); whole: the block as base64, where it was sent.

        seeds: what it may have been seeded with; beginning: much may have been drawn since. guess: try the seeds that
        people take. Raises ValueError for a text or block that is malformed.
        """
        digest, position = parse_state(text)
        known = self._block(whole, digest, position)
        first = self.stream is None
        if self.stream is not None:
            if self._account.left <= 0:
                self.stream = None
                return Reading("exhausted")
            limit = self._limit()
            draws = self._reach(self.stream, digest, position, limit)
            if draws is not None:
                self.longest = max(self.longest, draws // WORDS)
                self.reached += 1
                return Reading("reached", draws)
        if self._account.left <= 0:
            return Reading("exhausted")
        blocks = ORIGIN_BLOCKS if beginning else GUESS_BLOCKS
        seed = self._origin(digest, position, list(seeds)[:4], blocks)
        if seed is None and guess:
            seed = self._guess(digest, position)
        if seed is not None:
            return Reading("seeded", seed=seed)
        self.stream = known
        if first:
            return Reading("began" if known is not None else "unknown")
        return Reading("left", limit=limit * WORDS)

    def _limit(self) -> int:
        wanted = max(LEAST_BLOCKS, USUAL_TIMES * self.longest) if self.reached else MOST_BLOCKS
        return min(wanted, MOST_BLOCKS, max(self._account.left, 0))

    def _reach(self, stream: Twister, digest: str, position: int, blocks: int) -> int | None:
        draws = stream.reach(digest, position, blocks=blocks)
        self._account.spend(blocks if draws is None else draws // WORDS)
        return draws

    def _origin(self, digest: str, position: int, seeds: Iterable[int], blocks: int) -> int | None:
        for seed in seeds:
            stream = self._from_seed(seed)
            if self._reach(stream, digest, position, min(blocks, max(self._account.left, 0))) is not None:
                self.stream = stream
                return seed
        return None

    def _guess(self, digest: str, position: int) -> int | None:
        known = _usual(self._from_seed).get(digest)
        if known is None:
            return None
        seed, block = known
        self.stream = Twister(block, position)
        return seed

    @staticmethod
    def _block(whole: object, digest: str, position: int) -> Twister | None:
        if whole is None:
            return None
        words = parse_block(whole)
        stream = Twister.from_words(words, position)
        if block_digest(stream.block) != digest:
            raise ValueError("the whole state is not the one whose digest was told")
        return stream


@functools.cache
def _usual(from_seed: Callable[[int], Twister]) -> dict[str, tuple[int, int]]:
    """Digest of a block → (seed, block), for the first blocks of the seeds that people take."""
    table: dict[str, tuple[int, int]] = {}
    for seed in GUESSES:
        block = from_seed(seed).block
        for _ in range(GUESS_BLOCKS):
            table.setdefault(block_digest(block), (seed, block))
            block = renewed(block)
    return table


def parse_state(text: object) -> tuple[str, int]:
    """Digest and position of `<16 hex>.<position>`. Raises ValueError for anything else."""
    digest, dot, position = text.partition(".") if isinstance(text, str) else ("", "", "")
    if len(digest) != 16 or not dot or not position.isdecimal() or len(position) > 3 or int(position) > WORDS:
        raise ValueError("expected 16 hex digits, a point and a position up to 624")
    return digest, int(position)


def parse_block(whole: object) -> bytes:
    """The 2496 bytes of a block in base64. Raises ValueError for anything else."""
    if not isinstance(whole, str) or len(whole) > 2 * STATE_BYTES:
        raise ValueError("expected the base64 of a generator's block")
    try:
        words = base64.b64decode(whole, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not base64") from error
    if len(words) != STATE_BYTES:
        raise ValueError(f"expected {STATE_BYTES} bytes of state, found {len(words)}")
    return words
