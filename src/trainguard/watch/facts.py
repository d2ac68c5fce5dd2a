"""What a source file says about its functions: default values and constants, read from its syntax tree.

Link *surface* compares live functions with these. A code object does not hold the defaults of its function, and a
module's constants can be rebound; both are told by the source alone. Values that are not plain literals are left out.
"""

from __future__ import annotations

import ast
import os
import threading
from typing import Any, Dict, List, Optional, Set, Tuple, Union

Literal = Any
"""None, bool, int, float, complex, str, bytes, or a tuple of these: what marshal keeps and `==` compares."""

UNKNOWN = "?"
"""Marks a default that is computed; a literal default is wrapped in a tuple of one."""

Facts = Dict[str, Any]


ATTEMPTS = 3
_turn = threading.RLock()


def parse(text: Union[str, bytes]) -> ast.Module:
    """The syntax tree of a module, whatever other threads do. Raises SyntaxError or ValueError as `ast.parse` does.

    CPython 3.11 keeps the depth of a running conversion to syntax nodes for the whole interpreter: two threads that
    convert at once raise "SystemError: AST constructor recursion depth mismatch". Ours take turns, and one that still
    meets the job's own is repeated.
    """
    with _turn:
        for _ in range(ATTEMPTS - 1):
            try:
                return ast.parse(text)
            except SystemError:
                continue
        return ast.parse(text)


def _forked() -> None:
    """In a child: a thread of the parent may have held the turn."""
    global _turn
    _turn = threading.RLock()


os.register_at_fork(after_in_child=_forked)


def read(data: bytes) -> Facts:
    """The facts of one source file.

    "functions": {(name, first line): (defaults, keyword defaults)}: defaults is a tuple of (literal,) or UNKNOWN,
    keyword defaults a dict of the same. The first line is that of the first decorator, as in co_firstlineno.
    "constants": {name: literal}: names bound exactly once, at module level, to a literal, and never declared global.
    """
    tree = parse(data)
    functions: Dict[Tuple[str, int], Any] = {}
    rebound: Set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            functions[(node.name, _first_line(node))] = _defaults(node.args)
        elif isinstance(node, ast.Global):
            rebound.update(node.names)
    return {"functions": functions, "constants": _constants(tree, rebound)}


def _first_line(node: Any) -> int:
    decorators: List[Any] = node.decorator_list
    return int(decorators[0].lineno if decorators else node.lineno)


def _defaults(arguments: ast.arguments) -> Tuple[Any, Dict[str, Any]]:
    positional = tuple(_literal(default) for default in arguments.defaults)
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults)
    return positional, {argument.arg: _literal(default) for argument, default in pairs if default is not None}


def _constants(tree: ast.Module, rebound: Set[str]) -> Dict[str, Literal]:
    """Constants among the module's own statements; a name bound twice anywhere at module level is left out."""
    found: Dict[str, Literal] = {}
    times: Dict[str, int] = {}
    for node in _own_nodes(tree):
        name = _stored(node)
        if name is not None:
            times[name] = times.get(name, 0) + 1
    for statement in tree.body:
        target, value = _assignment(statement)
        if target is None or value is None or target in rebound or times.get(target) != 1:
            continue
        literal = _literal(value)
        if literal != UNKNOWN:
            found[target] = literal[0]
    return found


def _own_nodes(node: Any) -> Any:
    """Nodes of the module's own scope: not those inside functions and classes, but the names of these."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from _own_nodes(child)


def _stored(node: Any) -> Optional[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return node.id
    if isinstance(node, ast.alias):
        return node.asname or node.name.split(".")[0]
    return None


def _assignment(statement: Any) -> Tuple[Optional[str], Any]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return None, None
    return (target.id if isinstance(target, ast.Name) else None), statement.value


def _literal(node: Any) -> Any:
    """(value,) for a literal, else UNKNOWN."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return UNKNOWN
    return (value,) if _plain(value) else UNKNOWN


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def same(expected: Literal, found: Any) -> bool:
    """Equal in value and in type, tuples item by item: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if type(expected) is not type(found):
        return False
    if isinstance(expected, tuple):
        return len(expected) == len(found) and all(map(same, expected, found))
    return bool(expected == found) and repr(expected) == repr(found)
