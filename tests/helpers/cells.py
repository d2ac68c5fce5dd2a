"""The support matrix: ways people train, and what each link says of them. One small training per cell, in this process.

A cell is a function that trains for a few steps. `LINKS` are the step links that are judged; `EXPECTED` says for each
cell where a link is not simply held: the reason it is blind (or explained), in words of the link's own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests.helpers import optimizers as own
from tests.helpers.recorded import judge, recording
from tests.helpers.threads import alone
from torch import nn
from torch.nn.utils import parametrizations, prune

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.hyperparameters import Hyperparameters
from trainguard.appraise.interface import Check
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.rng import Rng
from trainguard.appraise.weights import Weights
from trainguard.evidence import Evidence
from trainguard.watch import engine

LINKS: tuple[tuple[str, type[Check]], ...] = (
    ("rng", Rng),
    ("gradients", Gradients),
    ("hyperparameters", Hyperparameters),
    ("optimizer", Optimizer),
    ("weights", Weights),
)
STEPS = 6
Cell = Callable[[], None]
Params = list[nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]

CELLS: dict[str, Cell] = {}
EXPECTED: dict[str, dict[str, str]] = {}
"""Cell → link → part of the reason it is blind; every link that is not named is held."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the links said of one cell."""

    findings: list[str]
    states: dict[str, str]
    """Link → "held n" or "blind: reason"."""


def cell(name: str, **blind: str) -> Callable[[Cell], Cell]:
    """Enter a function into the table."""

    def enter(function: Cell) -> Cell:
        CELLS[name] = function
        EXPECTED[name] = blind
        return function

    return enter


def run(name: str) -> Outcome:
    """Train one cell under watch and judge its records."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with alone(), recording() as recorder:
        watching = engine.current()
        assert watching is not None
        watching.idlers = []  # inventories look at the whole process: their own tests are elsewhere
        CELLS[name]()
    return judged(recorder.records)


def judged(records: list[Evidence]) -> Outcome:
    """The findings of all step links, and what each says of itself."""
    findings: list[str] = []
    states: dict[str, str] = {}
    for link, check in LINKS:
        found, ends = judge(check, records)
        findings += [f"{link}: {finding.message}" for finding in found]
        state = ends[link]
        reasons = "; ".join(state.blind or state.explained)
        states[link] = f"held {state.held}" if state.state == "held" else f"{state.state}: {reasons}"
    return Outcome(findings, states)


def agrees(name: str, outcome: Outcome) -> list[str]:
    """Where the outcome is not the expected one."""
    wrong = list(outcome.findings)
    for link, said in outcome.states.items():
        reason = EXPECTED[name].get(link)
        held = said.startswith("held ")
        if held != (reason is None) or (reason is not None and reason not in said):
            wrong.append(f"{link}: expected {'held' if reason is None else '…' + reason}, found {said}")
    return wrong


# -- pieces ------------------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Four tensors, with dropout between."""
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 3)).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    return torch.randn(8, 6, dtype=dtype), torch.randn(8, 3, dtype=dtype)


def loss_of(net: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a fresh batch."""
    x, y = batch(dtype)
    value: torch.Tensor = (net(x) - y).float().square().mean()
    return value


def fit(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    dtype: torch.dtype = torch.float32,
    before: Callable[[int], Any] = lambda step: None,
    after: Callable[[int], Any] = lambda step: None,
    steps: int = STEPS,
) -> None:
    """The plain loop; `before` acts between backward and step."""
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(net, dtype).backward()
        before(step)
        optimizer.step()
        after(step)


def plainly(make: Make, dtype: torch.dtype = torch.float32, matrices: bool = False) -> Cell:
    """A cell that is the plain loop with another optimizer."""

    def train() -> None:
        net = network(dtype)
        fit(net, make([p for p in net.parameters() if p.ndim == 2 or not matrices]), dtype=dtype)

    return train


# -- optimizers --------------------------------------------------------------------------------------------------------

_FUSED: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-2}),
    "SGD momentum nesterov decay": (
        torch.optim.SGD,
        {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    ),
    "Adam": (torch.optim.Adam, {}),
    "Adam decay maximize": (torch.optim.Adam, {"weight_decay": 1e-2, "maximize": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
}
_LOOPED: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "RMSprop centered momentum": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "NAdam decoupled": (torch.optim.NAdam, {"weight_decay": 1e-2, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


def _implementations() -> None:
    for name, (kind, settings) in (_FUSED | _LOOPED).items():
        ways = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
        for way, flags in ways.items():
            if way == "fused" and name in _LOOPED:
                continue
            make = lambda params, kind=kind, settings=settings, flags=flags: kind(params, **settings, **flags)  # noqa: E731
            cell(f"{name}, {way}")(plainly(make))
    adam: Make = lambda params: torch.optim.Adam(params, differentiable=True)  # noqa: E731
    cell("Adam, differentiable")(_differentiable(adam))
    cell("Muon")(plainly(lambda params: torch.optim.Muon(params), matrices=True))
    cell("own optimizer (Lion)")(plainly(lambda params: own.Lion(params)))
    cell("own optimizer with a global norm")(plainly(lambda params: own.Lamb(params)))
    cell("own optimizer around another (Lookahead)")(
        plainly(lambda params: own.Ahead(torch.optim.AdamW(params, weight_decay=0.1)))
    )
    cell("own optimizer that draws random numbers")(plainly(lambda params: own.Noisy(params, lr=1e-2)))
    cell("own optimizer with state in its class", optimizer="keeps state in its class")(
        plainly(lambda params: own.Counted(params, lr=1e-2))
    )
    cell("AdamW, bfloat16 weights")(plainly(lambda params: torch.optim.AdamW(params), torch.bfloat16))
    cell("AdamW, float64 weights")(plainly(lambda params: torch.optim.AdamW(params), torch.float64))
    cell("Lion, bfloat16 weights")(plainly(lambda params: own.Lion(params), torch.bfloat16))
    cell("Adam, lr a tensor")(plainly(lambda params: torch.optim.Adam(params, lr=torch.tensor(1e-3), foreach=False)))
    cell("SGD, fused, lr a tensor")(plainly(lambda params: torch.optim.SGD(params, lr=torch.tensor(1e-2), fused=True)))


def _differentiable(make: Make) -> Cell:
    def train() -> None:
        net = network()
        optimizer = make(list(net.parameters()))
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(net).backward()
            with torch.no_grad():  # a leaf that requires grad is not written to in place otherwise
                optimizer.defaults["differentiable"] = False
                optimizer.step()

    return train


_implementations()


# -- closures ----------------------------------------------------------------------------------------------------------


def _with_closure(make: Make, first: bool = False) -> Cell:
    def train() -> None:
        net = network()
        optimizer = make(list(net.parameters()))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(net)
            loss.backward()
            return loss

        if first:
            closure()
        for _ in range(STEPS):
            optimizer.step(closure)  # type: ignore[arg-type]

    return train


cell("AdamW, closure (Lightning)")(_with_closure(lambda params: torch.optim.AdamW(params)))
cell("own optimizer, closure")(_with_closure(lambda params: own.Lion(params)))
cell("LBFGS")(_with_closure(lambda params: torch.optim.LBFGS(params, max_iter=5)))
cell("LBFGS, strong Wolfe")(
    _with_closure(lambda params: torch.optim.LBFGS(params, max_iter=5, line_search_fn="strong_wolfe"))
)
cell("SAM, closure, nested step", rng="a state restored at even distances")(
    _with_closure(lambda params: own.Sharp(params), first=True)
)


# -- schedules ---------------------------------------------------------------------------------------------------------


def _scheduled(make: Make, schedule: Callable[[Any], Any]) -> Cell:
    def train() -> None:
        net = network()
        optimizer = make(list(net.parameters()))
        scheduler = schedule(optimizer)
        fit(net, optimizer, after=lambda step: scheduler.step())

    return train


_SGD: Make = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)  # noqa: E731
_ADAM: Make = lambda params: torch.optim.AdamW(params, lr=1e-3)  # noqa: E731
cell("CosineAnnealingLR")(_scheduled(_SGD, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)))
cell("OneCycleLR, momentum cycling")(
    _scheduled(_SGD, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20))
)
cell("OneCycleLR, betas cycling")(
    _scheduled(_ADAM, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20))
)
cell("warm-up by LambdaLR")(_scheduled(_ADAM, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: (s + 1) / 10)))
cell("ReduceLROnPlateau")(
    lambda: fit(*_plateau())  # type: ignore[arg-type]
)


def _plateau() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return net, optimizer


# -- mixed precision ---------------------------------------------------------------------------------------------------


@cell("autocast bfloat16")
def _autocast() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net)
        loss.backward()
        optimizer.step()


def _scaled(make: Make, unscale: bool) -> Cell:
    def train() -> None:
        net = network()
        optimizer = make(list(net.parameters()))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(net)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

    return train


cell("GradScaler")(_scaled(lambda params: torch.optim.SGD(params, lr=0.1), unscale=False))
cell("GradScaler, unscale and clip")(_scaled(lambda params: torch.optim.AdamW(params), unscale=True))
cell("GradScaler, fused")(_scaled(lambda params: torch.optim.AdamW(params, fused=True), unscale=False))
cell("GradScaler, fused, unscale and clip")(_scaled(lambda params: torch.optim.Adam(params, fused=True), unscale=True))
cell("GradScaler, own optimizer")(_scaled(lambda params: own.Lion(params), unscale=True))


# -- gradients ---------------------------------------------------------------------------------------------------------


@cell("accumulation over four batches")
def _accumulated() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(4):
            (loss_of(net) / 4).backward()
        optimizer.step()


def _between(before: Callable[[nn.Module], Any]) -> Cell:
    def train() -> None:
        net = network()
        fit(net, torch.optim.AdamW(net.parameters()), before=lambda step: before(net))

    return train


cell("clip by norm")(_between(lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.1)))
cell("clip by value")(_between(lambda net: nn.utils.clip_grad_value_(net.parameters(), 0.01)))


@cell("gradients set to zero, not to None")
def _zeroed() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        loss_of(net).backward()
        optimizer.step()


@cell("activation checkpointing")
def _checkpointed() -> None:
    net = network()

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    outer = Remembering()
    fit(outer, torch.optim.AdamW(outer.parameters()))


@cell("optimizer in backward")
def _in_backward() -> None:
    net = network()
    each = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}

    def update(param: torch.Tensor) -> None:
        each[param].step()  # type: ignore[index]
        each[param].zero_grad()  # type: ignore[index]

    handles = [p.register_post_accumulate_grad_hook(update) for p in net.parameters()]
    for _ in range(STEPS):
        loss_of(net).backward()
    for handle in handles:
        handle.remove()


def _sparse(make: Make) -> Cell:
    def train() -> None:
        net = nn.Embedding(20, 4, sparse=True)
        optimizer = make(list(net.parameters()))
        for step in range(STEPS):
            optimizer.zero_grad()
            net(torch.tensor([1, 2, 3, step])).square().sum().backward()
            optimizer.step()

    return train


cell("sparse gradients, SparseAdam", gradients="do not come from backward")(
    _sparse(lambda params: torch.optim.SparseAdam(params))
)
cell("sparse gradients, SGD", gradients="do not come from backward")(
    _sparse(lambda params: torch.optim.SGD(params, lr=0.1))
)
cell("sparse gradients, Adagrad", gradients="do not come from backward")(
    _sparse(lambda params: torch.optim.Adagrad(params))
)


@cell("complex weights", optimizer="complex", gradients="", weights="")
def _complex() -> None:
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    optimizer = torch.optim.Adam([weight])
    for _ in range(STEPS):
        optimizer.zero_grad()
        (weight.abs().square().sum()).backward()
        optimizer.step()


# -- models ------------------------------------------------------------------------------------------------------------


@cell("weight tying")
def _tied() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    net[2].weight = net[0].weight
    fit(net, torch.optim.AdamW(net.parameters()))


def _parametrized(change: Callable[[nn.Module], Any]) -> Cell:
    def train() -> None:
        net = network()
        change(net[0])
        fit(net, torch.optim.AdamW(net.parameters()))

    return train


cell("weight norm")(_parametrized(lambda module: parametrizations.weight_norm(module)))
cell("spectral norm")(_parametrized(lambda module: parametrizations.spectral_norm(module)))
cell("orthogonal")(_parametrized(lambda module: parametrizations.orthogonal(module)))
cell("pruning")(_parametrized(lambda module: prune.l1_unstructured(module, "weight", 0.5)))


@cell("EMA by AveragedModel")
def _averaged() -> None:
    net = network()
    ema = torch.optim.swa_utils.AveragedModel(net)
    fit(net, torch.optim.AdamW(net.parameters()), after=lambda step: ema.update_parameters(net))


@cell("EMA weights swapped in and back")
def _swapped() -> None:
    net = network()
    held = copy.deepcopy(net.state_dict())

    def evaluate(step: int) -> None:
        own_weights = copy.deepcopy(net.state_dict())
        net.load_state_dict(held)
        with torch.no_grad():
            net(batch()[0])
        net.load_state_dict(own_weights)

    fit(net, torch.optim.AdamW(net.parameters()), after=evaluate)


@cell("GAN, two optimizers")
def _gan() -> None:
    maker, critic = nn.Linear(4, 6), nn.Linear(6, 1)
    first, second = torch.optim.Adam(maker.parameters()), torch.optim.Adam(critic.parameters())
    for _ in range(STEPS):
        second.zero_grad()
        (critic(maker(torch.randn(8, 4)).detach()).mean() - critic(torch.randn(8, 6)).mean()).backward()
        second.step()
        first.zero_grad()
        critic(maker(torch.randn(8, 4))).mean().neg().backward()
        first.step()


@cell("two optimizers by turns on the same weights")
def _turns() -> None:
    net = network()
    both = [torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam(net.parameters())]
    for step in range(3 * STEPS):
        both[step // 3 % 2].zero_grad()
        loss_of(net).backward()
        both[step // 3 % 2].step()


@cell("add_param_group")
def _added() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net[0].parameters())
    fit(
        net,
        optimizer,
        after=lambda step: optimizer.add_param_group({"params": net[3].parameters()}) if step == 2 else 0,
    )


@cell("frozen layer, unfrozen later")
def _unfrozen() -> None:
    net = network()
    net[0].requires_grad_(False)
    fit(net, torch.optim.AdamW(net.parameters()), after=lambda step: net[0].requires_grad_(step >= 2))


@cell("part of the model unused at times")
def _unused() -> None:
    net, other = network(), nn.Linear(6, 3)
    optimizer = torch.optim.AdamW([*net.parameters(), *other.parameters()])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net if step % 2 else other).backward()
        optimizer.step()


@cell("state restored from a checkpoint")
def _restored() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    fit(net, optimizer, steps=3)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    again = network()
    other = torch.optim.AdamW(again.parameters())
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    fit(again, other)


@cell("weights in shared memory (Hogwild)", weights="shared memory")
def _hogwild() -> None:
    net = network()
    net.share_memory()
    fit(net, torch.optim.SGD(net.parameters(), lr=0.1))


@cell("channels-last convolution with batch norm")
def _convolution() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()


_NO_STEP = "no"


@cell("SGD by hand", rng=_NO_STEP, gradients=_NO_STEP, hyperparameters=_NO_STEP, optimizer=_NO_STEP, weights=_NO_STEP)
def _by_hand() -> None:
    net = network()
    for _ in range(STEPS):
        net.zero_grad()
        loss_of(net).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad  # type: ignore[operator]


@cell("AdamW through torch.func")
def _functional() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(STEPS):
        x, y = batch()
        named = dict(net.named_parameters())

        def loss(values: dict[str, Any], x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            found: torch.Tensor = (torch.func.functional_call(net.eval(), values, x) - y).square().mean()
            return found

        for name, grad in torch.func.grad(loss)({n: p.detach() for n, p in named.items()}).items():
            named[name].grad = grad
        optimizer.step()


EXPECTED["AdamW through torch.func"]["gradients"] = ""


# -- compiled: seconds each --------------------------------------------------------------------------------------------

SLOW: tuple[str, ...] = ("compiled model", "compiled optimizer step")


@cell("compiled model")
def _compiled() -> None:
    with _compiler():
        net = network()
        fit(torch.compile(net, backend="aot_eager"), torch.optim.AdamW(net.parameters()))  # type: ignore[arg-type]


@cell("compiled optimizer step", **{link: _NO_STEP for link, _ in LINKS})
def _compiled_step() -> None:
    with _compiler():
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        update = torch.compile(optimizer.step, backend="eager")
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(net).backward()
            update()


@contextlib.contextmanager
def _compiler() -> Any:
    """What compiling leaves in its process is undone: link *weights* watches no interval there afterwards."""
    import torch._dynamo.convert_frame as frames

    before = frames.FRAME_COUNTER
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()
        frames.FRAME_COUNTER = before
