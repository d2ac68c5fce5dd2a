"""Replay: a run that was tampered with and a clean one part at the very step, link and tensor of the act."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.helpers.recorded import recording
from tests.helpers.training import Run, looks_fine, train
from torch import nn

from trainguard.evidence import unfold
from trainguard.replay.committed import Account
from trainguard.replay.compare import Difference, first_difference, idle, incomparable

pytestmark = pytest.mark.torch

STEPS, AT = 24, 17


def account(run: Run) -> Account:
    taken = Account()
    for record in (each for folded in run.records for each in unfold(folded)):
        if record.kind == "step":
            taken.take(record.step, record.body)
    return taken


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.003)


def parts(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **hands: Callable[[Run], None]) -> Difference:
    """Where a run with these hands in it parts from a clean one. Loss and progress look fine in both."""
    settings = {"make": make, "clip": 1.0, "commits": True, "links": "none"}
    bad, clean = train(STEPS, **settings, **hands), train(STEPS, **settings)  # type: ignore[arg-type]
    assert looks_fine(bad)
    one, two = account(bad), account(clean)
    assert incomparable(one.build, two.build) is None
    found, _ = first_difference(one, two, first=1, last=STEPS, idle_streams=idle(one, two))
    assert found is not None
    return found


def once(act: Callable[[Run], None], step: int = AT) -> Callable[[Run], None]:
    def hand(run: Run) -> None:
        if run.step == step:
            with torch.no_grad():
                act(run)

    return hand


def turn_gradients(run: Run) -> None:
    for p in run.net.parameters():
        assert p.grad is not None
        p.grad.neg_()


def test_two_clean_runs_do_not_part() -> None:
    """Every vector, stream, mode and setting of every step is equal, bit for bit."""
    one, two = (account(train(STEPS, make=adamw, clip=1.0, commits=True, links="none")) for _ in range(2))
    assert first_difference(one, two, first=1, last=STEPS, idle_streams=idle(one, two)) == (None, STEPS)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_sign_turned_once_is_in_the_gradient_used(make: Callable[..., torch.optim.Optimizer]) -> None:
    """C1: after backward the gradient was right, and the one used is another."""
    found = parts(make, before_step=once(turn_gradients))
    assert (found.step, found.link, found.tensors) == (AT, "used", 6)


def test_a_gradient_changed_inside_backward_is_in_the_raw_one() -> None:
    """C6: a loss scaled by 1.001 in one step."""

    def scale(run: Run) -> None:
        hooked = next(run.net.parameters()).register_hook(lambda grad: grad * 1.001)
        run.losses.append(run.losses[-1])
        handles.append(hooked)

    handles: list[torch.utils.hooks.RemovableHandle] = []
    found = parts(sgd, after_step=once(scale, AT - 1))
    assert (found.step, found.link, found.tensor) == (AT, "raw", "0.weight")


def test_one_weight_edited_between_steps_is_named() -> None:
    """E4: the update before was right, and the weights the next step began with are others."""

    def edit(run: Run) -> None:
        run.net[3].weight.data.view(-1)[7] += 0.05  # type: ignore[index, union-attr, operator]

    found = parts(adamw, after_step=once(edit, AT - 1))
    assert (found.step, found.link, found.tensor, found.tensors) == (AT, "before", "3.weight", 1)


def test_a_permutation_of_rows_is_seen() -> None:
    """E4: the same numbers in another order, which sums alone would not see after the step."""

    def swap(run: Run) -> None:
        weight = run.net[3].weight  # type: ignore[index]
        weight.data.copy_(weight.data.flip(0))  # type: ignore[union-attr, operator]

    found = parts(adamw, after_step=once(swap, AT - 1))
    assert found.step == AT
    assert found.link in ("before", "raw")


def test_a_hidden_learning_rate_is_named_with_its_value() -> None:
    """C3: set for one step right before the update, and set back after it."""

    def raise_it(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] *= 1.05

    def lower_it(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] /= 1.05

    found = parts(sgd, before_step=once(raise_it), after_step=once(lower_it))
    assert (found.step, found.link, found.setting) == (AT, "groups", "lr of group 0")
    assert float(found.found) == pytest.approx(0.0525)


def test_a_reset_momentum_is_in_the_state() -> None:
    """C4: the state is emptied before one step."""
    found = parts(sgd, before_step=once(lambda run: run.optimizer.state.clear()))
    assert (found.step, found.link) == (AT, "state")


def test_reseeding_is_in_the_streams() -> None:
    """D1: torch.manual_seed between two steps: the next step draws from another place."""
    found = parts(sgd, after_step=once(lambda _run: torch.manual_seed(5) and None, AT - 1))
    assert (found.step, found.link, found.setting) == (AT, "rng", "torch")


def test_dropout_switched_off_is_in_the_modes() -> None:
    """C11: the rate of one module; nothing else would say why the gradients are others."""

    def off(run: Run) -> None:
        run.net[2].p = 0.0  # type: ignore[index]

    found = parts(sgd, after_step=once(off, AT - 1))
    assert (found.step, found.link) == (AT, "modes")


def closed(steps: int, *, turned: bool = False) -> Account:
    """A training whose optimizer runs backward itself, in a closure."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    batch = torch.randn(16, 8)
    with recording(commits=True, links="none") as recorder:
        for step in range(1, steps + 1):

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                loss = net(batch).square().mean()
                loss.backward()
                for p in net.parameters():
                    if turned and step == AT and p.grad is not None:
                        p.grad.neg_()
                return loss

            optimizer.step(closure)
    taken = Account()
    for record in (each for folded in recorder.records for each in unfold(folded)):
        if record.kind == "step":
            taken.take(record.step, record.body)
    return taken


def test_with_a_closure_the_gradients_are_those_of_its_own_step() -> None:
    """C1 in a closure: the gradient of the step before must not stand for this one."""
    found, _ = first_difference(
        closed(STEPS, turned=True), closed(STEPS), first=1, last=STEPS, idle_streams=frozenset({1, 2})
    )
    assert found is not None
    assert (found.step, found.link) == (AT, "used")
    assert first_difference(closed(STEPS), closed(STEPS), first=1, last=STEPS, idle_streams=frozenset({1, 2})) == (
        None,
        STEPS,
    )


def test_an_optimizer_with_odd_state_is_committed_to_without_a_fault() -> None:
    """LBFGS keeps lists and plain numbers beside its tensors, and runs its closure many times."""

    def lbfgs() -> Account:
        torch.manual_seed(0)
        net = nn.Linear(4, 2)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)
        batch = torch.randn(16, 4)
        with recording(commits=True, links="none") as recorder:
            for _ in range(8):

                def closure() -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = (net(batch) - batch[:, :2]).square().mean()
                    loss.backward()
                    return loss

                optimizer.step(closure)
        taken = Account()
        for record in (each for folded in recorder.records for each in unfold(folded)):
            if record.kind == "step":
                taken.take(record.step, record.body)
        return taken

    one, two = lbfgs(), lbfgs()
    assert first_difference(one, two, first=1, last=8, idle_streams=frozenset({1, 2})) == (None, 8)
    assert one.steps[8].vector("state") != one.steps[7].vector("state")


SPARE = {
    "make": sgd,
    "commits": True,
    "links": "governed",
    "commit_percent": 0.5,
    "always_steps": 0,
    "credit_seconds": 0.0,
}
"""A budget that short steps cannot pay: most are taken at a glance and commit to nothing."""


def test_where_the_budget_is_short_some_steps_commit_and_all_are_told_of() -> None:
    """Every step is in the record; those with commits are equal to a clean run's that commits to all of them."""
    run = account(train(300, **SPARE))  # type: ignore[arg-type]
    clean = account(train(300, make=sgd, commits=True, links="none"))
    assert len(clean.steps) == 300
    assert 20 <= len(run.steps) < 200
    assert set(run.steps) | run.uncommitted == set(range(1, 301))
    assert any(step.lean for step in run.steps.values())
    found, compared = first_difference(run, clean, first=1, last=300, idle_streams=idle(run, clean))
    assert (found, compared) == (None, len(run.steps))


def test_an_act_between_two_commits_is_bounded_by_them() -> None:
    """E4 at step 203: found in the first step after it that commits, never before."""

    def edit(run: Run) -> None:
        run.net[3].weight.data.view(-1)[7] += 0.05  # type: ignore[index, union-attr, operator]

    run = account(train(300, **SPARE, after_step=once(edit, 202)))  # type: ignore[arg-type]
    clean = account(train(300, make=sgd, commits=True, links="none"))
    found, _ = first_difference(run, clean, first=1, last=300, idle_streams=idle(run, clean))
    assert found is not None
    assert found.step == min(number for number in run.steps if number >= 203)
    assert found.since is not None
    assert found.since < 203


def test_commits_change_no_bit_of_the_training() -> None:
    """The same run with and without them ends with the same weights and losses."""
    plain = train(STEPS, make=adamw, clip=1.0, guarded=False)
    watched = train(STEPS, make=adamw, clip=1.0, commits=True, links="none")
    assert plain.losses == watched.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, watched.weights, strict=True))
