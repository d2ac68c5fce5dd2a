"""Files that a script names in its own text: defaults of its options, and literals it reads or writes.

`add_argument("--data", default="rows.csv")` counts as if the command said it. `torch.load("start.pt")`, `open(NAME)`
with NAME = "rows.csv" and `Path("rows.csv").read_text()` name files that are read; whatever is also saved, dumped or
opened for writing under that name is an output. Only the text is read, nothing of it is run, so names that are put
together at run time are not seen.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

TEXT_LIMIT_BYTES = 1 << 20
WORD_LIMIT = 1024
WORDS_LIMIT = 1000

READS = re.compile(r"^(open|safe_open|fromfile|memmap|genfromtxt|imread|load\w*|read\w*|from_(file|csv|json|parquet))$")
WRITES = re.compile(
    r"^(save\w*|dump|to_(csv|json|parquet|pickle|hdf)|write\w*|export|tofile|FileHandler|mkdir|makedirs)$"
)
MODE = re.compile(r"[rwxabt+]{1,4}")
DECLARES = frozenset({"add_argument", "option", "argument"})
"""argparse, click and typer."""


@dataclass(frozen=True, slots=True)
class Literals:
    """What the text of a script names. Words as they stand there, in order, once each."""

    options: tuple[tuple[str, str], ...] = ()
    """(option without dashes, lower case; default)."""
    read: tuple[str, ...] = ()
    written: tuple[str, ...] = ()


def literals_of(source: bytes) -> Literals:
    """The literals of a script's text; none of a text that is too long or no Python."""
    if len(source) > TEXT_LIMIT_BYTES:
        return Literals()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Literals()
    names = _constants(tree)
    options: dict[tuple[str, str], None] = {}
    read: dict[str, None] = {}
    written: dict[str, None] = {}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        function = _name(call.func)
        if function in DECLARES:
            options.update(dict.fromkeys(_defaults(call, names)))
        elif WRITES.match(function) or (function == "open" and _opens_to_write(call)):
            written.update(dict.fromkeys(_words(call, names)))
        elif READS.match(function):
            read.update(dict.fromkeys(_words(call, names)))
    return Literals(
        options=tuple(options)[:WORDS_LIMIT],
        read=tuple(word for word in read if word not in written)[:WORDS_LIMIT],
        written=tuple(written)[:WORDS_LIMIT],
    )


def _constants(tree: ast.AST) -> dict[str, str]:
    """Names that are given one string and nothing else, anywhere in the text."""
    given: dict[str, set[str | None]] = {}
    plain: set[ast.expr] = set()
    for node in ast.walk(tree):  # a statement before the names in it
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            plain.add(node.targets[0])
            given.setdefault(node.targets[0].id, set()).add(_text(node.value, {}))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in plain:
            given.setdefault(node.id, set()).add(None)
        elif isinstance(node, ast.arg):
            given.setdefault(node.arg, set()).add(None)
    return {name: text for name, texts in given.items() if len(texts) == 1 for text in texts if text is not None}


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _text(value: ast.expr | None, names: dict[str, str]) -> str | None:
    if isinstance(value, ast.Constant) and isinstance(value.value, str) and 0 < len(value.value) <= WORD_LIMIT:
        return value.value
    return names.get(value.id) if isinstance(value, ast.Name) else None


def _words(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    """The first two arguments, every named one, and what the method's Path was made of."""
    places: list[ast.expr] = [*call.args[:2], *(keyword.value for keyword in call.keywords)]
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call):
        owner = call.func.value
        places += owner.args[:1] if _name(owner.func) == "Path" else []
    for place in places:
        inner = place.args[0] if isinstance(place, ast.Call) and _name(place.func) == "Path" and place.args else place
        text = _text(inner, names)
        if text is not None:
            yield text


def _opens_to_write(call: ast.Call) -> bool:
    """`open(NAME, "w")`, `Path(NAME).open("w")`: whether its mode says that it writes."""
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes += call.args[:1] if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call) else []
    modes += call.args[1:2]
    return any(MODE.fullmatch(text) is not None and bool(set(text) & set("wax+")) for text in map(_constant, modes))


def _constant(place: ast.expr) -> str:
    return place.value if isinstance(place, ast.Constant) and isinstance(place.value, str) else ""


def _defaults(call: ast.Call, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    flags = [flag for flag in map(_constant, call.args) if flag]
    long = [flag for flag in flags if flag.startswith("--")] or flags
    default = next((_text(keyword.value, names) for keyword in call.keywords if keyword.arg == "default"), None)
    if long and default is not None:
        yield long[0].lstrip("-").lower(), default
