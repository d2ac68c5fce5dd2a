"""Is the guard still in place inside this process? Asked from a second place, which the engine does not lead to.

The engine hangs on two entries of torch's tables of hooks. Who clears these tables, or puts something else in place
of its methods, silences it, and it cannot say so itself. This file looks when a file is opened (at most once a
second, by the audit hook, which Python code cannot remove) and when the process leaves.

Frames (spec/evidence.md, "sweep"):

    kind "sweep", body {"what": "guard", "checked": n, "found": [what is not in place, …]}     what is new, and at exit

An attacker who has read this file can silence it as well; what cannot be answered for from inside is read from outside
(reader.py, check *live*).
"""

from __future__ import annotations

import atexit
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from . import audit, engine
from .client import Client

EVERY_NS = 1_000_000_000
_HOOKS = (("_global_optimizer_pre_hooks", "_before"), ("_global_optimizer_post_hooks", "_after"))
_Function = type(engine.current)
_now = time.monotonic_ns


class Presence:
    """What was in place when the guard was attached."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.engine = engine.current()
        self.hooks = tuple((table, vars(engine)[name]) for table, name in _HOOKS)
        self.code = _code_of_guard()
        self.links: Tuple[Any, ...] = tuple(self.engine.links) if self.engine is not None else ()
        self.told: Set[str] = set()
        self.looked = 0

    def on_open(self, _: Tuple[Any, ...]) -> None:
        """Audit event `open`: look, at most once a second."""
        now = _now()
        if now - self.looked > EVERY_NS:
            self.looked = now
            self.look(quietly=True)

    def finish(self) -> None:
        """At exit."""
        try:
            self.look()
        except Exception as error:
            self.client.fault("presence", error)

    def look(self, *, quietly: bool = False) -> None:
        """Look, and send what is new; with `quietly`, nothing when nothing is."""
        found = [line for check in CHECKS for line in check(self) if line not in self.told]
        if found or not quietly:
            self.told.update(found)
            self.client.send("sweep", {"what": "guard", "checked": len(self.code) + 8, "found": found[:50]})


def _code_of_guard() -> Dict[Any, Any]:
    """Every function of the guard's loaded modules → its code."""
    package = str(__package__) + "."
    found: Dict[Any, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(package):
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == name:
                    found.update((one, one.__code__) for one in vars(value).values() if isinstance(one, _Function))
                elif isinstance(value, _Function):
                    found[value] = value.__code__
    return found


def _tables(state: Presence) -> List[str]:
    optimizer = sys.modules.get("torch.optim.optimizer")
    missing = []
    for table, hook in state.hooks:
        if not any(one is hook for one in getattr(optimizer, table, {}).values()):
            missing.append("%s is not in torch's %s" % (hook.__name__, table))
    return missing


def _functions(state: Presence) -> List[str]:
    return ["code of %s" % one.__qualname__ for one, code in state.code.items() if one.__code__ is not code]


def _objects(state: Presence) -> List[str]:
    now = engine.current()
    if state.engine is None or now is None:
        return [] if now is state.engine else ["the engine"]
    if now is not state.engine:
        return ["the engine"]
    changed = ["the links"] if tuple(now.links) != state.links else []
    for one in (now, now.client, now.governor, *now.links):
        hidden = [name for name in getattr(one, "__dict__", ()) if isinstance(vars(type(one)).get(name), _Function)]
        changed += ["%s.%s" % (type(one).__name__, name) for name in hidden]
    return changed


def _modules(state: Presence) -> List[str]:
    return [] if str(__package__) + ".engine" in sys.modules else ["the guard's modules"]


CHECKS: Tuple[Callable[[Presence], List[str]], ...] = (_tables, _functions, _objects, _modules)

_presence: Optional[Presence] = None


def install(client: Client) -> None:
    """Begin; called once the engine is attached."""
    global _presence
    if _presence is None:
        _presence = Presence(client)
        audit.on("open", _presence.on_open)
        atexit.register(_presence.finish)


def forked() -> None:
    """In a forked child: its engine is another one."""
    if _presence is not None:
        _presence.engine = engine.current()
        _presence.links = tuple(_presence.engine.links) if _presence.engine is not None else ()
