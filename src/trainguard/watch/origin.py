"""Where a callable comes from: the file and line of the code that would run.

Shared by the inventories (hooks, dispatch, deferred). What it says of an object is what the object says of itself:
names can be forged, so inventories are evidence of carelessness and judges give weight to the file's hash.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, List, Optional, Tuple

from . import surface

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
_FUNCTION = type(lambda: None)


def of(value: Any) -> Tuple[Optional[str], str]:
    """`file:line` (None for native code) and qualified name of what calling `value` runs."""
    for function in surface.reach(value):
        return place(function.__code__), function.__qualname__
    kind = value if isinstance(value, type) else type(value)
    for name in ("__call__", "find_spec", "run", "__init__"):
        method = kind.__dict__.get(name) or next((b.__dict__[name] for b in kind.__mro__ if name in b.__dict__), None)
        if isinstance(method, (_FUNCTION, classmethod, staticmethod)):
            for function in surface.reach(method):
                return place(function.__code__), "%s.%s" % (kind.__module__, kind.__qualname__)
    return None, "%s.%s" % (kind.__module__, kind.__qualname__)


def place(found: Any) -> str:
    """`file:line` of a code object."""
    name = found.co_filename
    return "%s:%d" % (name if name[:1] == "<" else os.path.abspath(name), found.co_firstlineno)


def is_ours(value: Any) -> bool:
    """Whether `value` is the guard's: a function (or bound method, or object) of a module loaded by our boot file.

    Judged by the namespace the function runs in, which is the very one of a guard module, not by its name.
    """
    for function in surface.reach(value):
        return _in_guard(function)
    kind = vars(type(value))
    method = kind.get("__call__") or kind.get("find_spec")
    return isinstance(method, _FUNCTION) and _in_guard(method)


def _in_guard(function: Any) -> bool:
    name = function.__globals__.get("__name__", "")
    module = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or vars(module) is not function.__globals__:
        return False
    own_file = str(function.__code__.co_filename).startswith(_OWN)
    return own_file and name.split(".")[0] == str(__package__).split(".")[0]


class Inventory:
    """What was found so far, so that a sweep reports only what is new."""

    def __init__(self) -> None:
        self.seen: Dict[Tuple[str, ...], int] = {}

    def news(self, found: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Group equal lines ({"kind", "origin", "function", "on"}) and return the new ones, with their counts."""
        grouped: Dict[Tuple[str, ...], Dict[str, Any]] = {}
        for line in found:
            key: Tuple[str, ...] = (line["kind"], str(line["origin"]), str(line["function"]), str(line.get("name", "")))
            entry = grouped.setdefault(key, dict(line, count=0))
            entry["count"] += 1
        new = [entry for key, entry in grouped.items() if self.seen.get(key, 0) < entry["count"]]
        for key, entry in grouped.items():
            self.seen[key] = max(self.seen.get(key, 0), entry["count"])
        return new
