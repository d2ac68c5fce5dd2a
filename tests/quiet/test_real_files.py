"""Files that libraries really write: no alarm on weights and training state, few on whole objects.

The files are made once per session by running torch, numpy, joblib, transformers, lightning, accelerate, safetensors
and scikit-learn. The held-out sets were chosen after the lists were frozen; their rate is what docs/checks/scan.md
reports, and the bound here is the promise.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from trainguard.scan import FileReport, ScanPolicy, Verdict, vet

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

HELPER = Path(__file__).parent.parent / "helpers" / "real_files.py"


def _real_files() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_files", HELPER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def makers() -> Iterator[ModuleType]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield _real_files()
    torch.set_num_threads(threads)


def scanned(makers: ModuleType, names: tuple[str, ...], folder: Path, tier: str = "training") -> list[FileReport]:
    """Reports of every file the named sets make."""
    for name in names:
        makers.make_all(folder / name, getattr(makers, name))
    return list(vet(folder, ScanPolicy(tier=tier)).files)  # type: ignore[arg-type]


def alarms(files: list[FileReport]) -> list[str]:
    """What is not safe, with its first reason."""
    return [f"{file.path}: {file.reasons[0].what}" for file in files if file.verdict is not Verdict.SAFE]


def test_weights_raise_no_alarm_in_the_weights_tier(makers: ModuleType, tmp_path: Path) -> None:
    """Every dtype, protocol and layout torch and safetensors write, with tensors and plain containers only."""
    files = scanned(makers, ("WEIGHTS",), tmp_path, tier="weights")
    assert len(files) > 40
    assert alarms(files) == []


def test_training_state_raises_no_alarm_in_the_default_tier(makers: ModuleType, tmp_path: Path) -> None:
    """Optimizers, schedulers, random states, arguments, numpy, joblib, distributed checkpoints."""
    files = scanned(makers, ("TRAINING", "LATER_TRAINING"), tmp_path)
    assert len(files) > 130
    assert alarms(files) == []


def test_trainer_and_lightning_folders_raise_no_alarm(makers: ModuleType, tmp_path: Path) -> None:
    """What a real HF Trainer run and a real Lightning fit leave behind, every file of it."""
    pytest.importorskip("transformers")
    pytest.importorskip("lightning")
    files = scanned(makers, ("SLOW",), tmp_path)
    assert {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {
        Path(file.path).name for file in files
    }
    assert alarms(files) == []


def test_training_state_needs_no_more_than_the_second_opinion_agrees_to(makers: ModuleType, tmp_path: Path) -> None:
    """CPython's unpickler agrees with the machine on every pickle of the training set."""
    files = scanned(makers, ("TRAINING",), tmp_path)
    assert {file.second_opinion for file in files} <= {
        "agrees",
        "not needed",
        "not run: joblib arrays lie between the opcodes",
    }
    assert sum(file.second_opinion == "agrees" for file in files) > 60


def test_whole_objects_pass_in_the_framework_tier_and_only_there(makers: ModuleType, tmp_path: Path) -> None:
    """Modules, optimizers and fitted estimators are unknown by default; the framework lists know them."""
    pytest.importorskip("sklearn")
    files = scanned(makers, ("FRAMEWORK",), tmp_path, tier="framework")
    assert alarms(files) == []
    default = vet(tmp_path).files
    assert {file.verdict for file in default} == {Verdict.UNKNOWN}
    assert all(file.trust_lines for file in default)


def test_held_out_training_state_raises_at_most_one_alarm_in_twenty_two(makers: ModuleType, tmp_path: Path) -> None:
    """Weights and training state the lists were not made from."""
    pytest.importorskip("transformers")
    files = scanned(makers, ("HELD_OUT_TRAINING",), tmp_path)
    assert len(files) >= 22
    assert len(alarms(files)) <= len(files) / 22, alarms(files)


def test_held_out_objects_raise_at_most_five_percent_alarms(makers: ModuleType, tmp_path: Path) -> None:
    """Modules, models, metrics, optimizers and estimators the lists were not made from."""
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    pytest.importorskip("torchmetrics")
    files = scanned(makers, ("HELD_OUT_FRAMEWORK", "HELD_OUT_SKLEARN"), tmp_path, tier="framework")
    assert len(files) >= 60
    assert len(alarms(files)) <= 0.05 * len(files), alarms(files)


def test_what_weights_only_refuses_loads_with_the_list_the_scan_gives(makers: ModuleType, tmp_path: Path) -> None:
    """The snippet of a cleared file makes torch's own restricted unpickler accept it."""
    import torch

    makers.make_all(tmp_path, (makers.random_states,))
    path = tmp_path / "random_states" / "rng_state.pth"
    with pytest.raises(Exception, match="Weights only"):
        torch.load(path, weights_only=True)
    (file,) = vet(path).files
    namespace: dict[str, object] = {"PATH": str(path)}
    exec(file.safe_globals, namespace)
    assert set(namespace["state"]) == {"python", "numpy", "cpu", "cuda"}
