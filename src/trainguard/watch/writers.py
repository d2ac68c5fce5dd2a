"""Which lines of the job's own source set hyper-parameters, flags, settings and weights: read once, when first needed.

Only files outside the installed packages and the standard library count, and those whose functions are running the
step: what a training script does to its own rates is written there. Of an installed package, other than torch, the
classes count that an optimizer is of, or of which an object holds it: a library's schedule. The judge uses the list to
tell a schedule from a change that no line explains.
"""

from __future__ import annotations

import ast
import gc
import os
import sys
import sysconfig
from typing import Any, Dict, Iterable, List, Optional, Set

from . import facts

FILE_LIMIT_BYTES = 1 << 20
FILES_LIMIT = 400
PLACES_LIMIT = 16
RESTORERS_LIMIT = 64
NAMES_LIMIT = 500
FRAMES_LIMIT = 200
HOLD_DEPTH, RING_LIMIT, HOLDERS_LIMIT = 3, 256, 64
OWN_PACKAGE = __name__.partition(".")[0]
NOT_A_JOBS = frozenset(
    ("torch", OWN_PACKAGE, *getattr(sys, "stdlib_module_names", ()), "builtins", "_frozen_importlib")
)
"""Top-level modules whose classes and functions are nobody's schedule, or known to the judge by themselves."""
SETTING = ("set_", "use_", "detect_anomaly")
"""How functions of torch that set a flag begin."""
RESTORING = frozenset(("load_state_dict", "reset_parameters", "copy_", "vector_to_parameters"))
"""Calls that put other values into a tensor as a whole."""
ANY = "*"
"""Name under which stores with a computed key are listed, in files that also speak of `param_groups`."""


def places() -> Dict[str, List[str]]:
    """Hyper-parameter name → `file:line` of every store `…["name"] = …` in the job's own loaded source."""
    found: Dict[str, Set[str]] = {}
    for path in sorted({*own_files()[:FILES_LIMIT], *_running()}):
        _try(path, found)
    return _told(found)


def restorers() -> List[str]:
    """`file:line` of every line that puts other values into weights as a whole: restored, averaged or begun again.

    Likeliest first: the job's own files whose functions are running, innermost first, its others, then packages'.
    """
    own = set(own_files()[:FILES_LIMIT])
    running = _running()
    found: List[str] = []
    for path in (*(p for p in running if p in own), *sorted(own), *running):
        if len(found) < RESTORERS_LIMIT:
            found += (place for place in _restorers_of(path) if place not in found)
    return found[:RESTORERS_LIMIT]


def _restorers_of(path: str) -> List[str]:
    try:
        if os.path.getsize(path) > FILE_LIMIT_BYTES:
            return []
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = _restoring(file.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return ["%s:%d" % (path, line) for line in sorted(set(lines))]


def _restoring(text: str) -> List[int]:
    """Line numbers; `….data = …` counts where the file speaks of torch: messages and buffers have data as well."""
    lines: List[int] = []
    tensors = "torch" in text
    node: Any
    for node in ast.walk(facts.parse(text)):
        called = node.func if isinstance(node, ast.Call) else None
        name = getattr(called, "attr", getattr(called, "id", ""))
        holder = getattr(called, "value", None)
        filled = name.endswith("_") and getattr(holder, "attr", getattr(holder, "id", "")) == "init"
        stored = tensors and any(
            isinstance(target, ast.Attribute) and target.attr == "data" for target in _targets(node)
        )
        if name in RESTORING or filled or stored:
            lines.append(node.lineno)
    return lines


def places_within(kinds: Iterable[type]) -> Dict[str, List[str]]:
    """The same in the bodies of these classes and their bases, those of torch, the guard and the library left out."""
    found: Dict[str, Set[str]] = {}
    wanted: Dict[str, Set[str]] = {}
    for kind in kinds:
        for base in kind.__mro__:
            path = getattr(sys.modules.get(base.__module__), "__file__", None)
            if base.__module__.partition(".")[0] not in NOT_A_JOBS and isinstance(path, str) and path.endswith(".py"):
                wanted.setdefault(os.path.abspath(path), set()).add(base.__qualname__.rpartition(".")[2])
    for path, names in sorted(wanted.items())[:FILES_LIMIT]:
        _try(path, found, names)
    return _told(found)


def holders(optimizer: Any) -> List[type]:
    """Classes of objects that hold an optimizer, directly or in a list or a table: schedulers, trainers, handlers.

    Three looks over the heap, some 20 ms each; nothing of the objects is called.
    """
    kinds: Dict[type, None] = {}
    ring: List[Any] = [optimizer, optimizer.param_groups]
    known = {id(ring)}
    for _ in range(HOLD_DEPTH):
        found = gc.get_referrers(*ring)
        known.add(id(found))
        ring = []
        for each in found:
            kind = type(each)
            if kind in (dict, list, tuple):
                if id(each) not in known:
                    ring.append(each)
            elif kind.__module__.partition(".")[0] not in NOT_A_JOBS:
                kinds.setdefault(kind)
        known.add(id(ring))
        if not ring or len(ring) > RING_LIMIT:
            break
    return list(kinds)[:HOLDERS_LIMIT]


def _running() -> List[str]:
    """Files of the functions being run, innermost first, those of torch, the guard and the library left out."""
    out: Dict[str, None] = {}
    frame: Optional[Any] = sys._getframe(1)
    for _ in range(FRAMES_LIMIT):
        if frame is None:
            break
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in NOT_A_JOBS and frame.f_code.co_filename.endswith(".py"):
            out.setdefault(os.path.abspath(frame.f_code.co_filename))
        frame = frame.f_back
    return list(out)


def _try(path: str, found: Dict[str, Set[str]], names: Optional[Set[str]] = None) -> None:
    try:
        _read(path, found, names)
    except (OSError, SyntaxError, ValueError, RecursionError):
        pass


def _told(found: Dict[str, Set[str]]) -> Dict[str, List[str]]:
    return {name: sorted(lines)[:PLACES_LIMIT] for name, lines in found.items()}


def setters() -> Dict[str, List[List[Any]]]:
    """Name → [`file:line`, value or None] of every store `….name = value`, and call that sets a flag, of the job's own.

    The value is told where it is written there: `[]` of nothing, `[value]` of a number, text, True or None.
    """
    found: Dict[str, Dict[str, List[Any]]] = {}
    for path in own_files()[:FILES_LIMIT]:
        try:
            if os.path.getsize(path) <= FILE_LIMIT_BYTES:
                with open(path, encoding="utf-8", errors="replace") as file:
                    _stores(path, file.read(), found)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
    return {
        name: [[place, value] for place, value in sorted(places.items())[:PLACES_LIMIT]]
        for name, places in sorted(found.items())[:NAMES_LIMIT]
    }


def _stores(path: str, text: str, found: Dict[str, Dict[str, List[Any]]]) -> None:
    for node in ast.walk(facts.parse(text)):
        value = getattr(node, "value", None) if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        names = [target.attr for target in _targets(node) if isinstance(target, ast.Attribute)]
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            names = [called] if isinstance(called, str) and called.startswith(SETTING) else []
            value = node.args[0] if node.args else None
        for name in names:
            told = [value.value] if isinstance(value, ast.Constant) and _tellable(value.value) else []
            found.setdefault(name, {})["%s:%d" % (path, getattr(node, "lineno", 0))] = told


def _tellable(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 100)


def own_files() -> List[str]:
    """Source files of loaded modules that belong neither to the standard library nor to an installed package."""
    paths = sysconfig.get_paths()
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    outside = tuple(os.path.join(paths[name], "") for name in ("stdlib", "platstdlib") if name in paths)
    out: List[str] = []
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith(".py"):
            continue
        path = os.path.abspath(path)
        if "site-packages" in path or "dist-packages" in path or path.startswith((*outside, here)):
            continue
        out.append(path)
    return sorted(set(out))


def _read(path: str, found: Dict[str, Set[str]], names: Optional[Set[str]]) -> None:
    """Stores in a file; with `names` only those in the bodies of its classes of these names."""
    if os.path.getsize(path) > FILE_LIMIT_BYTES:
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    if "param_groups" not in text and '"lr"' not in text and "'lr'" not in text:
        return
    tree = facts.parse(text)
    parts = [tree] if names is None else [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name in names]
    for node in (node for part in parts for node in ast.walk(part)):
        for target in _targets(node):
            if isinstance(target, ast.Subscript):
                _add(found, target, path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
            for keyword in node.keywords:
                if keyword.arg:
                    found.setdefault(keyword.arg, set()).add("%s:%d" % (path, node.lineno))


def _targets(node: Any) -> List[Any]:
    if isinstance(node, ast.Assign):
        return [
            each for target in node.targets for each in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
    if isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        return [node.target]
    return []


def _add(found: Dict[str, Set[str]], target: Any, path: str) -> None:
    key: Any = target.slice
    if key.__class__.__name__ == "Index":  # Python 3.8
        key = key.value
    name = key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None
    if name is None and isinstance(key, ast.Constant):
        return
    found.setdefault(name or ANY, set()).add("%s:%d" % (path, target.lineno))
