"""Lines of the job's own source that may have put weights back, likeliest first."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trainguard.watch import writers


def load(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise LookupError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, path.stem, module)
    return module


def test_lines_of_the_file_that_runs_come_before_those_of_a_hundred_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(100):
        text = "# torch\ndef back(net, kept):\n    net.load_state_dict(kept)\n"
        load(monkeypatch, tmp_path / f"aside_{number:03}.py", text)
    text = "# torch\ndef back(net, kept):\n    net.load_state_dict(kept)\ndef step(look):\n    return look()\n"
    train = load(monkeypatch, tmp_path / "zz_train.py", text)
    found = train.step(writers.restorers)
    assert found[0] == f"{tmp_path}/zz_train.py:3"
    assert len(found) == writers.RESTORERS_LIMIT


def test_data_stored_in_a_file_that_never_speaks_of_torch_is_no_weight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Messages and buffers have data as well; a weight restored by name counts wherever it stands."""
    text = "def step(look, each):\n    each.data = 1\n    return look()\ndef back(each):\n    each.reset_parameters()\n"
    pipe = load(monkeypatch, tmp_path / "pipe.py", text)
    found = pipe.step(writers.restorers, ModuleType("message"))
    assert [place for place in found if "pipe.py" in place] == [f"{tmp_path}/pipe.py:5"]
