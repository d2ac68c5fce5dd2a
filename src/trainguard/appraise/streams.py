"""The random streams of torch, numpy and Python, recomputed without any of them.

All three draw from one generator, MT19937 (Matsumoto and Nishimura 1998): 624 words of 32 bits that are renewed as a
block, and a position in the block. From a seed the whole stream follows, so a judge that holds one state can say which
states come later, and which orders a sampler of torch can have drawn from it.

    stream = Twister.from_seed(0)                     # torch.manual_seed(0)
    stream.reach(digest, position, blocks=1000)       # how many draws lie between; None: not within 1000 blocks
    permutation(stream, 50_000)                       # what torch.randperm(50_000) yields, lazily

A block of 624 words is held as one integer, so that renewing it takes about fifteen operations on integers of 2496
bytes: some 50 million draws a second can be walked through. What a draw means is that of torch's CPU generator
(at::CPUGeneratorImpl) and is held to torch itself by the tests.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

WORDS = 624
MIDDLE = 397
STATE_BYTES = 4 * WORDS
TWIST = 0x9908B0DF
PERMUTATION_LIMIT = 0xFFFFFFFF // 20
"""From here on torch.randperm draws 64 bits an element and fills its result from the end: not recomputed."""
RANGE_LIMIT = 1 << 28
"""From here on torch.randint draws 64 bits an element (2**32 in old versions): not recomputed."""


def _lanes(value: int, count: int = WORDS) -> int:
    return int.from_bytes(struct.pack("<I", value) * count, "little")


def _mask(count: int) -> int:
    return (1 << (32 * count)) - 1


_UPPER, _LOWER, _ONES = _lanes(0x80000000), _lanes(0x7FFFFFFF), _lanes(1)
_FIRST, _ALL_BUT_LAST = _mask(WORDS - MIDDLE), _mask(WORDS - 1)
_STRIDE = 32 * (WORDS - MIDDLE)


def renewed(block: int) -> int:
    """The next block of 624 words; lane i of the integer is word i."""
    mixed = ((block & _UPPER) | ((block >> 32) & _LOWER)) & _ALL_BUT_LAST
    turned = ((mixed >> 1) & _LOWER) ^ ((mixed & _ONES) * TWIST)
    first = (block >> (32 * MIDDLE)) ^ (turned & _FIRST)
    second = first ^ ((turned >> _STRIDE) & _FIRST)
    third = second ^ (turned >> (2 * _STRIDE))
    rest = WORDS - 1 - 2 * (WORDS - MIDDLE)
    new = first | (second << _STRIDE) | ((third & _mask(rest)) << (2 * _STRIDE))
    last = ((block >> (32 * (WORDS - 1))) & 0x80000000) | (new & 0x7FFFFFFF)
    word = ((new >> (32 * (MIDDLE - 1))) & 0xFFFFFFFF) ^ (last >> 1) ^ ((last & 1) * TWIST)
    return new | (word << (32 * (WORDS - 1)))


def block_digest(block: int) -> str:
    """8 bytes of BLAKE2b over the 2496 bytes of a block, hex: what a step frame says of it."""
    return hashlib.blake2b(block.to_bytes(STATE_BYTES, "little"), digest_size=8).hexdigest()


class Twister:
    """One MT19937 stream at some position. `drawn` counts the words that it has moved since it was made."""

    __slots__ = ("_words", "block", "drawn", "position")

    def __init__(self, block: int, position: int) -> None:
        self.block = block
        self.position = position
        """Index of the next word; 624 when the block is used up."""
        self.drawn = 0
        self._words: tuple[int, ...] | None = None

    # -- making -----------------------------------------------------------------------------------------------

    @classmethod
    def from_words(cls, words: bytes, position: int) -> Twister:
        """From the 2496 little-endian bytes of a state. Raises ValueError for another length or position."""
        if len(words) != STATE_BYTES or not 0 <= position <= WORDS:
            raise ValueError(
                f"expected {STATE_BYTES} bytes and a position up to {WORDS}, found {len(words)}, {position}"
            )
        return cls(int.from_bytes(words, "little"), position)

    @classmethod
    def from_seed(cls, seed: int) -> Twister:
        """After torch.manual_seed(seed) or numpy.random.seed(seed): both use the low 32 bits."""
        return cls.from_words(struct.pack(f"<{WORDS}I", *_seeded(seed & 0xFFFFFFFF)), WORDS)

    @classmethod
    def from_key(cls, key: Sequence[int]) -> Twister:
        """After numpy.random.seed(array of 32-bit numbers)."""
        words = _seeded(19650218)
        i, j = 1, 0
        for _ in range(max(WORDS, len(key))):
            words[i] = ((words[i] ^ ((words[i - 1] ^ (words[i - 1] >> 30)) * 1664525)) + key[j] + j) & 0xFFFFFFFF
            i, j = i + 1, (j + 1) % len(key)
            if i == WORDS:
                words[0], i = words[WORDS - 1], 1
        for _ in range(WORDS - 1):
            words[i] = ((words[i] ^ ((words[i - 1] ^ (words[i - 1] >> 30)) * 1566083941)) - i) & 0xFFFFFFFF
            i += 1
            if i == WORDS:
                words[0], i = words[WORDS - 1], 1
        words[0] = 0x80000000
        return cls.from_words(struct.pack(f"<{WORDS}I", *words), WORDS)

    @classmethod
    def from_python_seed(cls, seed: int) -> Twister:
        """After random.seed(seed) with an integer."""
        size = max(1, (abs(seed).bit_length() + 31) // 32)
        return cls.from_key([(abs(seed) >> (32 * i)) & 0xFFFFFFFF for i in range(size)])

    def copy(self) -> Twister:
        """An independent stream at the same place."""
        return Twister(self.block, self.position)

    # -- moving -----------------------------------------------------------------------------------------------

    def reach(self, digest: str, position: int, *, blocks: int) -> int | None:
        """Move forward to the first state with this digest and position; the draws between, or None and no move.

        Renews the block at most `blocks` times. The state that is left may be this one (0 draws).
        """
        block = self.block
        for turn in range(blocks + 1):
            if block_digest(block) == digest and (turn or position >= self.position):
                draws = turn * WORDS + position - self.position
                self.block, self.position, self._words = block, position, None
                self.drawn += draws
                return draws
            if turn < blocks:
                block = renewed(block)
        return None

    def word(self) -> int:
        """The next 32 bits."""
        if self.position >= WORDS:
            self.block, self.position, self._words = renewed(self.block), 0, None
        if self._words is None:
            self._words = struct.unpack(f"<{WORDS}I", self.block.to_bytes(STATE_BYTES, "little"))
        y = self._words[self.position]
        self.position += 1
        self.drawn += 1
        y ^= y >> 11
        y ^= (y << 7) & 0x9D2C5680
        y ^= (y << 15) & 0xEFC60000
        return y ^ (y >> 18)

    def double_word(self) -> int:
        """The next 64 bits, as at::CPUGeneratorImpl::random64: the first word is the upper half."""
        return self.word() << 32 | self.word()

    def seed(self) -> int:
        """What `torch.empty((), dtype=torch.int64).random_()` gives: loaders and samplers draw their seeds so."""
        return self.double_word() & 0x7FFFFFFFFFFFFFFF


def _seeded(seed: int) -> list[int]:
    words = [seed]
    for i in range(1, WORDS):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + i) & 0xFFFFFFFF)
    return words


# -- what samplers draw -------------------------------------------------------------------------------------------


def permutation(stream: Twister, length: int) -> Iterator[int]:
    """What torch.randperm(length) yields on the CPU, one by one; the stream moves one word for each but the last.

    Only places that were touched are held, so the first k of a long permutation cost k. Raises ValueError for a length
    that torch permutes in another way.
    """
    if not 0 <= length < PERMUTATION_LIMIT:
        raise ValueError(f"a permutation of {length} is not recomputed; limit {PERMUTATION_LIMIT}")
    moved: dict[int, int] = {}
    for i in range(length - 1):
        other = i + stream.word() % (length - i)
        here = moved.pop(i, i)
        if other == i:
            yield here
        else:
            yield moved.get(other, other)
            moved[other] = here
    if length:
        yield moved.get(length - 1, length - 1)


def integers(stream: Twister, high: int, count: int) -> Iterator[int]:
    """What torch.randint(high, (count,)) yields. Raises ValueError for a range that draws 64 bits."""
    if not 0 < high < RANGE_LIMIT:
        raise ValueError(f"numbers below {high} are not recomputed; limit {RANGE_LIMIT}")
    for _ in range(count):
        yield stream.word() % high


def random_order(stream: Twister, length: int, *, replacement: bool, samples: int) -> Iterator[int]:
    """What torch's RandomSampler yields from a generator that stands at `stream`."""
    if replacement:
        yield from integers(stream, length, samples)
        return
    for _ in range(samples // length):
        yield from permutation(stream, length)
    rest = samples % length
    for number, index in enumerate(permutation(stream, length) if rest else ()):
        if number == rest:
            return
        yield index


def distributed_order(
    seed: int, epoch: int, length: int, *, shuffle: bool, ranks: int, rank: int, drop_last: bool
) -> list[int]:
    """What torch's DistributedSampler yields on one rank."""
    order = list(permutation(Twister.from_seed(seed + epoch), length) if shuffle else range(length))
    share = length // ranks if drop_last else -(-length // ranks)
    total = share * ranks
    if drop_last:
        return order[:total][rank:total:ranks]
    while order and len(order) < total:
        order += order[: total - len(order)]
    return order[rank:total:ranks]


def worker_key(base_seed: int, worker: int) -> list[int]:
    """The four numbers that torch seeds numpy with in worker `worker` of a loader (NumPy's SeedSequence)."""
    constant = 0x43B0D7E5

    def hashed(value: int) -> int:
        nonlocal constant
        value = (value ^ constant) & 0xFFFFFFFF
        constant = (constant * 0x931E8875) & 0xFFFFFFFF
        value = (value * constant) & 0xFFFFFFFF
        return value ^ (value >> 16)

    def mixed(x: int, y: int) -> int:
        value = (0xCA01F9DD * x - 0x4973F715 * y) & 0xFFFFFFFF
        return value ^ (value >> 16)

    pool = [hashed(value) for value in (worker, base_seed & 0xFFFFFFFF, base_seed >> 32, 0)]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    constant, out = 0x8B51F9DD, []
    for value in pool:
        value = (value ^ constant) & 0xFFFFFFFF
        constant = (constant * 0x58F38DED) & 0xFFFFFFFF
        value = (value * constant) & 0xFFFFFFFF
        out.append(value ^ (value >> 16))
    return out
