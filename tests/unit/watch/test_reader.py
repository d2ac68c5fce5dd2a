"""The reader from outside: what it compares, what it forgives, and that it says where it cannot read."""

from __future__ import annotations

import dis
import os
import types
from typing import Any

import pytest

from trainguard.watch import reader
from trainguard.watch.reader import Layout, Process, Source, Unreadable, plain_bytecode

TEXT = """
import re
RATE = 0.1
def hot(n, scale=2.5, *, name="x", flag=None):
    total = 0
    for i in range(n):
        total += i * scale
    try:
        return [total, name, flag, {1: (2, 3.0, True, None, b"y", 1j, -5, 10**40, ...)}, n in {1, 2}]
    except ValueError:
        raise
class Thing:
    def method(self):
        return (lambda a: a + self.n)(1)
"""


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout()


@pytest.fixture
def process(layout: Layout) -> Process:
    """This process, read as another one would be."""
    return Process(layout, layout.own, 0, {})


def compiled(text: str = TEXT) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(text, "x.py", "exec"), names)
    return names


def test_code_that_ran_hot_is_still_its_source(process: Process) -> None:
    """The interpreter rewrites instructions in place; turned back, they are the compiled ones."""
    hot = compiled()["hot"]
    cold = compiled()["hot"].__code__
    for _ in range(200):
        hot(5)
    raw = process.memory.read(id(hot.__code__) + process.layout.bytecode, len(cold.co_code))
    assert raw != cold.co_code
    assert plain_bytecode(raw) == cold.co_code
    assert process.differs(id(hot.__code__), cold) is None


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("constants", "2, 3.0", "2, 3.5"),
        ("constants", "True, None", "False, None"),
        ("constants", "10**40", "10**41"),
        ("constants", 'b"y"', 'b"z"'),
        ("constants", "1j", "2j"),
        ("constants", "-5", "-6"),
        ("bytecode", "i * scale", "i - scale"),
        ("names", "range(n)", "Range(n)"),
        ("bytecode", "raise\n", "return\n"),
    ],
)
def test_every_part_of_a_code_object_counts(process: Process, what: str, old: str, new: str) -> None:
    """One changed literal, name or instruction."""
    changed = compiled(TEXT.replace(old, new))["hot"].__code__
    assert process.differs(id(changed), compiled()["hot"].__code__) == what


def test_functions_inside_functions_count_too(process: Process) -> None:
    """A lambda in a method."""
    changed = compiled(TEXT.replace("a + self.n", "a - self.n"))["Thing"].method.__code__
    assert process.differs(id(changed), compiled()["Thing"].method.__code__) == "bytecode"
    assert process.differs(id(compiled()["Thing"].method.__code__), compiled()["Thing"].method.__code__) is None


@pytest.mark.parametrize(
    "value", [0, 1, -1, 2**30, -(2**30), 2**61 + 3, 10**40, 0.0, -0.0, 1.5, "", "ascii", "é", "€", "😀x", b"", b"a\0b"]
)
def test_values_equal_themselves_and_nothing_else(process: Process, value: Any) -> None:
    """In type and bits: 0, 0.0, -0.0 and False differ."""
    others = [0, 0.0, -0.0, False, None, "", b"", "ascii", 1, True, 2**61 + 3, -1, 10**40, "é"]
    assert process.equal(id(value), value)
    for other in others:
        if repr(other) != repr(value):
            assert not process.equal(id(value), other)


def test_objects_of_every_kind_are_read(process: Process) -> None:
    """Dictionaries with text keys, other keys and shared keys; lists; attributes of objects."""

    class Point:
        def __init__(self) -> None:
            self.x, self.y = "left", "right"

    point = Point()
    assert {name: process.string(one) for name, one in process.attributes(id(point)).items()} == vars(Point())
    vars(point)["z"] = "new"
    assert process.string(process.attributes(id(point))["z"]) == "new"
    mixed = {1: "a", "b": "c", (2,): "d"}
    assert len(process.dictionary(id(mixed))) == 3
    assert process.named(id(mixed)).keys() == {"b"}
    removed = {str(n): n for n in range(50)}
    for n in range(40):
        del removed[str(n)]
    assert process.named(id(removed)).keys() == {str(n) for n in range(40, 50)}
    items = [1, 2, 3]
    assert len(process.list(id(items))) == 3


def test_memory_that_is_not_there_is_refused(process: Process) -> None:
    """Never a crash, never a guess."""
    for address in (0, 8, 2**48, 2**62, 2**63):
        with pytest.raises(Unreadable):
            process.memory.word(address)
    with pytest.raises(Unreadable):
        process.string(id([]))
    with pytest.raises(Unreadable):
        process.dictionary(id("x"))


def test_a_source_file_gives_its_functions_by_name_and_line(tmp_path: Any) -> None:
    """With literal defaults and constants from its syntax tree."""
    path = tmp_path / "x.py"
    path.write_text(TEXT)
    source = Source(str(path), 0)
    assert {name for name, _ in source.codes} >= {"hot", "Thing", "method", "<lambda>"}
    assert source.facts()["constants"] == {"RATE": 0.1}
    assert source.facts()["functions"][("hot", 4)][1] == {"name": ("x",), "flag": (None,)}


def test_a_process_of_another_interpreter_is_refused(tmp_path: Any) -> None:
    """Its structures may differ; nothing is read from it."""
    with pytest.raises(Unreadable, match="another interpreter"):
        reader._base_in(os.getpid(), "00:00 1")


def test_every_faster_instruction_is_known() -> None:
    """Tables of this version are there: without them every hot function would look changed."""
    assert len(reader._BASE) > 30
    assert len(reader._CACHES) > 5
    assert isinstance(dis.opmap["LOAD_CONST"], int)
    assert types.CodeType.__name__ == "code"
