"""Kernels and modes put between torch's operators and their arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.watched import Watched, training, watch, write

from trainguard.appraise.dispatch import Dispatch

TAKEOVER = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

KEPT = []

class Between(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

def halve(x):
    return torch.where(x < 0, -x, x)

def go():
    before, name = id(torch.abs), torch.abs.__name__
    library = torch.library.Library("aten", "IMPL")
    library.impl("abs", halve, "CPU")
    print("same object", id(torch.abs) == before, "same name", torch.abs.__name__ == name)
    mode = Between()
    mode.__enter__()
    KEPT.extend((library, mode))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A kernel is replaced and a mode entered before step 3, by a module of the job."""
    folder = tmp_path_factory.mktemp("job")
    write(
        folder,
        {"helper.py": TAKEOVER, "train.py": training(steps=5, before="import helper; step == 3 and helper.go()")},
    )
    run = watch(folder, "-W", "ignore", "train.py")
    assert run.status == 0, run.output
    assert run.faults() == []
    return run


def test_a_kernel_from_a_python_file_is_named_with_operator_key_and_line(run: Watched) -> None:
    """Torch's own table says where it was registered."""
    findings, link = run.judge(Dispatch)
    (found,) = [finding for finding in findings if "kernel" in finding.message]
    assert (found.outcome, found.techniques[0], found.subject.step) == ("suspicious", "B6", 3)
    assert "the CPU kernel of aten::abs" in found.message
    assert found.subject.path == run.line_of("helper.py", "library = torch.library.Library")
    assert link.state == "broken"


def test_a_mode_over_every_operator_is_named_where_it_is_defined(run: Watched) -> None:
    """By the file of its `__torch_dispatch__`, not by torch's wrapper around it."""
    findings, _ = run.judge(Dispatch)
    (found,) = [finding for finding in findings if "mode" in finding.message]
    assert (found.outcome, found.techniques[0], found.subject.step) == ("suspicious", "B6", 3)
    assert found.subject.path == run.line_of("helper.py", "def __torch_dispatch__")


def test_identity_and_name_of_the_operator_stay_green(run: Watched) -> None:
    """The control: nothing that Python can see of `torch.abs` has changed."""
    assert "same object True same name True" in run.output


def test_operators_of_the_job_and_modes_of_torch_are_no_findings(tmp_path: Path) -> None:
    """A custom operator in a name space of its own, and torch's own mode for a default device."""
    setup = """
@torch.library.custom_op("mine::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2
torch.set_default_device("cpu")
for step"""
    write(tmp_path, {"train.py": training(steps=4, after="twice(torch.ones(1))").replace("\nfor step", setup, 1)})
    run = watch(tmp_path)
    findings, link = run.judge(Dispatch)
    assert (run.status, run.faults(), findings, link.state) == (0, [], [], "held"), run.output
