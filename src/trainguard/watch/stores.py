"""What source says of who may change a value: names bound once, attributes that are assigned, cells that are constants.

Link *surface* asks when a value that code reads is not what it was: a counter that the code itself moves is no news, a
number that nothing in the code assigns is. All answers come from syntax trees and bytecode of verified source.
"""

from __future__ import annotations

import ast
import dis
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from .facts import _stored

LITERAL, FLAG, COMPUTED = "literal", "flag", "computed"
"""An assignment's value: a number or text as it stands, True, False or None, or anything that is computed."""

LOOPS = (ast.For, ast.AsyncFor, ast.While)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)

Stores = Dict[str, List[Tuple[int, str]]]


def bound_once(tree: ast.Module) -> Set[str]:
    """Names that the module's own statements bind exactly once, in no loop, and that no function declares global."""
    times: Dict[str, int] = {}
    for node, again in _nodes(tree, False):
        name = _stored(node)
        if name is not None:
            times[name] = times.get(name, 0) + (2 if again else 1)
    moved: Set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            moved.update(node.names)
    return {name for name, count in times.items() if count == 1 and name not in moved}


def _nodes(node: Any, again: bool) -> Iterator[Tuple[Any, bool]]:
    """Nodes of the module's own scope, and whether they may run more than once."""
    for child in ast.iter_child_nodes(node):
        inside = again or isinstance(node, LOOPS)
        yield child, inside
        if not isinstance(child, SCOPES):
            yield from _nodes(child, inside)


def stores(tree: ast.Module) -> Stores:
    """Attribute → where it is assigned to, of whatever object, and what: {name: [(line, kind of value)]}."""
    found: Stores = {}
    for node in _after_making(tree):
        for name, value in _stored_by(node):
            found.setdefault(name, []).append((int(node.lineno), _kind(value)))
    return found


MAKERS = ("__init__", "__post_init__", "__new__")
"""Methods that make an object: what they assign is there before anybody looks."""


def _after_making(node: Any) -> Iterator[Any]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.FunctionDef) and child.name in MAKERS):
            yield child
            yield from _after_making(child)


def _stored_by(node: Any) -> Iterator[Tuple[str, Any]]:
    """(attribute, value's node or None where it is computed) of one statement or call."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            for name in _attributes(target):
                yield name, node.value if _attribute(target) is not None else None
    elif isinstance(node, (ast.AugAssign, ast.For, ast.AsyncFor)):
        for name in _attributes(node.target):
            yield name, None
    elif isinstance(node, ast.Delete):
        for target in node.targets:
            for name in _attributes(target):
                yield name, None
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and isinstance(node.args[1], ast.Constant):
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called in ("setattr", "__setattr__", "delattr", "__delattr__") and isinstance(node.args[1].value, str):
            yield node.args[1].value, node.args[2] if len(node.args) > 2 else None


def _attributes(target: Any) -> Iterator[str]:
    """Every attribute that one target of an assignment names, in tuples too."""
    for node in ast.walk(target):
        name = _attribute(node)
        if name is not None:
            yield name


def _attribute(node: Any) -> Optional[str]:
    """`name` of `thing.name = …`, `globals()["name"] = …`, `vars(thing)["name"] = …`, `thing.__dict__["name"] = …`."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return node.attr
    if not (isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del))):
        return None
    key, of = node.slice, node.value
    if isinstance(key, ast.Index):  # Python 3.8
        key = key.value  # type: ignore[attr-defined]
    spaces = isinstance(of, ast.Call) and getattr(of.func, "id", "") in ("globals", "vars")
    if (spaces or getattr(of, "attr", "") == "__dict__") and isinstance(key, ast.Constant):
        return key.value if isinstance(key.value, str) else None
    return None


def _kind(value: Any) -> str:
    if value is None:
        return COMPUTED
    try:
        plain = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return COMPUTED
    return FLAG if plain is None or isinstance(plain, bool) else LITERAL


def is_constant_cell(module_code: Any, function_code: Any, name: str) -> bool:
    """Whether the free variable `name` of this function is bound once and for all by the code that encloses it.

    Then nothing that Python code does in the ordinary way can change what the cell holds: no `nonlocal`, no second
    assignment, none in a loop. False where the enclosing code is not found.
    """
    chain = _chain(module_code, function_code)
    for owner in reversed(chain[:-1]):
        if name in owner.co_cellvars:
            return _times_stored(owner, name) <= 1
        if name not in owner.co_freevars:
            return False
    return False


def _chain(parent: Any, wanted: Any) -> List[Any]:
    """Code objects from the module down to `wanted`; empty where it is not in there."""
    if parent is wanted or parent == wanted:
        return [parent]
    for inner in _inner(parent):
        found = _chain(inner, wanted)
        if found:
            return [parent, *found]
    return []


def _inner(parent: Any) -> List[Any]:
    return [value for value in parent.co_consts if isinstance(value, type(parent))]


def _times_stored(owner: Any, name: str) -> int:
    """How often the variable may be bound: as an argument, by stores (those in a loop count twice), by inner code."""
    arguments = owner.co_argcount + owner.co_kwonlyargcount + bool(owner.co_flags & 4) + bool(owner.co_flags & 8)
    times = int(name in owner.co_varnames[:arguments])
    instructions = list(dis.get_instructions(owner))
    # Stored where a jump backwards can lead to again: twice.
    loops = [(one.argval, one.offset) for one in instructions if _jumps_back(one)]
    for one in instructions:
        if one.opname in ("STORE_DEREF", "DELETE_DEREF") and one.argval == name:
            times += 2 if any(first <= one.offset <= last for first, last in loops) else 1
    waiting = _inner(owner)
    while waiting:
        code = waiting.pop()
        if name in code.co_freevars:
            writes = ("STORE_DEREF", "DELETE_DEREF")
            times += 2 * sum(one.opname in writes and one.argval == name for one in dis.get_instructions(code))
            waiting.extend(_inner(code))
    return times


def _jumps_back(one: Any) -> bool:
    jumps = "JUMP" in one.opname and isinstance(one.argval, int)
    return jumps and one.argval <= one.offset
