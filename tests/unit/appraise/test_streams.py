"""The judge's own random streams, held to those of torch, numpy and Python."""

from __future__ import annotations

import itertools
import random
import struct

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from torch.utils.data._utils.worker import _generate_state

from trainguard.appraise.streams import (
    PERMUTATION_LIMIT,
    RANGE_LIMIT,
    STATE_BYTES,
    WORDS,
    Twister,
    block_digest,
    distributed_order,
    integers,
    permutation,
    random_order,
    worker_key,
)
from trainguard.watch import rng

pytestmark = pytest.mark.torch

SEEDS = (0, 1, 42, 2**31, 2**32 - 1, 2**32 + 7, 2**63 - 1)
LENGTHS = (0, 1, 2, 3, 31, 32, 33, 100, 623, 624, 625, 1000, 5000, 50_000)


def seeded(seed: int) -> torch.Generator:
    """A generator of torch."""
    return torch.Generator().manual_seed(seed)


def state_of(generator: torch.Generator) -> Twister:
    """Where `generator` stands, read as the guard reads it."""
    return Twister.from_words(*rng.torch_words(generator))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_of_torch_gives_the_same_words(seed: int) -> None:
    """64 bits a draw, past two renewals of the block."""
    ours, theirs = Twister.from_seed(seed), seeded(seed)
    expected = [int(torch.empty((), dtype=torch.int64).random_(generator=theirs)) for _ in range(700)]
    assert [ours.seed() for _ in range(700)] == expected
    assert (ours.block, ours.position) == (state_of(theirs).block, state_of(theirs).position)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_seed_of_numpy_gives_the_same_state(seed: int) -> None:
    """np.random.seed(s), and seeding with an array as loader workers do."""
    theirs = np.random.RandomState(seed)
    ours = Twister.from_seed(seed)
    assert [ours.word() for _ in range(1300)] == _words(theirs, 1300)
    key = worker_key(seed * 12345678901, 3)
    assert key == _generate_state(seed * 12345678901, 3)
    state = np.random.RandomState(key).get_state(legacy=True)
    assert Twister.from_key(key).block == int.from_bytes(np.asarray(state[1]).astype("<u4").tobytes(), "little")


def _words(state: np.random.RandomState, count: int) -> list[int]:
    return [int(w) for w in state.randint(0, 2**32, count, dtype=np.uint32)]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32, 2**64 + 5, -3])
def test_a_seed_of_python_gives_the_same_words(seed: int) -> None:
    """random.seed(n) for integers of any size."""
    theirs, ours = random.Random(seed), Twister.from_python_seed(seed)
    assert [ours.word() for _ in range(700)] == [theirs.getrandbits(32) for _ in range(700)]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_permutation_is_that_of_torch(length: int) -> None:
    """Every length, and the generator stands where torch's does afterwards."""
    for seed in (0, 3):
        ours, theirs = Twister.from_seed(seed), seeded(seed)
        assert list(permutation(ours, length)) == torch.randperm(length, generator=theirs).tolist()
        assert ours.position == state_of(theirs).position


def test_the_beginning_of_a_long_permutation_costs_little() -> None:
    """The first thousand of three million, without the rest."""
    ours = Twister.from_seed(5)
    expected = torch.randperm(3_000_000, generator=seeded(5))[:1000].tolist()
    assert list(itertools.islice(permutation(ours, 3_000_000), 1000)) == expected
    assert ours.drawn == 1000


def test_what_torch_permutes_in_another_way_is_refused() -> None:
    """Above the switch to 64 bits nothing is claimed."""
    with pytest.raises(ValueError, match="not recomputed"):
        next(permutation(Twister.from_seed(0), PERMUTATION_LIMIT))
    with pytest.raises(ValueError, match="not recomputed"):
        next(integers(Twister.from_seed(0), RANGE_LIMIT, 1))


@pytest.mark.parametrize("high", [1, 2, 1000, RANGE_LIMIT - 1])
def test_whole_numbers_are_those_of_torch(high: int) -> None:
    """Below the switch to 64 bits, its last value included."""
    expected = torch.randint(high, (100,), generator=seeded(9)).tolist()
    assert list(integers(Twister.from_seed(9), high, 100)) == expected


@pytest.mark.parametrize("length", [1, 5, 33, 700])
@pytest.mark.parametrize("samples", [1, 4, 33, 1500])
@pytest.mark.parametrize("replacement", [False, True])
def test_a_random_sampler_is_recomputed(length: int, samples: int, replacement: bool) -> None:
    """With and without replacement, fewer and more samples than there are."""
    sampler = RandomSampler(range(length), replacement=replacement, num_samples=samples, generator=seeded(1))
    ours = random_order(Twister.from_seed(1), length, replacement=replacement, samples=samples)
    assert list(ours) == list(sampler)


def test_a_random_sampler_without_generator_draws_its_seed_from_the_global_one() -> None:
    """base seed first, as the loader does, then the sampler's own."""
    torch.manual_seed(11)
    stream = Twister.from_seed(11)
    loader = torch.utils.data.DataLoader(torch.arange(100), batch_size=7, shuffle=True)  # type: ignore[arg-type]
    batches = [batch.tolist() for batch in loader]
    stream.seed()
    expected = list(permutation(Twister.from_seed(stream.seed()), 100))
    assert list(itertools.chain(*batches)) == expected


@pytest.mark.parametrize(("ranks", "length"), [(1, 10), (2, 11), (3, 10), (4, 3), (8, 3)])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_distributed_sampler_is_recomputed(ranks: int, length: int, shuffle: bool, drop_last: bool) -> None:
    """Every rank's share, padded or cut."""
    if drop_last and length < ranks:
        return
    for rank in range(ranks):
        theirs = DistributedSampler(range(length), ranks, rank, shuffle=shuffle, seed=4, drop_last=drop_last)  # type: ignore[arg-type,var-annotated]
        theirs.set_epoch(3)
        ours = distributed_order(4, 3, length, shuffle=shuffle, ranks=ranks, rank=rank, drop_last=drop_last)
        assert ours == list(theirs)


def test_subsets_and_batches_are_those_of_torch() -> None:
    """The chosen indices, permuted; then cut into batches."""
    chosen = [5, 9, 2, 40, 77]
    theirs = list(SubsetRandomSampler(chosen, generator=seeded(2)))
    assert theirs == [chosen[i] for i in permutation(Twister.from_seed(2), 5)]
    assert list(BatchSampler(SequentialSampler(range(5)), 2, False)) == [[0, 1], [2, 3], [4]]


def test_a_later_state_is_reached_and_the_draws_counted() -> None:
    """Across many blocks, and back to the same place with none."""
    theirs = seeded(0)
    stream = state_of(theirs)
    torch.rand(100_000, generator=theirs)
    now = state_of(theirs)
    assert stream.reach(block_digest(now.block), now.position, blocks=200) == 100_000
    assert stream.reach(block_digest(now.block), now.position, blocks=0) == 0


def test_a_state_before_or_beside_the_stream_is_not_reached() -> None:
    """Backwards in the same block, another seed, and past the limit: no move."""
    stream = Twister.from_seed(0)
    stream.word()
    stream.word()
    here = (stream.block, stream.position)
    assert stream.reach(block_digest(stream.block), 1, blocks=3) is None
    other = Twister.from_seed(1)
    other.word()
    assert stream.reach(block_digest(other.block), other.position, blocks=50) is None
    for _ in range(10 * WORDS):
        stream_ahead = other.word()
    assert stream_ahead >= 0
    assert (stream.block, stream.position) == here


def test_a_state_of_another_size_is_refused() -> None:
    """Neither too few bytes nor a position outside."""
    with pytest.raises(ValueError, match="expected"):
        Twister.from_words(b"\0" * (STATE_BYTES - 1), 0)
    with pytest.raises(ValueError, match="expected"):
        Twister.from_words(struct.pack(f"<{WORDS}I", *range(WORDS)), WORDS + 1)
