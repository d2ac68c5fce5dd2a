"""Trials of causes without processes: a small training made anew for every trial, with acts at one of its steps."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from tests.helpers.recorded import Recorder, recording

from trainguard.evidence import unfold
from trainguard.replay.committed import Account
from trainguard.watch import acts, engine

Training = Callable[[Callable[[int], None]], None]
"""Given what to call when a step is over; makes all its steps."""

PATCHED = (
    ("torch.nn", "Module.__call__"),
    ("torch.autograd", "backward"),
    ("torch._VF", "dropout"),
    ("torch._VF", "dropout_"),
    ("torch.nn.functional", "scaled_dot_product_attention"),
    ("torch.nn.utils.clip_grad", "_clip_grads_with_norm_"),
    ("torch.nn.utils.clip_grad", "clip_grad_value_"),
    ("torch.nn.utils.clip_grad", "_get_total_norm"),
    ("torch.utils.data.dataloader", "_BaseDataLoaderIter.__next__"),
    *acts.LOSSES,
)


class Enough(Exception):
    """The step that was wanted is over."""


class Explorer:
    """What acts.Stage needs of a replayed process."""

    def __init__(self) -> None:
        self.warp = self
        self.torch = torch

    @property
    def engine(self) -> Any:
        return engine.current()


class Trial:
    """See replay.explain.Tried."""

    def __init__(self, account: Account, facts: Mapping[str, Any], failure: str = "") -> None:
        self.account, self.facts, self.failure = account, facts, failure


class Bench:
    """See replay.explain.Bench: `training` is run from its first step for every trial and every question."""

    def __init__(self, training: Training, step: int) -> None:
        self.training = training
        self.step = step
        self.trials = 0

    def attempt(self, acts: Sequence[Mapping[str, Any]], until: int) -> Trial:
        self.trials += 1
        with patched(), recording(commits=True, links="none") as recorder:
            stage = _stage(self.step)
            try:
                self.training(self._at(stage, lambda: stage.perform([dict(act) for act in acts], self.step), until))
            except Enough:
                pass
            except Exception as error:
                return Trial(Account(), {}, str(error))
            facts = stage.facts()
        return Trial(taken(recorder), facts)

    def ask(self, what: str, **details: Any) -> Any:
        found: list[Any] = []
        with patched(), recording(commits=True, links="none"):
            stage = _stage(self.step)

            def look() -> None:
                found.append(acts.solve(stage, {"what": what, **details}))
                raise Enough

            with suppress(Enough):
                self.training(self._at(stage, look, self.step))
        return found[0]

    def _at(self, stage: acts.Stage, act: Callable[[], None], until: int) -> Callable[[int], None]:
        def over(done: int) -> None:
            stage.keep()
            if done == self.step - 1:
                act()
            if done >= until:
                raise Enough

        return over


def _stage(step: int) -> acts.Stage:
    stage = acts.Stage(torch, Explorer())
    stage.listen(max(0, step - acts.REMEMBERED))
    return stage


def account(training: Training) -> Account:
    """What a training commits to."""
    with recording(commits=True, links="none") as recorder:
        training(lambda _done: None)
    return taken(recorder)


def taken(recorder: Recorder) -> Account:
    """The steps among what was recorded."""
    found = Account()
    for record in (each for folded in recorder.records for each in unfold(folded)):
        if record.kind == "step":
            found.take(record.step, record.body)
    return found


@contextmanager
def patched() -> Iterator[None]:
    """Everything that acts stand in for is as it was afterwards."""
    optimizer: Any = sys.modules["torch.optim.optimizer"]
    hooks = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    kept_hooks = [dict(each) for each in hooks]
    kept = []
    for owner, name in PATCHED:
        holder: Any = sys.modules.get(owner) or _import(owner)
        *path, last = name.split(".")
        for part in path:
            holder = getattr(holder, part)
        if hasattr(holder, last):
            kept.append((holder, last, getattr(holder, last)))
    flags = torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled
    try:
        yield
    finally:
        for holder, last, value in kept:
            setattr(holder, last, value)
        for each, known in zip(hooks, kept_hooks, strict=True):
            each.clear()
            each.update(known)
        torch.set_float32_matmul_precision(flags[0])
        torch.backends.mkldnn.enabled = flags[1]  # type: ignore[assignment]
        torch.set_flush_denormal(False)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return getattr(torch._C, name.rpartition(".")[2])
