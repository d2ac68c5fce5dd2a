"""The step engine: sees every optimizer step through torch's public global hooks and asks each link what it saw.

A *link* is one relation of a training step that can be checked (DESIGN: the chain of links). Each is a class in
its own file, listed in `LINKS`; for every step it returns a small JSON value, which goes out as one frame:

    kind "step", step = number of the optimizer step in this process (from 1), body =
      {"opt": index of the optimizer, "wall_ns": time since the previous step began, "own_ns": time of our own,
       "checked": bool, "<link name>": value, …}

`checked` false means the governor skipped the step (budget) and only the links with `every_step` spoke.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any, Dict, List, Optional

from . import links as _links
from .client import Client


class Step:
    """What a link is given, twice: before the update and after it."""

    __slots__ = ("full", "number", "opt", "optimizer", "rng", "scratch", "settings", "torch")

    def __init__(
        self,
        number: int,
        optimizer: Any,
        opt: int,
        torch: Any,
        rng: random.Random,
        settings: Dict[str, Any],
        full: bool,
    ) -> None:
        self.number = number
        """Optimizer step in this process, from 1."""
        self.optimizer = optimizer
        self.opt = opt
        """Index of the optimizer in this process, in order of first step."""
        self.torch = torch
        self.rng = rng
        """Private random.Random, keyed by the supervisor: the only source of sample positions."""
        self.settings = settings
        self.scratch: Dict[str, Any] = {}
        """A link's own values carried from `before` to `after`, by link name."""
        self.full = full
        """Whether this step is checked in full or only by the links that always speak."""


class Engine:
    """Holds the links of one process. One step at a time; nested steps (SAM, LBFGS closures) count as their own."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.settings = client.settings
        self.torch = sys.modules["torch"]
        self.rng = random.Random(bytes.fromhex(client.settings["key"]))
        self.steps = 0
        self.optimizers: List[Any] = []
        self.own_ns = 0
        self.began_ns = time.monotonic_ns()
        self.last_ns: Optional[int] = None
        self.open_steps: List[Step] = []
        self.links: List[Any] = [link(client) for link in _links.LINKS]


def attach(client: Client) -> None:
    """Register the global optimizer hooks; called once torch has been imported."""
    raise NotImplementedError


def forked(client: Client) -> None:
    """In a forked child: start counting anew under the child's own connection."""
