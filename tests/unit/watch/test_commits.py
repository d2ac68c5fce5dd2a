"""Fingerprints of tensors: any element, any layout, any type, and the order too."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.helpers.recorded import recording
from torch import nn

from trainguard.watch.commits import EVERYTHING, KEY_LENGTH, LEAN, NOTHING, Commits, total, words
from trainguard.watch.engine import NEVER, Still, Tally
from trainguard.watch.governor import Governor
from trainguard.watch.loaders import ONE_IN, Observer
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


# -- the budget -------------------------------------------------------------------------------------------------------


class Governed(Client):
    settings: ClassVar[dict[str, object]] = Client.settings | {"links": "governed", "commit_percent": 0.4}


def test_steps_between_two_commits_are_taken_at_a_glance() -> None:
    """Until the one before the next that commits, which must be asked about before its update."""
    commits = Commits(Governed())  # type: ignore[arg-type]
    commits.tally = Tally()
    commits.full_level, commits.lean_level = 9, 4
    for count, until in ((20, 31), (32, 47), (46, 47), (511, None), (47, None), (4, None)):
        still, track = Still(), types.SimpleNamespace(count=count, opt=0)
        assert commits.still(track, None, still) is (until is not None)  # type: ignore[arg-type]
        assert still.until == (until or NEVER)
    shares = [commits._share(index, 0) for index in (20, 21, 48, 512)]
    assert shares == [EVERYTHING, NOTHING, LEAN, EVERYTHING]


def test_a_step_that_is_due_for_a_point_is_not_taken_at_a_glance() -> None:
    """Points are written where the links are asked."""
    commits = Commits(Governed())  # type: ignore[arg-type]
    commits.tally, commits.full_level, commits.lean_level = Tally(), 9, 6
    commits.tally.steps = 25
    commits.points.folder, commits.points.every = "somewhere", 10
    still = Still()
    assert commits.still(types.SimpleNamespace(count=25, opt=0), None, still)  # type: ignore[arg-type]
    assert still.until == 30


def test_a_script_of_many_optimizers_is_not_committed_to_for_ever() -> None:
    """The first steps of the first optimizers commit to everything; those of a thousandth do not."""
    commits = Commits(Governed())  # type: ignore[arg-type]
    commits.full_level, commits.lean_level = 9, 6
    assert [commits._share(3, opt) for opt in (0, 7, 8, 1000)] == [EVERYTHING, EVERYTHING, NOTHING, NOTHING]


def test_commits_and_checks_are_paid_from_one_account() -> None:
    """What commits take the checks do not get; and commits never take more than half."""
    settings: dict[str, Any] = {"key": "11" * 32, "credit_seconds": 0.0, "budget_percent": 1.0}
    governor = Governor(settings, 0)
    governor.spend(1_000, 10**6, False, 8_000)
    assert governor.balance_ns(10**6) == 10_000 - 9_000
    assert governor.idle_ns == 1_000
    assert Governor(settings | {"commits": True}, 0).reserved == 0.004
    greedy = settings | {"commits": True, "commit_percent": 5.0}
    assert Governor(greedy, 0).reserved == 0.005

    class Greedy(Client):
        settings: ClassVar[dict[str, object]] = {**greedy}

    assert Commits(Greedy()).percent == 0.5  # type: ignore[arg-type]


def test_of_later_passes_one_batch_in_sixteen_is_looked_at_while_the_account_has_room() -> None:
    """Another one in every pass, also where a pass is only some batches long; the first passes as before."""
    observer = Observer(Governed())  # type: ignore[arg-type]
    observer.before = 0  # passes of other tests in this process
    observer.passes = 1
    assert all(observer.looks(task, 7) for task in range(12))
    observer.passes = 100
    looked = [task for task in range(ONE_IN * 20) if observer.looks(task, 7)]
    assert [task // ONE_IN for task in looked] == list(range(20))
    firsts = {next((task for task in range(ONE_IN) if observer.looks(task, base)), None) for base in range(200)}
    assert firsts == set(range(ONE_IN))
    observer.own_ns = 10**12
    assert not any(observer.looks(task, 7) for task in range(200))


def test_a_skeleton_without_values_is_no_part_of_a_point(tmp_path: Path) -> None:
    """A module on the meta device, as ensembles by function transforms use it."""
    with recording(commits=True, points=str(tmp_path), points_every=2) as recorder:
        net, skeleton = nn.Linear(4, 2), nn.Linear(4, 2).to("meta")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            net(torch.ones(3, 4)).sum().backward()
            optimizer.step()
    assert skeleton.weight.is_meta
    assert [record.body for record in recorder.records if record.kind == "note"] == []
    points = [record.body for record in recorder.records if record.kind == "point"]
    assert len(points) == 2
    assert all("name" in point for point in points)
