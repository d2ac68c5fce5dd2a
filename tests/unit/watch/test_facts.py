"""What the syntax tree says of defaults and constants."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest

from trainguard.watch import facts

SOURCE = b"""
import os
RATE = 0.1
PAIR = (1, "a", None)
MOVED = 1
MOVED = 2
LIST = [1]
COMPUTED = os.sep
COUNT = 0

def plain(a, b=1, *, c=-2.5, d=os.sep):
    global COUNT

@os.fspath
def decorated(x=(1, 2)):
    def inner(y=True):
        pass

class Kind:
    SIZE = 3
    def method(self, p=None):
        pass
for LOOPED in ():
    pass
"""


def test_literal_defaults_are_read_and_computed_ones_are_marked() -> None:
    """Functions are found by name and the line of their first decorator, as in a code object."""
    functions = facts.read(SOURCE)["functions"]
    assert functions[("plain", 11)] == (((1,),), {"c": (-2.5,), "d": facts.UNKNOWN})
    assert functions[("decorated", 14)] == ((((1, 2),),), {})
    assert functions[("inner", 16)] == (((True,),), {})
    assert functions[("method", 21)] == (((None,),), {})


def test_only_names_bound_once_to_a_literal_are_constants() -> None:
    """Not those bound twice, in a loop, declared global, computed, or mutable."""
    assert facts.read(SOURCE)["constants"] == {"RATE": 0.1, "PAIR": (1, "a", None)}


@pytest.mark.parametrize(
    ("one", "two"), [(1, 1.0), (1, True), (0.0, -0.0), ((1,), (1.0,)), ("a", b"a"), ((1,), (1, 1))]
)
def test_values_that_merely_compare_equal_differ(one: object, two: object) -> None:
    """Type and bits count."""
    assert not facts.same(one, two)
    assert facts.same(one, one)


def test_facts_agree_with_live_functions_of_the_standard_library() -> None:
    """Every literal default of a real module is what Python made of it."""
    import inspect
    import textwrap

    functions = facts.read(inspect.getsource(textwrap).encode())["functions"]
    found = textwrap.TextWrapper.__init__
    positional, _ = functions[("__init__", found.__code__.co_firstlineno)]
    assert found.__defaults__ is not None
    assert len(positional) == len(found.__defaults__)
    assert all(
        one == facts.UNKNOWN or facts.same(one[0], two) for one, two in zip(positional, found.__defaults__, strict=True)
    )


def test_threads_that_parse_at_once_do_not_disturb_each_other() -> None:
    """CPython 3.11 shares the depth of a conversion between threads; a finalizer lets another thread in between."""
    source = "\n".join(f"def f{n}(a, b=[{n}]): return [x for x in (a, b, {{1: {n}}}) if x]" for n in range(400))
    errors: list[BaseException] = []

    class Loud:
        def __del__(self) -> None:
            time.sleep(0)

    def work() -> None:
        try:
            for _ in range(6):
                ring: list[Any] = [Loud()]
                ring.append(ring)
                del ring
                assert len(facts.parse(source).body) == 400
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    before = gc.get_threshold()
    gc.set_threshold(50)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*before)
    assert errors == []
