"""A second opinion on a pickle: CPython's own unpickler, with an inert stub in place of every name.

The stub takes any arguments, state and items and does nothing with them, so nothing of the stream runs; what is
observed is which names and persistent ids were asked for, in which order, and where reading stopped. The C unpickler is
used: it is the one that loaders use, and it reads 3 million opcodes in well under a second.

Only streams the machine found well-formed are read: it has bounded the memo, the nesting and the sizes by then.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from typing import Any

from trainguard.scan.machine import Trace


class Inert:
    """Stands for every class, function and object a stream names. Does nothing, whatever is done to it."""

    __slots__ = ()

    def __new__(cls, *args: Any, **keywords: Any) -> Inert:
        """A new inert object, whatever the arguments."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Nothing."""

    def __call__(self, *args: Any, **keywords: Any) -> Inert:
        """Another inert object."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        """Nothing."""

    def append(self, item: Any) -> None:
        """Nothing."""

    def extend(self, items: Any) -> None:
        """Nothing."""

    def add(self, item: Any) -> None:
        """Nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing."""


@dataclass(slots=True)
class Opinion:
    """What CPython made of a stream."""

    globals: list[tuple[str, str]] = field(default_factory=list)
    persistent: int = 0
    end: int = 0
    error: str | None = None
    """Why it did not reach STOP, or None."""


class _Watcher(pickle.Unpickler):
    """The C unpickler, asking us for names and persistent ids."""

    opinion: Opinion
    inert: Inert

    def find_class(self, module: str, name: str) -> Any:
        self.opinion.globals.append((module, name))
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        self.opinion.persistent += 1
        return self.inert


class _Strict(_Watcher):
    """As a plain pickle.load: persistent ids are an error."""

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent id")


def read(data: bytes, *, persistent: bool) -> Opinion:
    """What CPython's unpickler does with `data`: one whole stream. Never raises for its content."""
    file = io.BytesIO(data)
    # Latin-1 decodes every Python 2 string, as the machine does; the default would stop at the first umlaut.
    unpickler = (_Watcher if persistent else _Strict)(file, encoding="latin-1")
    unpickler.opinion = opinion = Opinion()
    unpickler.inert = Inert()
    try:
        unpickler.load()
    except Exception as error:  # anything at all may be raised by a hostile stream; each is an answer
        opinion.error = f"{type(error).__name__}: {error}"[:200]
    opinion.end = file.tell()
    return opinion


def disagreement(trace: Trace, start: int, opinion: Opinion) -> str | None:
    """In what the two readings of a stream that began at `start` differ, or None.

    find_class is given names as written and maps Python 2 ones itself, so names are compared as written.
    """
    if opinion.error is not None:
        return opinion.error
    if opinion.globals != trace.raw_globals:
        return f"{len(opinion.globals)} names against {len(trace.globals)}, or other ones"
    if opinion.persistent != trace.persistent:
        return f"{opinion.persistent} persistent ids against {trace.persistent}"
    if opinion.end != trace.end - start:
        return f"it stops at byte {opinion.end}, the machine at {trace.end - start}"
    return None
