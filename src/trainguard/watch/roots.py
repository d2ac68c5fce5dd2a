"""Which modules are the roots of the job's models, and what their parameters are called.

Uses torch's global *registration* hooks: they run while a model is built and cost nothing afterwards (a global
forward hook would cost 2 % of every step and make torch.compile warn). Only weak references are kept.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, Dict, List, Tuple

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Modules that only wrap one model: its parameters go by the names the model itself gives them."""

_seen: Dict[int, Any] = {}
_parents: Dict[int, Tuple[Any, Any]] = {}
"""id of a child module → weak references to itself and to the module it was put into."""


def install(torch: Any) -> None:
    """Listen to modules and parameters being registered."""
    module = torch.nn.modules.module
    module.register_module_module_registration_hook(_on_module)
    module.register_module_parameter_registration_hook(_on_parameter)


def _on_module(module: Any, name: str, child: Any) -> None:
    try:
        _seen[id(module)] = weakref.ref(module)
        if child is not None:
            _parents[id(child)] = (weakref.ref(child), weakref.ref(module))
    except Exception:
        pass


def _on_parameter(module: Any, name: str, parameter: Any) -> None:
    try:
        _seen[id(module)] = weakref.ref(module)
    except Exception:
        pass


def roots() -> List[Any]:
    """The outermost live modules that hold parameters, largest first; wrappers removed."""
    found: Dict[int, Any] = {}
    for key in list(_seen):
        module = _seen[key]()
        if module is None:
            del _seen[key]
        elif not _has_parent(module):
            _add(found, module)
    torch = sys.modules["torch"]
    main = sys.modules.get("__main__")
    for value in list(vars(main).values()) if main is not None else []:
        if torch.nn.Module in type(value).__mro__ and not _has_parent(value):
            _add(found, value)
    return sorted(found.values(), key=lambda module: -sum(1 for _ in module.parameters()))


def names() -> Dict[int, str]:
    """id of every parameter of every root → its name there."""
    table: Dict[int, str] = {}
    for root in roots():
        for name, parameter in root.named_parameters():
            table.setdefault(id(parameter), name)
    return table


def wrappers() -> List[Any]:
    """Live modules that only wrap a model for data parallelism."""
    found = [_seen[key]() for key in list(_seen)]
    return [module for module in found if module is not None and type(module).__name__ in WRAPPERS]


def _add(found: Dict[int, Any], module: Any) -> None:
    inner = unwrapped(module)
    if next(inner.parameters(), None) is not None:
        found[id(inner)] = inner


def unwrapped(module: Any) -> Any:
    """`module` without data-parallel and compile wrappers around it."""
    for _ in range(8):
        attribute = WRAPPERS.get(type(module).__name__)
        inner = getattr(module, attribute, None) if attribute else None
        if inner is None:
            return module
        module = inner
    return module


def _has_parent(module: Any) -> bool:
    entry = _parents.get(id(module))
    if entry is None or entry[0]() is not module:
        return False
    return entry[1]() is not None
