"""Optimizers as people write them themselves: none has a formula in the judge."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from tests.helpers import newton
from tests.helpers.newton import softened

logger = logging.getLogger(__name__)
BETAS = (0.9, 0.99)


def blend(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """Between a and b."""
    return a + share * (b - a)


class Lion(torch.optim.Optimizer):
    """Sign of a blend of gradient and momentum."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = BETAS, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.told = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        self.told += 1
        if self.told > 10**9:
            logger.info("many steps")
            warnings.warn("many steps", stacklevel=2)
        return loss

    def update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """Of one tensor."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(blend(p.grad, state["momentum"], beta1).sign_(), alpha=-softened(group["lr"]))
        state["momentum"] = blend(p.grad, state["momentum"], beta2)


class Lamb(torch.optim.Optimizer):
    """Clips the whole gradient first, so that the update of one tensor depends on all."""

    def __init__(self, params: Any, lr: float = 1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        every = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in every]).norm()
        for p in every:
            p.add_(p.grad / (1 + norm), alpha=-newton.softened(self.param_groups[0]["lr"]))


class Noisy(torch.optim.SGD):
    """Draws random numbers in its step, and calls its base's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(torch.randn_like(p.grad), alpha=1e-3)
        return super().step(closure)


class Ahead(torch.optim.Optimizer):
    """Wraps another optimizer: every few steps the weights go half way back."""

    def __init__(self, inner: torch.optim.Optimizer, every: int = 3):
        self.inner = inner
        self.every = every
        self.slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        loss = self.inner.step(closure)
        self.made = getattr(self, "made", 0) + 1
        if self.made % self.every == 0:
            for p, slow in zip(
                (p for group in self.inner.param_groups for p in group["params"]), self.slow, strict=True
            ):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Sharp(torch.optim.Optimizer):
    """SAM: climbs first, then steps with the gradient found there; needs a closure."""

    def __init__(self, params: Any, lr: float = 1e-2, rho: float = 0.05):
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        closure = torch.enable_grad()(closure)
        every = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in every]).norm()
        for p in every:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        closure()
        for p in every:
            p.copy_(self.state[p]["old"])
        self.base.step()


class Counted(torch.optim.SGD):
    """Keeps state in its class: cannot be repeated."""

    made = 0

    def step(self, closure: Any = None) -> Any:
        """One update."""
        type(self).made += 1
        return super().step(closure)


def signed(p: torch.Tensor, grad: torch.Tensor, rate: float) -> None:
    """A rule as a function of the module."""
    p.add_(grad.sign(), alpha=-rate)


class Ruled(torch.optim.Optimizer):
    """Keeps its rule as an attribute of the object."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})
        self.rule = signed

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                self.rule(p, p.grad, group["lr"])
