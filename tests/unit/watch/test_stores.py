"""What source says of who may change a value."""

from __future__ import annotations

import ast

import pytest

from trainguard.watch import stores

CLOSURES = """
def constant(warm):
    def f(step):
        return step / warm
    return f

def counter():
    calls = 0
    def f():
        nonlocal calls
        calls += 1
        return calls
    return f

def loop():
    made = []
    for number in range(3):
        made.append(lambda: number)
    return made[0]

def twice(scale):
    scale = scale * 2
    return lambda x: x * scale

def deeper(rate):
    def outer():
        def f():
            return rate
        return f
    return outer()

def sibling():
    best = 0
    def tell():
        nonlocal best
        best = 1
    def f():
        return best
    return f
"""
MADE = {"constant": (1, "warm", True), "counter": (None, "calls", False), "loop": (None, "number", False)}
MADE |= {"twice": (1, "scale", False), "deeper": (1, "rate", True), "sibling": (None, "best", False)}


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_cell_is_a_constant_only_if_its_source_binds_it_once(name: str) -> None:
    """Arguments that are bound again, loops, counters and values that a sibling sets are none."""
    module = compile(CLOSURES, "closures.py", "exec")
    space: dict[str, object] = {}
    exec(module, space)
    argument, variable, constant = MADE[name]
    make = space[name]
    function = make(argument) if argument is not None else make()  # type: ignore[operator]
    again = compile(CLOSURES, "closures.py", "exec")  # as read from the cache: equal, not the same objects
    assert stores.is_constant_cell(again, function.__code__, variable) is constant


def test_names_bound_once_are_those_that_nothing_in_the_module_binds_again() -> None:
    """Not in loops, not declared global by a function, not added to."""
    text = """
A = 1
B = 1
B += 1
for C in range(3):
    D = C
E = 1
def f():
    global E
    E = 2
import os
while True:
    F = 1
class G: pass
"""
    assert stores.bound_once(ast.parse(text)) == {"A", "os", "G", "f"}


def test_assignments_to_attributes_are_told_with_what_they_assign() -> None:
    """Whatever the object; what a constructor assigns to is there before anybody looks."""
    text = """
a.rate = 0.5
a.on = True
a.epoch = epoch
a.count += 1
setattr(a, "named", 3)
object.__setattr__(a, "frozen", 4)
globals()["spaced"] = 5
a.x, a.y = 1, 2
class Data:
    def __init__(self):
        self.rate = 1.0
    def set(self, n):
        self.set_later = n
"""
    found = stores.stores(ast.parse(text))
    assert {name: [kind for _, kind in lines] for name, lines in found.items()} == {
        "rate": ["literal"],
        "on": ["flag"],
        "epoch": ["computed"],
        "count": ["computed"],
        "named": ["literal"],
        "frozen": ["literal"],
        "spaced": ["literal"],
        "x": ["computed"],
        "y": ["computed"],
        "set_later": ["computed"],
    }
