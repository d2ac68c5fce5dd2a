"""Fingerprints of tensors: any element, any layout, any type, and the order too."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from trainguard.watch.commits import KEY_LENGTH, Commits, total, words
from trainguard.watch.warp import distance, draw

pytestmark = pytest.mark.torch


class Client:
    settings: ClassVar[dict[str, object]] = {"key": "11" * 32, "commits": True, "links": "none"}

    def send(self, *_: object) -> None:
        raise AssertionError


@pytest.fixture(scope="module")
def commits() -> Commits:
    return Commits(Client())  # type: ignore[arg-type]


def keyed(commits: Commits, tensor: torch.Tensor) -> int:
    return int(commits._keyed(torch, words(torch, tensor)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(64,), (7,), (3, 5), (1,), ()])
def test_one_bit_anywhere_changes_the_fingerprint(commits: Commits, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The keyed one and the plain sum, for lengths that are no multiple of eight bytes as well."""
    tensor = torch.arange(1, 1 + max(1, torch.Size(shape).numel())).to(dtype).reshape(shape)
    before = keyed(commits, tensor), int(total(words(torch, tensor)))
    for place in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[place * tensor.element_size()] ^= 1
        assert keyed(commits, changed) != before[0]
        assert int(total(words(torch, changed))) != before[1]


def test_the_sign_of_any_one_element_is_seen(commits: Commits) -> None:
    """The highest bit is where sums modulo a power of two are weakest: the factors are odd for that."""
    tensor = torch.randn(33, generator=torch.Generator().manual_seed(1))
    before = keyed(commits, tensor)
    for place in range(33):
        changed = tensor.clone()
        changed[place] *= -1
        assert keyed(commits, changed) != before


def test_the_keyed_fingerprint_sees_a_permutation(commits: Commits) -> None:
    """Rows swapped: the plain sum is the same."""
    tensor = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    assert int(total(words(torch, tensor))) == int(total(words(torch, tensor.flip(0).contiguous())))
    assert keyed(commits, tensor) != keyed(commits, tensor.flip(0).contiguous())


def test_blocks_of_a_long_tensor_cannot_be_swapped(commits: Commits) -> None:
    """A tensor longer than the key: each block has a factor of its own."""
    tensor = torch.randn(4 * KEY_LENGTH, generator=torch.Generator().manual_seed(3))
    first, second = tensor.chunk(2)
    assert keyed(commits, tensor) != keyed(commits, torch.cat([second, first]))


def test_another_key_gives_another_fingerprint(commits: Commits) -> None:
    """It is secret until the run's end, so no edit can be prepared that it does not see."""

    class Other(Client):
        settings: ClassVar[dict[str, object]] = Client.settings | {"key": "22" * 32}

    tensor = torch.ones(64)
    assert keyed(commits, tensor) != keyed(Commits(Other()), tensor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(9)[1:],
        torch.randn(4, 4)[:, ::2],
        torch.randn(4, dtype=torch.complex64),
        torch.empty(0),
        torch.randn(3, 3).to_sparse(),
    ],
)
def test_every_layout_has_a_fingerprint(tensor: torch.Tensor) -> None:
    """Transposed, channels last, sliced, strided, complex, empty, sparse: none raises, none changes the tensor."""
    before = tensor.clone()
    total(words(torch, tensor))
    assert torch.equal(
        before.to_dense() if before.is_sparse else before, tensor.to_dense() if before.is_sparse else tensor
    )


@pytest.mark.parametrize("count", [0, 1, 17, 623, 624, 625, 5000])
def test_a_stream_can_be_measured_and_moved(count: int) -> None:
    """How far a generator went is found from two of its states, and moving another by as much gives the same state."""
    generator = torch.Generator().manual_seed(7)
    torch.rand(5, generator=generator)
    before = generator.get_state()
    draw(torch, generator, count)
    after = generator.get_state()
    assert distance(torch, before, after) == count
    other = torch.Generator()
    other.set_state(before)
    draw(torch, other, count)
    assert torch.equal(other.get_state(), after)


def test_what_dropout_draws_is_measured() -> None:
    """The stream of a real module's call can be repeated without the module."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        torch.nn.functional.dropout(torch.ones(50, 40), 0.3)
        after = torch.get_rng_state()
        count = distance(torch, before, after)
        assert count is not None
        assert count > 0
        torch.set_rng_state(before)
        draw(torch, torch.default_generator, count)
        assert torch.equal(torch.get_rng_state(), after)
    finally:
        torch.set_rng_state(state)
