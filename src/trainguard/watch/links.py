"""The links of a step, in causal order. A visible tuple: nothing registers itself.

A link is a class made once per process with the client, and then called for every step, or only for steps that
are checked in full:

    name: str                     key of its value in the step frame
    every_step: bool              False: called only when `step.full`
    before(step) -> None          at the start of optimizer.step(), before anything of the update happened
    after(step) -> JSON | None    the update has been made; what it returns goes into the frame
    ready(step) -> None           optional, full steps only: the gradients are final (after the closure, if any)
    arm(step) -> None             optional: at the end of an unchecked step whose successor is checked (`after` of a
                                  checked one does this itself): put in place what must be there when backward runs
    still(track, optimizer, still) -> bool
                                  of links with every_step: add to `still` (engine.Still) what must not move for this
                                  link to have nothing to say of the next steps, not checked ones; False: ask me anyway.
                                  While nothing moves, before and after are not called. Where a link has no such method,
                                  they are called for every step, which costs 0.1 ms each time
    between(step) -> JSON | None  optional: after the frame is out, when the budget has room (sweeps; at every tenth of
                                  the steps taken at a glance); what it returns
                                  goes out as a frame of kind "link", body {"link": name, "value": value}
    forget(opt) -> None           optional: the optimizer with this index is gone
    forked() -> None              optional: forget what belongs to the parent process

`step` is engine.Step. An exception in any of them is counted by the client and the step goes on. Each file is loaded by
itself: one that cannot be (a syntax error, an import that fails) is named in FAILED, and the others work on.
"""

from __future__ import annotations

import importlib
from typing import Any, Dict, List, Tuple

NAMES: Tuple[Tuple[str, str], ...] = (
    ("inputs", "InputsLink"),
    ("rng", "Rng"),
    ("order", "Order"),
    ("batches", "Batches"),
    ("truth", "Truth"),
    ("gradients", "Gradients"),
    ("shards", "Shards"),
    ("hyperparameters", "Hyperparameters"),
    ("optimizer", "Optimizer"),
    ("weights", "Weights"),
    ("replicas", "Replicas"),
    ("modules", "Modules"),
    ("hooks", "Hooks"),
    ("dispatch", "Dispatch"),
    ("deferred", "Deferred"),
    ("surface", "Surface"),
    ("trackers", "Trackers"),
    ("frames", "Frames"),
    ("commits", "Commits"),
)
"""(file, class) of every link."""

FAILED: Dict[str, str] = {}
"""File of a link that could not be loaded → why."""


def _load() -> Tuple[Any, ...]:
    found: List[Any] = []
    for file, name in NAMES:
        try:
            found.append(getattr(importlib.import_module("." + file, __package__), name))
        except Exception as error:  # fail open: the record says what is missing
            FAILED[file] = "%s: %s" % (type(error).__name__, str(error)[:300])
    return tuple(found)


LINKS: Tuple[Any, ...] = _load()

UNCHECKED = ("commits",)
"""What is left with `--links none`: nothing is checked while the run goes on, and all of it can be replayed later."""


def chosen(settings: Dict[str, Any]) -> Tuple[Any, ...]:
    """The links of a process with these settings."""
    return LINKS if settings.get("links") != "none" else tuple(link for link in LINKS if link.name in UNCHECKED)
