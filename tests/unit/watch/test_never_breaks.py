"""Nothing in a hook of ours can break or alter training: whatever fails, in whatever phase, under whatever conditions.

Every test trains twice, with and without the guard, and compares the weights bit for bit.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.helpers.recorded import Recorder
from torch import nn

from trainguard.watch import engine, gradients, links

pytestmark = pytest.mark.torch

PHASES = ("before", "ready", "after", "between")
Around = Callable[[Callable[[], None]], None]


@contextmanager
def attached(**settings: Any) -> Iterator[tuple[engine.Engine, Recorder]]:
    """An engine on a stand-in client that counts faults, as the real one does."""
    recorder = Recorder(links="governed", **settings)
    engine._engine = None
    engine.attach(recorder)  # type: ignore[arg-type]
    made = engine._engine
    assert made is not None
    try:
        yield made, recorder
    finally:
        engine._engine = None
        for link in made.links:
            getattr(link, "forked", lambda: None)()


def train(around: Around = lambda step: step(), steps: int = 4, kind: Any = torch.optim.AdamW) -> list[bytes]:
    """Bytes of the weights of a small model after some steps, each made by `around(step)`."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Dropout(0.2), nn.Linear(6, 2))
    optimizer = kind(net.parameters(), lr=1e-2)

    def step() -> None:
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    for _ in range(steps):
        around(step)
    return [parameter.detach().numpy().tobytes() for parameter in net.parameters()]


def steps_of(recorder: Recorder) -> int:
    return sum(record.kind == "step" for record in recorder.records)


@pytest.mark.parametrize("error", [MemoryError, StopIteration])
@pytest.mark.parametrize("phase", PHASES)
def test_a_link_that_fails_costs_its_own_value_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, phase: str, error: type[Exception]
) -> None:
    """Every link at once, in one phase, with any error: counted, the frames go out, the weights are the same."""

    def fail(step: Any) -> None:
        raise error("on purpose")

    with attached() as (guard, recorder):
        hurt = [link for link in guard.links if hasattr(link, phase)]
        for link in hurt:
            monkeypatch.setattr(link, phase, fail)
        weights = train()
    assert weights == train()
    assert steps_of(recorder) == 4
    assert {name for name in recorder.faults if name.endswith(phase)} == {f"link.{link.name}.{phase}" for link in hurt}


@pytest.mark.parametrize("place", ["_stamp", "sample"])
def test_a_hook_of_ours_that_fails_inside_backward_costs_that_gradient_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Before and after a gradient is written: counted, and backward goes on."""

    class Failing:
        """The real thing, until backward runs."""

        def __getattr__(self, name: str) -> Any:
            self.inside()
            return getattr(real, name)

        def __call__(self, *given: Any) -> Any:
            self.inside()
            return real(*given)

        def inside(self) -> None:
            if torch._C._current_graph_task_id() != -1:
                raise TypeError("on purpose")

    real = getattr(gradients, place)
    monkeypatch.setattr(gradients, place, Failing())
    with attached() as (_, recorder):
        weights = train()
    assert weights == train()
    assert steps_of(recorder) == 4
    assert {name for name in recorder.faults if name.startswith("gradients.")}


@pytest.mark.parametrize("place", ["track", "plan", "draw_sample", "_refresh", "_collect", "_stack", "_idle"])
def test_an_engine_that_fails_leaves_the_step_alone(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Any method of the engine itself."""

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    with attached() as (guard, recorder):
        monkeypatch.setattr(guard, place, fail)
        weights = train()
    assert weights == train()
    assert recorder.faults


@pytest.mark.parametrize("place", ["send", "fault"])
def test_a_client_that_fails_leaves_the_step_alone(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Even where the counting of faults fails itself."""

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    with attached() as (guard, recorder):
        monkeypatch.setattr(recorder, place, fail)
        monkeypatch.setattr(guard.links[0], "before", fail)
        weights = train()
    assert weights == train()


def test_a_link_that_cannot_be_made_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constructor fails; the others are there."""

    class Broken:
        name, every_step = "broken", False

        def __init__(self, client: Any) -> None:
            raise ValueError("on purpose")

    monkeypatch.setattr(links, "LINKS", (Broken, *links.LINKS))
    with attached() as (guard, recorder):
        weights = train()
    assert weights == train()
    assert "link.Broken" in recorder.faults
    assert len(guard.links) == len(links.LINKS) - 1


def test_an_interrupt_inside_a_hook_reaches_the_job_and_the_next_step_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control-C is the job's: it is not swallowed, and leaves nothing half done behind."""
    with attached() as (guard, recorder):
        real = guard.links[1].before

        def interrupt(step: Any) -> None:
            if step.number == 2:
                raise KeyboardInterrupt
            real(step)

        monkeypatch.setattr(guard.links[1], "before", interrupt)
        hits = []

        def around(step: Callable[[], None]) -> None:
            try:
                step()
            except KeyboardInterrupt:
                hits.append(1)

        train(around)
    assert hits == [1]
    assert steps_of(recorder) == 3
    assert not recorder.errors


def test_a_recursion_limit_that_the_step_just_meets_is_met_with_the_guard() -> None:
    """The guard's frames find no room; the job's own do, and must not see our error."""

    def with_room(spare: int) -> Around:
        def deep(step: Callable[[], None]) -> None:
            limit, depth = sys.getrecursionlimit(), 0
            frame: Any = sys._getframe()
            while frame is not None:
                depth, frame = depth + 1, frame.f_back
            try:
                sys.setrecursionlimit(depth + spare)
                step()
            finally:
                sys.setrecursionlimit(limit)

        return deep

    train()  # what is imported at the first use is imported now
    met = 0
    for spare in range(8, 60, 6):
        try:
            expected = train(with_room(spare), steps=2)
        except RecursionError:
            continue  # too little for the job itself
        with attached() as (_, recorder):
            assert train(with_room(spare), steps=2) == expected, spare
        met += bool(recorder.errors)
    assert met


def test_signals_that_come_inside_our_hooks_are_handled() -> None:
    """A timer every half millisecond whose handler runs Python."""
    ticks = []

    def around(step: Callable[[], None]) -> None:
        step()

    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        with attached() as (_, recorder):
            weights = train(around, steps=10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert weights == train(steps=10)
    assert ticks
    assert recorder.errors == []


def test_a_handler_that_trains_inside_our_hook_is_a_step_of_its_own() -> None:
    """Re-entered from a signal: another optimizer steps while ours is being looked at."""
    other = nn.Linear(2, 2)
    second = torch.optim.SGD(other.parameters(), lr=0.1)

    made = []

    def handler(*_: Any) -> None:
        for parameter in other.parameters():
            parameter.grad = torch.ones_like(parameter)
        second.step()
        made.append(1)

    def around(step: Callable[[], None]) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        step()

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with attached() as (_, recorder):
            weights = train(around, steps=10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert weights == train(steps=10)
    assert made
    assert recorder.errors == []


def test_a_handler_that_trains_while_we_hold_our_lock_does_not_wait_for_itself() -> None:
    """The lock that numbers steps is held for microseconds; a handler in the same thread may come in them."""
    with attached() as (guard, recorder), guard.lock:
        weights = train(steps=2)
    assert weights == train(steps=2)
    assert steps_of(recorder) == 2


def test_a_step_inside_a_step_and_a_backward_inside_a_hook_change_nothing() -> None:
    """A user's own post-hook that trains a second model."""

    def both() -> list[bytes]:
        torch.manual_seed(3)
        net, inner = nn.Linear(4, 2), nn.Linear(4, 1)
        outer, small = (
            torch.optim.AdamW(net.parameters(), lr=1e-2),
            torch.optim.SGD(inner.parameters(), lr=1e-2, momentum=0.9),
        )

        def more(*_: Any) -> None:
            small.zero_grad()
            with torch.enable_grad():
                (inner(torch.ones(2, 4)).sum() * 2).backward()
            small.step()

        outer.register_step_pre_hook(more)
        outer.register_step_post_hook(more)
        for _ in range(4):
            outer.zero_grad()
            net(torch.randn(3, 4)).sum().backward()
            outer.step()
        return [p.detach().numpy().tobytes() for p in (*net.parameters(), *inner.parameters())]

    with attached() as (_, recorder):
        weights = both()
    assert weights == both()
    assert steps_of(recorder) == 12
    assert recorder.errors == []


def test_a_fork_inside_a_hook_leaves_parent_and_child_alive() -> None:
    """A user's hook forks between our two; the child looks after itself and leaves, the parent trains on."""

    def training() -> list[bytes]:
        def fork(*_: Any) -> None:
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    engine.forked(Recorder())  # type: ignore[arg-type]
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0

        handle = sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(fork)
        try:
            return train(steps=2)
        finally:
            handle.remove()

    with attached() as (_, recorder):
        weights = training()
        assert recorder.errors == []
        assert steps_of(recorder) == 2
    assert weights == training()


def test_two_threads_on_two_optimizers_train_as_alone() -> None:
    """Each thread's weights are those it gets without the guard."""
    torch.set_num_threads(1)

    def model(seed: int, out: dict[int, bytes]) -> None:
        net = nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(seed / 7)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        for number in range(12):
            optimizer.zero_grad()
            net(torch.full((2, 4), number / 3)).square().sum().backward()
            optimizer.step()
        out[seed] = net.weight.detach().numpy().tobytes()

    def together() -> dict[int, bytes]:
        out: dict[int, bytes] = {}
        threads = [threading.Thread(target=model, args=(seed, out)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out

    with attached() as (_, recorder):
        with_guard = together()
    assert with_guard == together()
    assert recorder.errors == []


@contextmanager
def no_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def no_streams() -> Iterator[None]:
    kept = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept


@contextmanager
def no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def eager_collector() -> Iterator[None]:
    kept = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*kept)


@pytest.mark.parametrize("condition", [no_descriptors, no_streams, no_collector, eager_collector])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_poor_conditions_change_nothing(condition: Any, kind: Any) -> None:
    """No file can be opened, nothing printed, garbage never or always collected."""
    with condition(), attached():
        weights = train(kind=kind)
    assert weights == train(kind=kind)
