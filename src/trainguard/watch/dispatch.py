"""Link *dispatch*: which kernel each torch operator really calls, and which modes stand in between.

`torch.library` can put a Python function in place of a kernel; no name, hash or `id()` changes by it. Torch's own
dump of its dispatch table says where each kernel was registered, so kernels from outside the torch package are named
with file and line. All operators take some 70 ms; they are read in slices of a few milliseconds, at the start, every
200 steps, and at once when the number of Python registrations changes. Active dispatch and function modes are looked
at before every checked step.

Frames (spec/evidence.md, "sweep"):

    kind "sweep", body {"what": "dispatch", "checked": operators, "digest": 16 hex, "modes": n,
                        "found": [{"kind": "kernel" | "changed kernel" | "mode", "origin", "function", "on"}, …]}
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import time
from typing import Any, Dict, Iterator, List, Optional

from . import origin
from .client import Client

SLICE_NS = 5_000_000
"""Longest stretch at a time, of this thread's own time."""

FIRST_SLICE_NS = 40_000_000
LAST_SLICE_NS = 300_000_000
"""Longest stretch at exit, to end a reading that was begun."""

EVERY = 200
FOUND_LIMIT = 200

_REGISTERED = re.compile(r"^(\S+?)(?:\[[^\]]*\])?: (?:fallthrough )?registered at (.+?):(\d+)\b", re.M)
_NATIVE = re.compile(r"\.(?:cpp|cc|cxx|cu|cuh|h|hpp|hip|mm)$")


class Dispatch:
    """See the module."""

    name = "dispatch"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.inventory = origin.Inventory()
        self.tables: Dict[str, int] = {}
        """Operator → hash of its table when last read."""
        self.registrations: Optional[int] = None
        self.modes = 0
        self.package = ""
        self._work: Optional[Iterator[None]] = None
        self._found: List[Dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._checked = 0
        self._whole = client.settings.get("links") == "all"
        self._last: Optional[int] = None
        atexit.register(self.finish)

    def before(self, step: Any) -> None:
        """Modes in force as the update begins."""
        found = list(_modes(step.torch))
        self.modes = len(found)
        if found:
            new = self.inventory.news(found)
            if new:
                body = {"what": "dispatch", "checked": 0, "modes": len(found), "found": new}
                self.client.send("sweep", body, step.number)

    def after(self, step: Any) -> None:
        """Nothing for the step frame."""

    def between(self, step: Any) -> None:
        """Begin or go on with reading the table."""
        if self._work is None:
            count = len(getattr(step.torch.library, "_impls", ()))
            if step.number > 1 and count == self.registrations and step.number % EVERY:
                return
            self.registrations = count
            self.package = os.path.dirname(os.path.abspath(step.torch.__file__)) + os.sep
            self._work = self._sweep(step.torch._C)
        self._go_on(step.number, FIRST_SLICE_NS if step.number == 1 else SLICE_NS)

    def finish(self) -> None:
        """At exit: end the reading that was begun."""
        try:
            if self._work is not None and self._last is not None:
                self._go_on(self._last, LAST_SLICE_NS)
        except Exception as error:
            self.client.fault("dispatch.exit", error)

    def _go_on(self, number: int, slice_ns: int) -> None:
        self._last = number
        deadline = time.thread_time_ns() + slice_ns
        for _ in self._work or ():
            if time.thread_time_ns() > deadline and not self._whole:
                return
        self._work = None
        new = self.inventory.news(self._found)
        body = {
            "what": "dispatch",
            "checked": self._checked,
            "modes": self.modes,
            "digest": self._digest.hexdigest()[:16],
            "found": new[:FOUND_LIMIT],
        }
        self.client.send("sweep", body, number)

    def _sweep(self, native: Any) -> Iterator[None]:
        self._found, self._digest, self._checked = [], hashlib.sha256(), 0
        for number, name in enumerate(native._dispatch_get_all_op_names()):
            table = native._dispatch_dump(name)
            self._digest.update(table.encode("utf-8", "replace"))
            value = hash(table)
            before = self.tables.get(name)
            self.tables[name] = value
            self._checked += 1
            if before != value and (".py:" in table or before is not None or _odd(table)):
                self._found.extend(self._foreign(name, table))
            if number % 16 == 0:
                yield

    def _foreign(self, name: str, table: str) -> Iterator[Dict[str, Any]]:
        """Kernels of one operator that come from neither native code nor the torch package."""
        for key, place, line in _REGISTERED.findall(table):
            path = place if place[:1] == "<" else os.path.abspath(place)
            if path.startswith(self.package) or _NATIVE.search(place) or place.startswith("/dev/null"):
                continue
            yield {"kind": "kernel", "origin": "%s:%s" % (path, line), "function": key, "on": name, "name": name}


def _odd(table: str) -> bool:
    return "registered at <" in table


def _modes(torch: Any) -> Iterator[Dict[str, Any]]:
    """Active modes, innermost last."""
    native = torch._C
    for label, length, at in (
        ("dispatch mode", "_len_torch_dispatch_stack", "_get_dispatch_stack_at"),
        ("function mode", "_len_torch_function_stack", "_get_function_stack_at"),
    ):
        size = getattr(native, length, None)
        if size is None:
            continue
        for position in range(size()):
            mode = getattr(native, at)(position)
            method: Any = getattr(type(mode), "__torch_%s__" % label.split()[0], None)
            while getattr(method, "__wrapped__", None) is not None:
                method = method.__wrapped__  # torch puts a wrapper of its own around every mode's method
            where, _ = origin.of(method)
            kind = type(mode)
            yield {
                "kind": label,
                "origin": where,
                "function": "%s.%s" % (kind.__module__, kind.__qualname__),
                "on": "every operator",
            }
