"""Why a step is not what it should be: what was done is re-enacted until it gives the recorded bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.retried import Bench, account
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainguard.replay.compare import first_difference
from trainguard.replay.explain import Cause, Search

pytestmark = pytest.mark.torch

STEPS, AT = 5, 4
IDLE = frozenset({1, 2})
Hand = Callable[["Job"], None]


class Recomputed(nn.Sequential):
    """Computes its middle a second time in the backward pass, as activation checkpointing does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[3](checkpoint(lambda y: self[2](self[1](self[0](y))), x, use_reentrant=False))  # type: ignore[no-any-return]


class Job:
    """A small classifier with dropout, clipping and its own batches; hands are what an insider does in step AT."""

    def __init__(self, make: str, **hands: Any) -> None:
        self.make = make
        self.hands = hands
        self.step = 0

    def hand(self, place: str) -> None:
        if self.step == AT and place in self.hands:
            with torch.no_grad():
                self.hands[place](self)

    def through(self, place: str, *values: Any) -> Any:
        """What an insider makes of a value in passing."""
        found = self.hands[place](self, *values) if self.step == AT and place in self.hands else values
        return found if len(values) > 1 or not isinstance(found, tuple) else found[0]

    def inside(self) -> AbstractContextManager[Any]:
        held = self.hands.get("inside")
        return held(self) if held is not None and self.step == AT else nullcontext()

    def __call__(self, over: Callable[[int], None]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        kind = self.hands.get("kind", nn.Sequential)
        net = self.net = kind(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 4))
        optimizer = self.optimizer = {
            "adamw": lambda: torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1),
            "sgd": lambda: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        }[self.make]()
        x = torch.randn(12, 16, 8)
        y = torch.randint(4, (12, 16))
        for self.step in range(1, STEPS + 1):
            self.hand("start")
            inputs, labels = self.through("batch", x[self.step - 1], y[self.step - 1])
            loss = F.cross_entropy(
                net(inputs), labels, label_smoothing=self.hands.get("smoothing", 0.0) * (self.step == AT)
            )
            loss = self.through("loss", loss)
            optimizer.zero_grad()
            loss.backward()
            self.hand("backward")
            self.limit = 0.5
            self.hand("limit")
            nn.utils.clip_grad_norm_(net.parameters(), self.limit)
            self.hand("update")
            with self.inside():
                optimizer.step()
            self.hand("end")
            over(self.step)


def why(make: str, **hands: Any) -> Cause:
    """The cause that is found for a training with these hands in it."""
    same = {name: hands[name] for name in ("kind",) if name in hands}
    bad, clean = account(Job(make, **hands)), account(Job(make, **same))
    difference, _ = first_difference(bad, clean, first=1, last=STEPS, idle_streams=IDLE)
    assert difference is not None
    assert difference.step == AT
    return Search(bad, clean, IDLE).at(Bench(Job(make, **same), AT), AT)


def kernel(name: str, value: Callable[[float], float]) -> Any:
    """Another argument for the optimizer's own function: nobody sees it in the groups."""

    @contextmanager
    def inside(job: Job) -> Any:
        import torch.optim.adam as adam
        import torch.optim.sgd as sgd

        module, function = (adam, "adam") if job.make == "adamw" else (sgd, "sgd")
        plain = getattr(module, function)
        setattr(module, function, lambda *a, **k: plain(*a, **dict(k, **{name: value(k[name])})))
        try:
            yield
        finally:
            setattr(module, function, plain)

    return inside


def nothing(job: Job) -> Any:
    return kernel_as(job, lambda plain, a, k: None)


def twice(job: Job) -> Any:
    return kernel_as(job, lambda plain, a, k: (plain(*a, **k), plain(*a, **k)))


@contextmanager
def kernel_as(job: Job, act: Callable[..., Any]) -> Any:
    import torch.optim.adam as adam
    import torch.optim.sgd as sgd

    module, function = (adam, "adam") if job.make == "adamw" else (sgd, "sgd")
    plain = getattr(module, function)
    setattr(module, function, lambda *a, **k: act(plain, a, k))
    try:
        yield
    finally:
        setattr(module, function, plain)


def grads(act: Callable[[torch.Tensor], Any]) -> Hand:
    def hand(job: Job) -> None:
        for p in job.net.parameters():
            act(p.grad)

    return hand


def weights(act: Callable[[torch.Tensor], Any], *names: str) -> Hand:
    def hand(job: Job) -> None:
        for name, p in job.net.named_parameters():
            if not names or name in names:
                act(p.data)

    return hand


def state(job: Job, act: Callable[[torch.Tensor], Any]) -> None:
    for held in job.optimizer.state.values():
        for key in ("exp_avg", "momentum_buffer"):
            if key in held:
                act(held[key])


def one_flipped(_job: Job, x: torch.Tensor, y: torch.Tensor) -> Any:
    y = y.clone()
    y[5] = (y[5] + 1) % 4
    return x, y


def rates(rate: float) -> Hand:
    def hand(job: Job) -> None:
        job.net[2].p = rate  # type: ignore[index]

    return hand


def put(name: str, factor: float) -> Hand:
    def hand(job: Job) -> None:
        for group in job.optimizer.param_groups:
            group[name] *= factor

    return hand


def frozen(job: Job) -> None:
    job.net[0].weight.requires_grad_(False)  # type: ignore[operator, union-attr]


def not_one(job: Job) -> Any:
    """The optimizer's function runs, and one tensor is as it was before."""

    def act(plain: Any, a: Any, k: Any) -> None:
        kept = job.net[3].weight.detach().clone()  # type: ignore[operator, union-attr]
        plain(*a, **k)
        job.net[3].weight.data.copy_(kept)  # type: ignore[union-attr, operator]

    return kernel_as(job, act)


CASES: list[tuple[str, str, dict[str, Any], tuple[str, ...], str]] = [
    ("adamw", "learning rate in sight", {"start": put("lr", 1.3)}, ("learning rate",), "0.0039"),
    ("adamw", "learning rate x1.05 unseen", {"inside": kernel("lr", lambda v: v * 1.05)}, ("learning rate",), "1.05"),
    ("sgd", "learning rate x0.7 unseen", {"inside": kernel("lr", lambda v: v * 0.7)}, ("learning rate",), "0.7"),
    ("adamw", "beta1", {"inside": kernel("beta1", lambda _: 0.8)}, ("beta1",), "0.8"),
    ("adamw", "beta2", {"inside": kernel("beta2", lambda _: 0.9)}, ("beta2",), "0.9"),
    ("adamw", "eps", {"inside": kernel("eps", lambda _: 1e-4)}, ("eps",), "0.0001"),
    ("adamw", "weight decay", {"inside": kernel("weight_decay", lambda _: 0.0)}, ("weight decay",), " 0 "),
    ("sgd", "weight decay", {"inside": kernel("weight_decay", lambda _: 0.02)}, ("weight decay",), "0.02"),
    ("sgd", "momentum", {"inside": kernel("momentum", lambda _: 0.5)}, ("momentum",), "0.5"),
    ("sgd", "nesterov", {"inside": kernel("nesterov", lambda _: True)}, ("nesterov",), "on"),
    ("adamw", "update left out", {"inside": nothing}, ("update skipped",), ""),
    ("sgd", "update made twice", {"inside": twice}, ("update repeated",), ""),
    ("adamw", "sign of gradients", {"update": grads(lambda g: g.neg_())}, ("gradient sign",), ""),
    ("sgd", "gradients times 1.7", {"update": grads(lambda g: g.mul_(1.7))}, ("gradient scaled",), "1.7"),
    ("sgd", "gradients to bfloat16", {"update": grads(lambda g: g.copy_(g.bfloat16()))}, ("gradient rounded",), ""),
    ("adamw", "noise on gradients", {"backward": grads(lambda g: g.add_(torch.randn_like(g) * 0.02))},
     ("noise on gradient",), "0.02"),
    ("adamw", "clipping left out", {"limit": lambda job: setattr(job, "limit", 1e9)}, ("clip",), "not clipped"),
    ("adamw", "clipping limit times 0.3", {"limit": lambda job: setattr(job, "limit", 0.15)}, ("clip",), "0.3"),
    ("adamw", "loss times 1.5", {"loss": lambda _, loss: loss * 1.5}, ("loss scaled",), "1.5"),
    ("sgd", "label smoothing", {"smoothing": 0.1}, ("label smoothing",), "0.1"),
    ("sgd", "labels in another order", {"batch": lambda _, x, y: (x, y.roll(1))}, ("labels permuted",), ""),
    ("sgd", "one label", {"batch": one_flipped}, ("one label changed",), "label 5"),
    ("sgd", "rows in another order", {"batch": lambda _, x, y: (x.flip(0), y.flip(0))}, ("batch reordered",), ""),
    ("sgd", "rows in another order, with checkpointing",
     {"kind": Recomputed, "batch": lambda _, x, y: (x.flip(0), y.flip(0))}, ("batch reordered",), ""),
    ("sgd", "inputs times 1.1", {"batch": lambda _, x, y: (x * 1.1, y)}, ("inputs scaled",), "1.1"),
    ("sgd", "dropout rate", {"start": rates(0.5)}, ("rate of modules",), "0.5"),
    ("sgd", "evaluation mode", {"start": lambda job: job.net.eval()}, ("mode",), "evaluation"),
    ("sgd", "reseed", {"start": lambda _job: torch.manual_seed(1234)}, ("reseed",), "1234"),
    ("sgd", "extra draws", {"start": lambda _job: torch.rand(777)},
     ("extra draws",), "777"),
    ("adamw", "one weight", {"start": weights(lambda w: w.view(-1)[9].add_(0.05), "3.weight")},
     ("one weight edited",), "element 9"),
    ("adamw", "a tensor times 1.01", {"start": weights(lambda w: w.mul_(1.01), "3.weight")},
     ("weights scaled",), "1.01"),
    ("adamw", "rows of a tensor", {"start": weights(lambda w: w.copy_(w.flip(0)), "3.weight")},
     ("weights edited", "weights permuted"), ""),
    ("adamw", "noise on weights", {"start": weights(lambda w: w.add_(torch.randn_like(w) * 0.02))},
     ("noise on weights",), "0.02"),
    ("adamw", "state zeroed", {"start": lambda job: state(job, lambda s: s.zero_())},
     ("optimizer state zeroed", "beta1"), ""),
    ("sgd", "state halved", {"update": lambda job: state(job, lambda s: s.mul_(0.5))},
     ("optimizer state scaled", "momentum"), ""),
    ("adamw", "one tensor not updated", {
        "inside": not_one}, ("update skipped",), "3.weight"),
    ("sgd", "a parameter frozen", {"start": frozen},
     ("parameter frozen", "gradient zeroed"), "0.weight"),
]  # fmt: skip


Batch = tuple[torch.Tensor, torch.Tensor]


class Micro:
    """Steps of two micro-batches drawn by the script itself, of a model that is given its labels with the rows."""

    training = True
    """Whether the model is put into training mode before each turn of step AT too."""

    def __init__(self, act: Callable[[int, list[Batch]], Batch] = lambda _turn, seen: seen[-1]) -> None:
        self.act = act
        """What an insider makes of a micro-batch of step AT: its turn, and all that were drawn so far, go in."""

    @staticmethod
    def drawn() -> Batch:
        return torch.randn(16, 8), torch.randint(4, (16,))

    def __call__(self, over: Callable[[int], None]) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 4))

            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return F.cross_entropy(self.inner(x), y.view(-1))

        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        seen: list[Batch] = []
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            for turn in (0, 1):
                net.train(self.training or step != AT)
                seen.append(self.drawn())
                batch = self.act(turn, seen) if step == AT else seen[-1]
                (net(*batch) / 2).backward()
            optimizer.step()
            over(step)


TURNS: dict[str, tuple[Callable[[int, list[Batch]], Batch], str]] = {
    "rows turned round": (lambda _, seen: (seen[-1][0].flip(0), seen[-1][1].flip(0)), "batch reordered"),
    "one before": (lambda _, seen: seen[-2], "batch repeated"),
    "one of them twice": (lambda turn, seen: seen[-1 - turn], "batch repeated"),
    "each drawn again": (lambda _turn, _seen: Micro.drawn(), "extra draws"),
}


@pytest.mark.parametrize("act", TURNS)
def test_what_became_of_the_micro_batches_of_a_step_is_named(act: str) -> None:
    """Labels that the model is given are moved with their rows, once; a micro-batch may come from any turn before; and
    what is drawn anew in every turn moves the stream in every turn."""
    hand, kind = TURNS[act]
    cause = Search(account(Micro(hand)), account(Micro()), IDLE).at(Bench(Micro(), AT), AT)
    assert (cause.kind, cause.confidence) == (kind, "reproduced"), cause
    assert "D2" in cause.techniques


def test_evaluation_mode_is_named_where_a_script_asks_for_training_before_every_turn() -> None:
    """C11: what is put into evaluation mode at the start of the step would be put back by the script itself."""
    bad = Micro()
    bad.training = False
    cause = Search(account(bad), account(Micro()), IDLE).at(Bench(Micro(), AT), AT)
    assert (cause.kind, cause.confidence) == ("mode", "reproduced"), cause
    assert "evaluation" in cause.words


QUICK = (0, 1, 3, 8, 12, 17, 18, 23, 27, 29)
"""Cases for every day: each another place in the step. The others are as long, and for the night."""

PARAMS = [pytest.param(*case, marks=() if n in QUICK else pytest.mark.nightly) for n, case in enumerate(CASES)]


@pytest.mark.parametrize(("make", "name", "hands", "kinds", "said"), PARAMS, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_what_was_done_is_named(make: str, name: str, hands: dict[str, Any], kinds: tuple[str, ...], said: str) -> None:
    """Its kind, its number where it has one, and that the recorded bytes are reproduced."""
    cause = why(make, **hands)
    assert (cause.kind in kinds, cause.confidence) == (True, "reproduced"), cause
    assert said in f"{cause.words} "
    assert cause.techniques
