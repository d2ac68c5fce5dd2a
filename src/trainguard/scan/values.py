"""What stands on the machine's stack: stand-ins that say where a value came from, never the thing itself.

Constants (None, bool, int, float, str, bytes), tuples and lists stand for themselves. Everything else is one of the
classes below. Nothing here is ever called, hashed or compared on behalf of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from trainguard.scan.trust import Listed

Value = Any
"""A constant, tuple, list, or one of the classes of this file."""


class Span:
    """A string or bytes constant too long to keep: `length` bytes at `offset` of the stream."""

    __slots__ = ("is_text", "length", "offset")

    def __init__(self, offset: int, length: int, is_text: bool) -> None:
        self.offset = offset
        self.length = length
        self.is_text = is_text


class Global:
    """A name that `find_class` would resolve. One object per name and machine."""

    __slots__ = ("listed", "name", "use")

    def __init__(self, name: str, listed: Listed | None) -> None:
        self.name = name
        """`module.qualname`, after Python 2 names were mapped."""
        self.listed = listed
        """Its entry in the lists, or None."""
        self.use = ""
        """For unlisted names: how far it was used so far (`value`, `instance`, `call`)."""


class Object:
    """The result of calling or instantiating a global."""

    __slots__ = ("facts", "filled", "origin", "sealed")

    def __init__(self, origin: Global, facts: Value = None) -> None:
        self.origin = origin
        self.facts = facts
        """What later rules need to know, such as the item size of a dtype."""
        self.filled = False
        """Whether items were put into it."""
        self.sealed = False
        """A rule relied on it being empty; filling it later is refused."""


class Storage:
    """A tensor storage that a persistent id names."""

    __slots__ = ("item_bytes", "key", "numel")

    def __init__(self, key: str, item_bytes: int, numel: int) -> None:
        self.key = key
        self.item_bytes = item_bytes
        self.numel = numel


class View(NamedTuple):
    """What is known about a tensor a rule let pass: where in its storage its elements lie, in elements."""

    storage: Storage
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Map(list[Value]):
    """A dict under construction: key, value, key, value … in order of insertion, duplicates kept."""

    __slots__ = ()

    def pairs(self) -> list[tuple[Value, Value]]:
        """(key, value) in order; a later pair wins over an earlier one with the same key."""
        return list(zip(self[::2], self[1::2], strict=True))

    def text_keys(self) -> dict[str, Value] | None:
        """As a dict when every key is a str, else None."""
        keys = self[::2]
        return dict(self.pairs()) if all(type(key) is str for key in keys) else None


class Bag(list[Value]):
    """A set under construction."""

    __slots__ = ()


class FrozenBag(list[Value]):
    """A frozenset, which unlike a set may be a dict key."""

    __slots__ = ()


CONSTANTS = (type(None), bool, int, float, str, bytes, complex)


def is_constant(value: Value) -> bool:
    """Whether `value` is a plain constant, or a string or bytes constant too long to keep."""
    return type(value) in CONSTANTS or type(value) is Span


def is_inert(value: Value, depth: int = 4) -> bool:
    """Whether `value` is built from constants only, down to `depth` levels; deeper counts as not."""
    if is_constant(value):
        return True
    if depth and type(value) in (tuple, list, Map, Bag, FrozenBag):
        return all(is_inert(item, depth - 1) for item in value)
    return False


def length_of(value: Value) -> int | None:
    """Bytes in a bytes constant (kept or not), else None."""
    if type(value) is Span:
        return None if value.is_text else value.length
    return len(value) if type(value) is bytes else None
