"""Replay: a run that was tampered with and a clean one part at the very step, link and tensor of the act."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from tests.helpers.recorded import recording
from tests.helpers.training import Run, looks_fine, train
from torch import nn

from trainguard.evidence import unfold
from trainguard.replay.committed import Account
from trainguard.replay.compare import Difference, first_difference, idle, incomparable
from trainguard.watch.warp import Warp

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


@pytest.mark.parametrize("named", [False, True])
def test_the_verifier_can_plant_its_fault_where_a_closure_computes_gradients(named: bool) -> None:
    """G8: Lightning gives step() a closure; what is turned before it runs would be computed anew by it."""

    def trained(plant: int) -> torch.Tensor:
        torch.manual_seed(0)
        net, batch = nn.Linear(4, 2), torch.randn(8, 4)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        warp = SimpleNamespace(plant=plant, engine=SimpleNamespace(tally=SimpleNamespace(steps=0)))
        optimizer.register_step_pre_hook(lambda *given: Warp.planted(warp, *given))  # type: ignore[arg-type]
        for warp.engine.tally.steps in (1, 2):

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = net(batch).square().mean()
                loss.backward()
                return loss

            value = optimizer.step(closure=closure) if named else optimizer.step(closure)
            assert value is not None
        return net.weight.detach().clone()

    honest, planted = trained(0), trained(2)
    assert not torch.equal(honest, planted)
    assert torch.equal(honest, trained(3))


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


# -- the catalogue's rows: what a replay sees first, at the very step --------------------------------------------------


def every(act: Callable[[Run], None], since: int = AT) -> Callable[[Run], None]:
    """From a step on."""

    def hand(run: Run) -> None:
        if run.step >= since:
            with torch.no_grad():
                act(run)

    return hand


def grads(run: Run) -> list[torch.Tensor]:
    return [p.grad for p in run.net.parameters() if p.grad is not None]


def each(run: Run, act: Callable[[torch.Tensor], object]) -> None:
    for grad in grads(run):
        act(grad)


def leave_out(run: Run) -> None:
    run.net[3].weight.grad = None  # type: ignore[index, union-attr]


def freeze(run: Run) -> None:
    run.net[3].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]


def low_precision(run: Run) -> None:
    run.net[0].register_forward_hook(lambda _m, _i, out: out.bfloat16().float())  # type: ignore[index]


def noise(run: Run) -> None:
    for p in run.net.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=1e-4)


def forget_bias_correction(run: Run) -> None:
    for state in run.optimizer.state.values():
        state["step"] += 1000


def other_activation(run: Run) -> None:
    run.net[1].register_forward_hook(lambda _m, inputs, _out: torch.nn.functional.hardtanh(inputs[0]))  # type: ignore[index]


def evaluate(run: Run) -> None:
    run.net.eval()


def smaller(run: Run) -> None:
    run.net[0].weight.data.mul_(0.5)  # type: ignore[index, union-attr, operator]


def beta(run: Run) -> None:
    run.optimizer.param_groups[0]["betas"] = (0.9, 0.9)


ROWS: dict[str, tuple[dict[str, Callable[[Run], None]], int, str]] = {
    "C1 sign of all": ({"before_step": once(lambda r: each(r, torch.Tensor.neg_))}, AT, "used"),
    "C1 sign of one tensor": ({"before_step": once(lambda r: grads(r)[3].neg_())}, AT, "used"),
    "C2 threshold a tenth": ({"before_step": every(lambda r: each(r, lambda g: g.mul_(0.1)))}, AT, "used"),
    "C2 by largest element": ({"before_step": once(lambda r: each(r, lambda g: g.clamp_(-0.01, 0.01)))}, AT, "used"),
    "C3 schedule stepped twice": ({"after_step": once(lambda r: r.scheduler.step(), AT - 1)}, AT, "groups"),
    "C4 beta": ({"after_step": once(beta, AT - 1)}, AT, "groups"),
    "C4 bias correction": ({"before_step": once(forget_bias_correction)}, AT, "state"),
    "C5 gradient thrown away": ({"before_step": every(leave_out)}, AT, "used"),
    "C5 frozen": ({"after_step": once(freeze, AT - 1)}, AT, "raw"),
    "C7 divided twice": ({"after_backward": every(lambda r: each(r, lambda g: g.div_(2)))}, AT, "used"),
    "C8 bfloat16 in one layer": ({"after_step": once(low_precision, AT - 1)}, AT, "raw"),
    "C9 update of nothing": ({"before_step": once(lambda r: each(r, torch.Tensor.zero_))}, AT, "used"),
    "C9 noise on weights": ({"after_step": once(noise, AT - 1)}, AT, "before"),
    "C11 another activation": ({"after_step": once(other_activation, AT - 1)}, AT, "raw"),
    "C11 evaluation mode": ({"after_step": once(evaluate, AT - 1)}, AT, "modes"),
    "C11 initial weights": ({"start": smaller}, 1, "before"),
    "E3 edited before it resumed": ({"start": lambda r: r.net[3].bias.data.mul_(1.01)}, 1, "before"),  # type: ignore[index, union-attr, operator]
}
"""Row of the catalogue → hands, first step that differs, first link that does."""


@pytest.mark.parametrize("row", ROWS)
def test_the_act_of_a_row_is_found_at_its_step_and_link(row: str) -> None:
    """With every check in the process off; the loss of the tampered run looks fine."""
    hands, step, link = ROWS[row]
    settings = {"make": adamw, "clip": 1.0, "commits": True, "links": "none", "schedule": cosine}
    bad, clean = (account(train(STEPS, **settings, **more)) for more in (hands, {}))  # type: ignore[arg-type]
    found, _ = first_difference(bad, clean, first=1, last=STEPS, idle_streams=idle(bad, clean))
    assert found is not None
    assert (found.step, found.link) == (step, link)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


ROWS_OF_DATA = 64
Feed = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def fed(feed: Feed) -> tuple[Account, list[list[int]]]:
    """A training on 64 rows of tokens in a committed order, 8 rows a step; feed(tokens, labels, order) may alter all
    three. Returns what was committed to, and what each step was made from."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 16, (ROWS_OF_DATA, 5)), torch.randint(0, 4, (ROWS_OF_DATA,))
    order = torch.cat([torch.randperm(ROWS_OF_DATA, generator=torch.Generator().manual_seed(e)) for e in range(3)])
    tokens, labels, order = feed(tokens, labels, order)
    made: list[list[int]] = []
    with recording(commits=True, links="none") as recorder:
        net = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(), nn.Linear(40, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for rows in order.view(STEPS, 8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(tokens[rows]), labels[rows]).backward()
            optimizer.step()
            made.append([*tokens[rows].flatten().tolist(), *labels[rows].tolist()])
    taken = Account()
    for record in (each for folded in recorder.records for each in unfold(folded)):
        if record.kind == "step":
            taken.take(record.step, record.body)
    return taken, made


def sorted_epoch(tokens: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> Any:
    second = order[ROWS_OF_DATA : 2 * ROWS_OF_DATA]
    return tokens, labels, torch.cat([order[:ROWS_OF_DATA], second[labels[second].argsort()], order[128:]])


def same_shard(tokens: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> Any:
    return tokens, labels, order % (ROWS_OF_DATA // 2)


def one_in_a_hundred(tokens: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> Any:
    labels[order[100]] = 3 - labels[order[100]]
    return tokens, labels, order


def other_bytes(tokens: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> Any:
    tokens[order[70], 2] = (tokens[order[70], 2] + 1) % 16
    return tokens, labels, order


def swapped_ids(tokens: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> Any:
    return tokens.where(tokens > 1, 1 - tokens), labels, order


def other_mixture(tokens: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> Any:
    """Rows below 32 are one source: from the second epoch on every fourth of the others is one of them."""
    later = order[ROWS_OF_DATA:].clone()
    later[::4] %= ROWS_OF_DATA // 2
    return tokens, labels, torch.cat([order[:ROWS_OF_DATA], later])


FEEDS: dict[str, Feed] = {
    "D2 an epoch sorted by label": sorted_epoch,
    "D3 the same shard for all": same_shard,
    "D4 a label turned in flight": one_in_a_hundred,
    "D5 a row changed at rest": other_bytes,
    "D6 two token ids swapped": swapped_ids,
    "D7 another mixture": other_mixture,
}


@pytest.mark.parametrize("row", FEEDS)
def test_other_data_is_found_at_the_first_step_that_was_made_from_it(row: str) -> None:
    """Sums over gradients of 8 rows: which rows and in which order decides them, to the bit."""
    clean, known = fed(lambda *given: given)
    bad, made = fed(FEEDS[row])
    step = next(number for number, (one, two) in enumerate(zip(made, known, strict=True), 1) if one != two)
    found, _ = first_difference(bad, clean, first=1, last=STEPS, idle_streams=frozenset({1, 2}))
    assert found is not None
    assert (found.step, found.link) == (step, "used" if step == 1 else "raw")  # looked for from step 2 on


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Rows of which each has a label; at `act`'s row something is done in the loader, as in a worker of its own."""

    def __init__(self, act: Callable[[int, int], int]) -> None:
        made = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(0, 16, (ROWS_OF_DATA, 5), generator=made)
        self.labels = torch.randint(0, 4, (ROWS_OF_DATA,), generator=made).tolist()
        self.act = act

    def __len__(self) -> int:
        return ROWS_OF_DATA

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.tokens[row], self.act(row, self.labels[row])


class Order(torch.utils.data.Sampler[int]):
    """A committed order for each of three epochs; the insider's sorts one of them by label."""

    def __init__(self, labels: list[int], sorted_epoch: int) -> None:
        self.labels, self.sorted_epoch, self.epoch = labels, sorted_epoch, -1

    def __iter__(self) -> Any:
        self.epoch += 1
        order = torch.randperm(ROWS_OF_DATA, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter(sorted(order, key=lambda row: self.labels[row]) if self.epoch == self.sorted_epoch else order)

    def __len__(self) -> int:
        return ROWS_OF_DATA


def loaded(act: Callable[[int, int], int] = lambda _row, label: label, *, sorted_epoch: int = -1) -> Account:
    """Three epochs of eight steps each with a loader and dropout; data at rest are the same in all of them."""
    torch.manual_seed(0)
    rows = Rows(act)
    batches = torch.utils.data.DataLoader(rows, batch_size=8, sampler=Order(rows.labels, sorted_epoch))
    with recording(commits=True, links="none") as recorder:
        net = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(), nn.Dropout(0.1), nn.Linear(40, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(3):
            for tokens, labels in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(tokens), labels).backward()
                optimizer.step()
    taken = Account()
    for record in (each for folded in recorder.records for each in unfold(folded)):
        if record.kind == "step":
            taken.take(record.step, record.body)
    return taken


def seeding() -> Callable[[int, int], int]:
    """The 90th row that is read seeds torch again."""
    read = [0]

    def act(_row: int, label: int) -> int:
        read[0] += 1
        if read[0] == 90:
            torch.manual_seed(1)
        return label

    return act


def flipping() -> Callable[[int, int], int]:
    """One label of a hundred that are read is another."""
    read = [0]

    def act(_row: int, label: int) -> int:
        read[0] += 1
        return 3 - label if read[0] % 100 == 0 else label

    return act


S10: dict[str, tuple[Callable[[], Account], int, str]] = {
    "reseeded in a worker": (lambda: loaded(seeding()), 12, "rng"),
    "one label of a hundred flipped in a worker": (lambda: loaded(flipping()), 13, "raw"),
    "one epoch in the order of labels": (lambda: loaded(sorted_epoch=1), 9, "raw"),
}


@pytest.mark.parametrize("act", S10)
def test_what_a_loader_does_in_flight_is_found_each_by_itself(act: str) -> None:
    """S10 with every check off: data at rest are unchanged, and streams, labels and order are three findings."""
    make, step, link = S10[act]
    found, _ = first_difference(make(), loaded(), first=1, last=STEPS, idle_streams=frozenset({1, 2}))
    assert found is not None
    assert (found.step, found.link) == (step, link)


def test_a_run_that_declares_what_explains_its_weights_is_held_to_its_command() -> None:
    """G11: the record claims a rate of its own for one step, and the weights follow from it; the command gives another.
    Claiming the clean rate instead leaves the weights."""

    def raise_it(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] *= 1.05

    settings = {"make": sgd, "commits": True, "links": "none"}
    bad, clean = (
        account(train(STEPS, **settings, **more))  # type: ignore[arg-type]
        for more in ({"before_step": once(raise_it)}, {})
    )
    declared, _ = first_difference(bad, clean, first=1, last=STEPS, idle_streams=idle(bad, clean))
    assert declared is not None
    assert (declared.step, declared.link) == (AT, "groups")
    for number, step in bad.steps.items():
        bad.steps[number] = msgspec.structs.replace(step, groups=clean.steps[number].groups)
    hidden, _ = first_difference(bad, clean, first=1, last=STEPS, idle_streams=idle(bad, clean))
    assert hidden is not None
    assert (hidden.step, hidden.link) == (AT, "weights")
