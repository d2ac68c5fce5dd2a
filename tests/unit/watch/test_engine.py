"""The step engine: which steps are checked, what they are called, and that it never gets in the way."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.helpers.recorded import SETTINGS, Recorder, recording
from tests.helpers.training import train
from torch import nn

from trainguard.watch import engine, roots, sample
from trainguard.watch.governor import Governor


def steps(recorder: Recorder) -> list[Any]:
    """Bodies of the step frames."""
    return [record.body for record in recorder.records if record.kind == "step"]


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1, width: int = 4) -> None:
    """Some updates on random input."""
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(2, width)).square().sum().backward()
        optimizer.step()


# -- the governor -------------------------------------------------------------------------------------------------


def spent(governor: Governor, *, count: int, step_ns: int, full_ns: int, idle_ns: int) -> list[int]:
    """Drive a governor through `count` steps of a steady job; which were checked."""
    checked, now = [], 0
    for index in range(1, count + 1):
        now += step_ns
        full = governor.wants(0, index, now)
        governor.spend(full_ns if full else idle_ns, step_ns, full)
        if full:
            checked.append(index)
    return checked


def test_the_first_steps_and_the_credit_are_checked_in_full() -> None:
    """20 steps always; then as long as a second of our own time lasts."""
    settings = {**SETTINGS, "links": "governed"}
    checked = spent(Governor(settings, 0), count=500, step_ns=10_000_000, full_ns=1_000_000, idle_ns=50_000)
    assert checked == list(range(1, 501))
    broke = spent(
        Governor({**settings, "credit_seconds": 0.0}, 0),
        count=500,
        step_ns=10_000_000,
        full_ns=1_000_000,
        idle_ns=50_000,
    )
    assert broke[:20] == list(range(1, 21))
    assert len(broke) < 100


def test_own_time_stays_within_the_budget_in_the_long_run() -> None:
    """1 % of wall time, whatever a check costs, as long as an unchecked step costs less than that."""
    for full_ns in (300_000, 2_000_000):
        governor = Governor({**SETTINGS, "links": "governed", "credit_seconds": 0.1}, 0)
        checked = spent(governor, count=20_000, step_ns=20_000_000, full_ns=full_ns, idle_ns=40_000)
        assert governor.own_ns <= 0.1e9 + 20 * full_ns + 0.0115 * 20_000 * 20_000_000
        assert len(checked) > 20_000 / 64


def test_an_account_that_one_step_in_sixty_four_overdraws_is_pressed() -> None:
    """At 20 ms steps it is not, at 5 ms it is, and not before the credit is gone."""
    for step_ns, pressed in ((20_000_000, False), (5_000_000, True)):
        governor = Governor({**SETTINGS, "links": "governed", "credit_seconds": 0.1}, 0)
        assert not governor.pressed
        spent(governor, count=20_000, step_ns=step_ns, full_ns=2_000_000, idle_ns=40_000)
        assert governor.pressed is pressed


def test_at_least_one_step_in_sixty_four_is_checked_and_its_place_is_secret() -> None:
    """Even where that costs more than the budget; another key, other places."""

    def places(key: str) -> list[int]:
        governor = Governor({**SETTINGS, "links": "governed", "credit_seconds": 0.0, "key": key}, 0)
        return [i for i in spent(governor, count=3000, step_ns=100_000, full_ns=1_000_000, idle_ns=50_000) if i > 500]

    first, second = places("11" * 32), places("22" * 32)
    assert 30 <= len(first) <= 50
    assert max(b - a for a, b in pairwise(first)) < 128
    assert first == places("11" * 32)
    assert first != second


def test_all_means_all() -> None:
    """--links all ignores the budget."""
    governor = Governor({**SETTINGS, "links": "all", "credit_seconds": 0.0}, 0)
    assert len(spent(governor, count=200, step_ns=1000, full_ns=10**9, idle_ns=0)) == 200


# -- steps that are not checked -----------------------------------------------------------------------------------

GOVERNED: dict[str, Any] = {"links": "governed", "credit_seconds": 0.0, "budget_percent": 0.0, "always_steps": 3}
"""Out of budget from the fourth step on: one step in 64 is checked."""


@pytest.mark.torch
def test_unchecked_steps_travel_together_and_none_is_lost() -> None:
    """Two optimizers by turns: every step has its number and index; a small part of the frames and bytes."""
    torch.set_num_threads(1)
    nets = [nn.Linear(4, 2) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    with recording(**GOVERNED) as recorder:
        for _ in range(200):
            fit(nets[0], optimizers[0])
            fit(nets[1], optimizers[1])
        for _ in range(200):
            fit(nets[0], optimizers[0])
    told = [record for record in recorder.records if record.kind == "step"]
    assert [record.step for record in told] == list(range(1, 601))
    for opt, count in ((0, 400), (1, 200)):
        assert [r.body["index"] for r in told if r.body["opt"] == opt] == list(range(1, count + 1))
    unchecked = [r for r in told if not r.body["checked"]]
    assert len(unchecked) > 500
    assert recorder.frames < len(recorder.records) / 3


@pytest.mark.torch
def test_what_moves_in_one_unchecked_step_is_told_with_that_step() -> None:
    """A rate that is changed and changed back, a new seed, a schedule's every value."""
    torch.set_num_threads(1)
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with recording(**GOVERNED) as recorder:
        for number in range(1, 101):
            optimizer.param_groups[0]["lr"] = 0.2 if number == 41 else 0.1
            if number == 77:
                torch.manual_seed(5)
            fit(net, optimizer)
    bodies = steps(recorder)
    changed = [(b["index"], b["hyperparameters"].get("changed")) for b in bodies if "hyperparameters" in b]
    assert [c for c in changed if c[1]] == [(41, [[0, "lr", 0.2]]), (42, [[0, "lr", 0.1]])]
    assert [b["index"] for b in bodies if "seeded" in b.get("rng", {}) and b["index"] > 1] == [77]

    with recording(**GOVERNED) as recorder:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        rates = []
        for _ in range(100):
            rates.append(optimizer.param_groups[0]["lr"])
            fit(net, optimizer)
            schedule.step()
    moved = [b["hyperparameters"]["changed"][0][2] for b in steps(recorder)[1:]]
    assert moved == rates[1:]
    counts = [b["hyperparameters"]["schedulers"][0][1] for b in steps(recorder)[1:]]
    assert counts == list(range(2, 101))


@pytest.mark.torch
def test_gradient_hooks_are_in_place_for_a_checked_step_that_follows_unchecked_ones() -> None:
    """And are taken off again."""
    torch.set_num_threads(1)
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with recording(**GOVERNED) as recorder:
        fit(net, optimizer, 200)
    checked = [b for b in steps(recorder) if b["checked"]]
    assert len(checked) > 4
    assert all(b["gradients"]["armed"] and b["gradients"]["calls"] == [1, 1] for b in checked[1:])
    assert [b["weights"]["held"] for b in checked[1:]] == [True] * (len(checked) - 1)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


@pytest.mark.torch
def test_an_optimizer_that_takes_over_the_weights_ends_the_glances_of_the_other() -> None:
    """What one left behind is not the last word once the other has stepped."""
    torch.set_num_threads(1)
    net = nn.Linear(4, 2)
    first, second = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    with recording(**GOVERNED) as recorder:
        fit(net, first, 30)
        for _ in range(100):
            fit(net, second)
            fit(net, first)
    assert not any(b.get("weights", {}).get("held") is False for b in steps(recorder))
    assert [r.step for r in recorder.records if r.kind == "step"] == list(range(1, 231))


# -- sampling -----------------------------------------------------------------------------------------------------


def test_places_lie_inside_the_tensor_and_reach_all_of_it() -> None:
    """Any size, any secret number."""
    reached = set()
    for number in range(0, 2**128, 2**128 // 997):
        for numel in (1, 2, 31, 32, 33, 100):
            offset, stride, count = sample.place(numel, 32, number)
            assert 0 < count <= min(32, numel)
            assert offset + stride * (count - 1) < numel
            if numel == 100:
                reached |= set(range(offset, offset + stride * count, stride))
            offset, stride, count = sample.run(numel, 8, number)
            assert stride == 1
            assert offset + count <= numel
    assert reached >= set(range(100))


@pytest.mark.torch
def test_a_blob_holds_the_values_of_any_layout_exactly() -> None:
    """Contiguous, transposed, channels last; half precision widens without loss."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for tensor in (torch.randn(7, 9).to(dtype), torch.randn(9, 7).to(dtype).t(), torch.randn(3, 21).to(dtype)):
            kind, data = sample.Gathered(torch, [sample.view(torch, tensor, (2, 3, 12))]).raw(torch)
            wide = torch.frombuffer(bytearray(data), dtype=torch.float32 if kind == "<f" else torch.float64)
            assert torch.equal(wide.to(dtype), tensor.reshape(-1)[2:38:3])


@pytest.mark.torch
def test_every_tensor_comes_up_once_in_each_round() -> None:
    """A permutation, not a lottery: 11 tensors, 4 at a time."""
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(11)])
    with recording() as recorder:
        fit(net, torch.optim.SGD(net.parameters(), lr=1e-3), 44)
    seen: dict[str, list[int]] = {}
    for body in steps(recorder):
        names = [row[0] for row in body["optimizer"]["tensors"]]
        assert len(names) == len(set(names))
        for name in names:
            seen.setdefault(name, []).append(body["index"])
    assert len(seen) == 11
    assert max(b - a for places in seen.values() for a, b in pairwise(places)) <= 2 * 3


@pytest.mark.torch
def test_two_processes_with_one_key_sample_the_same_places() -> None:
    """So that what ranks report can be averaged."""

    def places() -> list[Any]:
        return [
            (body["optimizer"]["tensors"], body["optimizer"]["at"])
            for body in (r.body for r in train(10).records if r.kind == "step")
        ]

    assert places() == places()


# -- names and roots ----------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_tensors_are_called_as_the_model_calls_them() -> None:
    """Without wrappers; `param[i]` where no module holds them."""

    class OptimizedModule(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

        def forward(self, x: torch.Tensor) -> Any:
            return self._orig_mod(x)

    with recording() as recorder:
        net = OptimizedModule(nn.Sequential(nn.Linear(4, 3)))
        loose = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([*net.parameters(), loose], lr=0.1)
        ((net(torch.randn(2, 4)) + loose).square().sum()).backward()
        optimizer.step()
    assert {row[0] for row in steps(recorder)[0]["optimizer"]["tensors"]} == {"0.weight", "0.bias", "param[2]"}
    assert any(root is net._orig_mod for root in roots.roots())


# -- the ways a step can go ---------------------------------------------------------------------------------------


@pytest.mark.torch
def test_a_closure_is_watched_to_its_end() -> None:
    """Backward runs inside step(): the gradient that counts is the one after the closure; its value is passed on."""
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with recording() as recorder:

        def closure() -> Any:
            optimizer.zero_grad()
            loss = net(torch.ones(1, 4)).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            assert optimizer.step(closure).item() > 0
    for body in steps(recorder)[1:]:
        assert body["gradients"]["calls"] == [1, 1]
        assert body["optimizer"]["grad"] == [True, True]


@pytest.mark.torch
def test_an_exception_in_the_update_reaches_the_job_and_the_next_step_is_seen() -> None:
    """A step that never ends leaves nothing behind."""
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def broken() -> float:
        raise ValueError("out of data")

    with recording() as recorder:
        fit(net, optimizer)
        with pytest.raises(ValueError, match="out of data"):
            optimizer.step(broken)
        fit(net, optimizer, 2)
    assert [body["index"] for body in steps(recorder)] == [1, 3, 4]


@pytest.mark.torch
def test_a_subclass_that_calls_its_base_makes_one_step() -> None:
    """Both step() functions carry torch's hooks; the outer one counts."""

    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    net = nn.Linear(4, 2)
    with recording() as recorder:
        fit(net, torch.optim.SGD(net.parameters(), lr=0.1))
        fit(net, Mine(net.parameters(), lr=0.1), 3)
    assert [body["index"] for body in steps(recorder)] == [1, 1, 2, 3]


@pytest.mark.torch
def test_threads_that_train_at_once_do_not_mix_their_steps() -> None:
    """Four threads, a model each."""
    torch.set_num_threads(1)
    nets = [nn.Linear(4, 2) for _ in range(4)]
    with recording() as recorder:
        threads = [
            threading.Thread(target=fit, args=(net, torch.optim.Adam(net.parameters(), lr=0.1), 20)) for net in nets
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    bodies = steps(recorder)
    assert len(bodies) == 80
    for opt in range(4):
        assert sorted(body["index"] for body in bodies if body["opt"] == opt) == list(range(1, 21))


@pytest.mark.torch
def test_a_fault_inside_the_guard_is_counted_and_the_step_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks, in whatever phase."""
    recorder = Recorder()
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    engine._engine = None
    engine.attach(recorder)  # type: ignore[arg-type]
    guard = engine._engine
    assert guard is not None
    try:
        for phase in ("before", "ready", "after"):
            (link,) = (each for each in guard.links if each.name == "optimizer")
            monkeypatch.setattr(link, phase, lambda step: 1 / 0)
        before = net.weight.detach().clone()
        fit(net, optimizer, 2)
        assert not torch.equal(before, net.weight)
        assert len(steps(recorder)) == 2
        assert set(map(type, recorder.errors)) == {ZeroDivisionError}
    finally:
        for link in guard.links:
            getattr(link, "forked", lambda: None)()
        engine._engine = None


@pytest.mark.torch
def test_nothing_is_kept_of_an_optimizer_that_is_gone() -> None:
    """A process that makes a thousand optimizers does not keep a thousand models."""
    for settings in ({}, GOVERNED):
        with recording(**settings):
            _let_go()


def _let_go() -> None:
    net = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    fit(net, optimizer, 9)
    alive = [weakref.ref(net), weakref.ref(optimizer), weakref.ref(net.weight)]
    del net, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


@pytest.mark.torch
def test_a_forked_child_counts_for_itself_and_one_that_never_steps_is_silent() -> None:
    """Loader workers are forked children too."""
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with recording() as recorder:
        fit(net, optimizer, 3)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                own = Recorder()
                engine.forked(own)  # type: ignore[arg-type]
                fit(net, optimizer, 2)
                os.write(write, repr([body["index"] for body in steps(own)]).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 100) == b"[1, 2]"
        assert len(steps(recorder)) == 3


@pytest.mark.torch
def test_global_generators_are_left_alone_and_no_hook_stays_on_a_tensor_that_is_not_sampled() -> None:
    """Python's and torch's streams stand where they stood."""
    import random

    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(1, 4)).sum().backward()
    states = random.getstate(), torch.get_rng_state()
    with recording(tensors=1):
        for _ in range(5):
            optimizer.step()
        armed = [bool(p._post_accumulate_grad_hooks) for p in net.parameters()]
    assert sum(armed) == 1
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, about its profiler
def test_a_compiled_step_is_left_as_it_is_and_shows_as_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces the hooks with the step: they vanish from it. Blind, and said to be."""
    # Undone afterwards: in a process that has compiled, link *weights* watches no interval, and later tests need one.
    monkeypatch.setattr("torch._dynamo.convert_frame.FRAME_COUNTER", 0)
    monkeypatch.setattr("torch._dynamo.eval_frame.cached_backends", {})

    def weights(guarded: bool) -> tuple[torch.Tensor, int]:
        torch.manual_seed(0)
        net = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        torch._dynamo.reset()
        update = torch.compile(optimizer.step, backend="eager")
        with recording() as recorder:
            if not guarded:
                engine._engine = None
            for _ in range(3):
                optimizer.zero_grad()
                net(torch.ones(1, 4)).square().sum().backward()
                update()
        return net.weight.detach(), len(steps(recorder))

    with_guard, seen = weights(guarded=True)
    assert seen == 0
    assert torch.equal(with_guard, weights(guarded=False)[0])
