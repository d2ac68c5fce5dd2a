"""What the index of a source file knows of its functions."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from trainguard.watch import surface

TWICE = """
if flag:
    class Scripted:
        def __init__(self): self.native = True
        def run(self): return 1
else:
    class Scripted:
        def __init__(self): self.native = False
"""


def test_a_class_that_stands_in_both_branches_has_the_methods_of_both() -> None:
    """torch.jit defines ScriptModule twice, for where scripting is switched off."""
    methods = surface.Index(compile(TWICE, "/job/twice.py", "exec"), None).classes["Scripted"]
    assert {name: len(found) for name, found in methods.items()} == {"__init__": 2, "run": 1}
