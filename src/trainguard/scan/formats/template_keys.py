"""What a chat template looks things up by, from its syntax tree.

A template outside a sandbox gets out by one road: it makes a text such as `__class__`, out of pieces so that nobody
reads it, and looks it up (`x[text]`, `map(attribute=text)`). Ordinary templates look up plain words, numbers, loop
variables and what the conversation holds; none makes a key from pieces. So a key is followed to where it comes from,
and one that is put together, formatted, filtered, returned by a call or taken from the tokenizer's own texts (they come
from the file too) is refused, whatever text it would give.

Jinja's own parser reads the template; nothing is compiled or rendered. What Jinja cannot parse, Jinja will not render.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes

UNDERSCORES = re.compile(r"(?<!_)__(?=[^\W_])|(?<=[^\W_])__(?!_)")
"""Two underscores before or behind a word, as in `__class__`; a line made of underscores is none."""
BY_ATTRIBUTE = frozenset(
    ("map", "selectattr", "rejectattr", "groupby", "sum", "sort", "unique", "min", "max", "join", "dictsort")
)
"""Filters that look an attribute up by text."""
NUMBERS = frozenset(("length", "count", "int", "float", "abs", "round"))
"""Filters whose result is a number."""
SAME_ITEMS = frozenset(
    ("list", "sort", "unique", "reverse", "selectattr", "rejectattr", "select", "reject", "dictsort")
)
SAME_ITEMS |= frozenset(("items", "default", "d", "batch", "slice", "trim"))
"""Filters whose items are those they are given."""
READS = frozenset(("items", "keys", "values", "get", "copy"))
"""Methods of a dict whose results are what it holds."""
CUTS = frozenset(("split", "rsplit", "strip", "lstrip", "rstrip"))
"""Methods of a text whose results are pieces of it; of what the conversation holds, that is."""
DEPTH = 200
FAMILY = ("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow", "Neg", "Pos")


def made_key(template: str) -> str | None:
    """How `template` looks something up by a text it makes, or None; None too for what is no Jinja."""
    from jinja2 import TemplateError

    try:
        tree = _environment().parse(template)
        return _Keys(tree).problem()
    except TemplateError:
        return None
    except RecursionError:
        return "is nested too deeply"


def _environment() -> Any:
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """transformers' `{% generation %}` block."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do", Generation], autoescape=False)  # noqa: S701 - nothing is rendered


class _Keys:
    """The keys of one template, each followed to where it comes from."""

    def __init__(self, tree: nodes.Template) -> None:
        from jinja2 import nodes

        self._nodes = nodes
        self._tree = tree
        self._sources: dict[str, list[Any]] = {}
        """Name, or `name.field` of a namespace → every expression it is given."""
        self._made: set[str] = set()
        """Names that hold text nobody can follow: blocks, parameters that are passed on."""
        self._under_way: set[str] = set()
        self._collect()

    def problem(self) -> str | None:
        """The first key that is made, in words."""
        nodes = self._nodes
        for text in self._tree.find_all(nodes.Const):
            if isinstance(text.value, str) and UNDERSCORES.search(text.value):
                return "holds the text of an underscore name"
        for found in self._tree.find_all(nodes.Getitem):
            if not self._plain(found.arg, 0):
                return "looks something up by text it makes"
        for found in self._tree.find_all(nodes.Filter):
            if not all(self._plain(name, 0) for name in _attribute_names(found, self._nodes)):
                return f"looks something up by text it makes ({found.name} filter)"
        return None

    # Where names come from ---------------------------------------------------------------------------------------

    def _collect(self) -> None:
        nodes = self._nodes
        for found in self._tree.find_all((nodes.Assign, nodes.For, nodes.AssignBlock, nodes.With)):
            if isinstance(found, nodes.Assign):
                self._give(found.target, found.node)
            elif isinstance(found, nodes.For):
                self._give(found.target, found.iter)
            elif isinstance(found, nodes.With):
                for target, value in zip(found.targets, found.values, strict=True):
                    self._give(target, value)
            else:
                self._made |= set(_names(nodes, found.target))
        self._macros()

    def _give(self, target: Any, value: Any) -> None:
        for name in _names(self._nodes, target):
            self._sources.setdefault(name, []).append(value)
        if isinstance(value, self._nodes.Call):  # namespace(last=…)
            for name in _names(self._nodes, target):
                for pair in value.kwargs:
                    self._sources.setdefault(f"{name}.{pair.key}", []).append(pair.value)

    def _macros(self) -> None:
        nodes = self._nodes
        macros = {found.name: found for found in self._tree.find_all(nodes.Macro)}
        calls = [found for found in self._tree.find_all(nodes.Call) if isinstance(found.node, nodes.Name)]
        called = {id(found.node) for found in calls}
        for name in self._tree.find_all(nodes.Name):
            if name.name in macros and name.ctx == "load" and id(name) not in called:
                self._made |= {argument.name for argument in macros[name.name].args}
        for block in self._tree.find_all(nodes.CallBlock):
            self._made |= {argument.name for argument in block.args}
        for macro in macros.values():
            names = [argument.name for argument in macro.args]
            for name, value in zip(reversed(names), reversed(macro.defaults), strict=False):
                self._sources.setdefault(name, []).append(value)
            for call in calls:
                if call.node.name == macro.name:
                    self._pass(names, call)

    def _pass(self, names: list[str], call: Any) -> None:
        for name, value in zip(names, call.args, strict=False):
            self._sources.setdefault(name, []).append(value)
        for pair in call.kwargs:
            self._sources.setdefault(pair.key, []).append(pair.value)
        if call.dyn_args is not None or call.dyn_kwargs is not None:
            self._made |= set(names)

    # Whether an expression is plain ------------------------------------------------------------------------------

    def _plain(self, node: Any, depth: int) -> bool:
        """Whether `node` gives a number, a word that stands there, or something the conversation holds."""
        nodes = self._nodes
        if depth > DEPTH:
            return False
        if node is None or isinstance(node, nodes.Const | nodes.Compare | nodes.Test | nodes.Not | nodes.Slice):
            return not (isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value.startswith("_"))
        if isinstance(node, nodes.Name):
            return self._plain_name(node.name, depth)
        if isinstance(node, nodes.Getattr):
            return self._plain_field(node, depth)
        if isinstance(node, nodes.Getitem):
            return self._plain(node.node, depth + 1)
        if isinstance(node, nodes.Call):
            return self._plain_call(node, depth)
        if isinstance(node, nodes.Filter):
            return self._plain_filter(node, depth)
        if type(node).__name__ in FAMILY:
            return self._number(node, depth)
        known = nodes.List | nodes.Tuple | nodes.CondExpr | nodes.And | nodes.Or | nodes.Dict | nodes.Pair
        return isinstance(node, known) and all(self._plain(part, depth + 1) for part in node.iter_child_nodes())

    def _plain_name(self, name: str, depth: int) -> bool:
        if name in self._made or name in ("varargs", "kwargs", "caller") or name.endswith(("_token", "_tokens")):
            return False
        if name in self._under_way:
            return True  # what it is given is being looked at
        self._under_way.add(name)
        try:
            return all(self._plain(value, depth + 1) for value in self._sources.get(name, ()))
        finally:
            self._under_way.discard(name)

    def _plain_field(self, node: Any, depth: int) -> bool:
        if isinstance(node.node, self._nodes.Name):
            return self._plain_name(f"{node.node.name}.{node.attr}", depth)
        return self._plain(node.node, depth + 1)

    def _plain_call(self, node: Any, depth: int) -> bool:
        nodes = self._nodes
        if isinstance(node.node, nodes.Name) and node.node.name in ("range", "namespace"):
            return True
        if not isinstance(node.node, nodes.Getattr) or node.node.attr not in READS | CUTS:
            return False
        if node.node.attr in CUTS and self._is_text(node.node.node, depth + 1):
            return False
        return self._plain(node.node.node, depth + 1) and all(self._plain(arg, depth + 1) for arg in node.args)

    def _plain_filter(self, node: Any, depth: int) -> bool:
        if node.name in NUMBERS:
            return True
        if node.name not in SAME_ITEMS or self._is_text(node.node, depth + 1):
            return False
        return self._plain(node.node, depth + 1) and all(self._plain(arg, depth + 1) for arg in _arguments(node))

    def _number(self, node: Any, depth: int) -> bool:
        """Arithmetic on what is plain and no text; `+` joins texts, `%` formats and `*` repeats them."""
        nodes = self._nodes
        parts = list(node.iter_child_nodes())
        texts = [part for part in parts if isinstance(part, nodes.Const) and isinstance(part.value, str)]
        return not texts and all(self._plain(part, depth + 1) and not self._is_text(part, depth) for part in parts)

    def _is_text(self, node: Any, depth: int) -> bool:
        """Whether a name holds text that the template itself wrote down."""
        nodes = self._nodes
        if depth > DEPTH:
            return True
        if isinstance(node, nodes.Const):
            return isinstance(node.value, str)
        if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict | nodes.Pair | nodes.CondExpr):
            return any(self._is_text(part, depth + 1) for part in node.iter_child_nodes())
        if isinstance(node, nodes.Getitem | nodes.Filter):
            return self._is_text(node.node, depth + 1)
        key = node.name if isinstance(node, nodes.Name) else None
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            key = f"{node.node.name}.{node.attr}"
        if key is None or f"text:{key}" in self._under_way:
            return False
        self._under_way.add(f"text:{key}")
        try:
            return any(self._is_text(value, depth + 1) for value in self._sources.get(key, ()))
        finally:
            self._under_way.discard(f"text:{key}")


def _attribute_names(node: Any, nodes: Any) -> Iterator[Any]:
    """The arguments by which a filter looks attributes up: the first, or `attribute=`; join's is its second."""
    if node.name not in BY_ATTRIBUTE:
        return
    yield from (pair.value for pair in node.kwargs if pair.key == "attribute")
    yield from (part for part in (node.dyn_args, node.dyn_kwargs) if part is not None)
    first = node.args[0].value if node.args and isinstance(node.args[0], nodes.Const) else None
    if node.name == "join":
        yield from node.args[1:2]
    else:
        yield from node.args if first in BY_ATTRIBUTE else node.args[:1]


def _arguments(node: Any) -> Iterator[Any]:
    yield from node.args
    yield from (pair.value for pair in node.kwargs)
    yield from (part for part in (node.dyn_args, node.dyn_kwargs) if part is not None)


def _names(nodes: Any, target: Any) -> Iterator[str]:
    """The names an assignment writes: `a`, `a, b`, `ns.field`."""
    if isinstance(target, nodes.NSRef):
        yield f"{target.name}.{target.attr}"
    elif isinstance(target, nodes.Name):
        yield target.name
    elif isinstance(target, nodes.Tuple):
        for item in target.items:
            yield from _names(nodes, item)
