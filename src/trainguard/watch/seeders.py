"""Which lines of the job's own source seed or set random generators again and again: inside a loop or a function.

numpy and Python do not say who seeded them, as torch does. A judge who sees that their streams left their course asks
this list whether the job's own code has a line that does such a thing.
"""

from __future__ import annotations

import ast
import os
from typing import List

from . import facts, writers

NAMES = frozenset(
    {"seed", "manual_seed", "set_seed", "seed_everything", "seed_all", "setstate", "set_state", "set_rng_state"}
)
LINES_LIMIT = 32


def places() -> List[str]:
    """`file:line` of every call that seeds, in loops and functions of the job's own loaded source, 32 at most."""
    found: List[str] = []
    for path in writers.own_files()[: writers.FILES_LIMIT]:
        try:
            _read(path, found)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
    return sorted(set(found))[:LINES_LIMIT]


def _read(path: str, found: List[str]) -> None:
    if os.path.getsize(path) > writers.FILE_LIMIT_BYTES:
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    if not any(name in text for name in NAMES):
        return
    for outer in ast.walk(facts.parse(text)):
        if not isinstance(outer, (ast.For, ast.While, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        for node in ast.walk(outer):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
                if name in NAMES:
                    found.append("%s:%d" % (path, node.lineno))
