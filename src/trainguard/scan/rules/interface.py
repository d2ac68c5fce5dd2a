"""What a rule is: it looks at the arguments of one use of a listed name and returns a stand-in, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainguard.scan.values import Global, Object, Value

if TYPE_CHECKING:
    from trainguard.scan.machine import Machine


class Refused(Exception):
    """A use that no rule allows. `rule` is its short name, the message the sentence for people."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(what)
        self.rule = rule


class Malformed(Refused):
    """The stream breaks the pickle format."""

    def __init__(self, what: str) -> None:
        super().__init__("stream", what)


CallRule = Callable[["Machine", Global, tuple[Value, ...]], Value]
"""(machine, the global, arguments) → what the call returns. Raises Refused."""

StateRule = Callable[["Machine", Object, Value], Value]
"""(machine, the object, state) → the object, or what stands in its place afterwards. Raises Refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a name of this kind may be used for; None means not at all. Being a plain value is always allowed."""

    call: CallRule | None = None
    """REDUCE, OBJ, INST: `name(*args)`."""
    new: CallRule | None = None
    """NEWOBJ, NEWOBJ_EX and copyreg.__newobj__: `name.__new__(name, *args)`."""
    state: StateRule | None = None
    """BUILD on what call or new returned."""
    items: Literal["list", "dict", "set"] | None = None
    """APPEND(S), SETITEM(S) or ADDITEMS on it."""
    factory: bool = False
    """Whether calling it without arguments is harmless, so that a defaultdict may hold it."""
    base: bool = False
    """Whether copyreg._reconstructor may use it as the base."""
    enum: bool = False
    """Whether getattr may look a member up on it by name."""


def refuse(rule: str, origin: Global, expected: str, found: Value) -> Refused:
    """A refusal that says what `origin` takes and what it was given."""
    return Refused(rule, f"{origin.name}: expected {expected}, found {describe(found)}")


def describe(value: Value, depth: int = 2) -> str:
    """A short description of a stand-in; file content is cut to 40 characters and escaped."""
    if isinstance(value, Global):
        return value.name[:120]
    if isinstance(value, Object):
        return f"a {value.origin.name[:120]} object"
    if type(value) in (tuple, list) and depth:
        inner = ", ".join(describe(item, depth - 1) for item in value[:4])
        return f"{type(value).__name__} ({inner}{', …' if len(value) > 4 else ''})"
    if isinstance(value, int | float | str | bytes | None):
        text = repr(value[:40]) if isinstance(value, str | bytes) else repr(value)[:40]
        return ascii(text)[1:-1] if not text.isascii() else text
    return type(value).__name__.lower()
