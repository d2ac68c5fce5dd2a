"""What the index of a source file knows of its functions, and what is told of values that moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from trainguard.watch import steady, surface

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


class Settings:
    """As a library's configuration has them."""

    def __init__(self) -> None:
        self.architectures: Any = None
        self.rate: Any = 0.1
        self.width: Any = 8


@pytest.mark.parametrize("library", [False, True])
def test_a_setting_that_becomes_a_list_is_a_value_and_one_that_becomes_code_has_moved(
    library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library notes the model's class in its own configuration as it saves: an empty field that is filled."""
    told: list[tuple[str, str, str | None]] = []

    def tell(label: str, kind: str, place: Any, name: Any, found: str | None = None, *_: Any, **__: Any) -> None:
        told.append((label, kind, found))

    loaded = SimpleNamespace(_libraries=(str(Path(__file__).parent) if library else "/none",), known={})
    monkeypatch.setattr(steady.code, "current", lambda: loaded)
    settings = Settings()
    kept = steady.Steady(tell)
    kept.fields(settings, "settings")
    settings.architectures, settings.rate, settings.width = ["Net"], (lambda: 0.2), 9
    list(kept.look([]))
    assert told == [
        *([] if library else [("settings.architectures", "value", "an object of builtins.list")]),
        ("settings.rate", "moved", None),
        ("settings.width", "value", "9"),
    ]
