"""Hooks that act behind the script's back: each named with its file and line, and what honest scripts hang up."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.watched import Watched, measurement_of, training, watch, write

from trainguard.appraise.hooks import Hooks
from trainguard.policy import Approval

PLANTED = """
import sys
sys.path.insert(0, sys.argv[1])
import planted
planted.go(model, optimizer)
"""

HOOKS = """
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

def flip(grad):
    return -grad

def scale(parameter):
    parameter.grad.mul_(0.5)

def after(optimizer, args, kwargs):
    pass

def go(model, optimizer):
    model[0].weight.register_hook(flip)
    model[3].weight.register_post_accumulate_grad_hook(scale)
    register_optimizer_step_post_hook(after)
    model[1].register_forward_hook(lambda module, args, output: output)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Hooks are hung up before step 3 by a file outside the job's folder."""
    job, elsewhere = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, {"planted.py": HOOKS})
    write(job, {"late.py": PLANTED})
    before = "step == 3 and exec(compile(open('late.py').read(), 'late.py', 'exec'))"
    write(job, {"train.py": training(steps=6, before=before)})
    run = watch(job, "train.py", str(elsewhere))
    assert run.status == 0, run.output
    assert run.faults() == []
    run.folder = elsewhere
    return run


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("gradient hook", "def flip"),
        ("post-accumulate hook", "def scale"),
        ("global optimizer post-hook", "def after"),
        ("module forward hook", "lambda module"),
    ],
)
def test_a_hook_from_outside_the_job_is_named_in_the_step_it_appears(run: Watched, kind: str, line: str) -> None:
    """The name of the tensor or module it hangs on, its function and its line."""
    findings, link = run.judge(Hooks)
    (found,) = [finding for finding in findings if finding.message.startswith(kind + " ")]
    assert (found.outcome, found.techniques[0], found.subject.step) == ("suspicious", "B5", 3)
    assert found.subject.path == run.line_of("planted.py", line)
    assert link.state == "broken"


def test_the_hook_names_the_tensor_it_hangs_on(run: Watched) -> None:
    """The parameter's own name, as `named_parameters` gives it."""
    findings, _ = run.judge(Hooks)
    assert any("flip" in finding.message and "on 0.weight" in finding.message for finding in findings)


def test_a_hook_of_a_file_that_is_not_in_the_lock_is_a_violation(tmp_path: Path) -> None:
    """With a lock the same hook is proof."""
    clean = {"train.py": training(steps=3, top="import extra\n", before="extra.go(model) if step == 1 else None")}
    write(tmp_path, {**clean, "extra.py": "def go(model): pass\n"})
    locked = measurement_of(watch(tmp_path))
    write(tmp_path, {"extra.py": "def flip(g): return -g\ndef go(model): model[0].weight.register_hook(flip)\n"})
    findings, _ = watch(tmp_path, measured=locked, locked=locked).judge(Hooks)
    (found,) = findings
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "B5", f"{tmp_path}/extra.py:1")


def test_hooks_of_libraries_and_of_the_script_before_training_are_only_listed(tmp_path: Path) -> None:
    """Weight norm of torch, a printing forward hook, and a gradient clamp that is there from the first step on."""
    setup = """
torch.nn.utils.parametrizations.weight_norm(model[0])
model[1].register_forward_hook(lambda module, args, output: None)
model[3].weight.register_hook(lambda grad: grad.clamp(-1, 1))
for step"""
    write(tmp_path, {"train.py": training(steps=4).replace("\nfor step", setup, 1)})
    run = watch(tmp_path)
    findings, link = run.judge(Hooks)
    assert (run.status, run.faults(), findings, link.state) == (0, [], [], "held")
    listed = [line for r in run.records if r.body.get("what") == "hooks" for line in r.body["found"]]
    assert {line["kind"] for line in listed} >= {"module forward hook", "gradient hook"}


def test_a_gradient_hook_of_the_own_script_that_appears_later_is_suspicious_until_approved(tmp_path: Path) -> None:
    """Approved by `file:line`, it is explained."""
    write(tmp_path, {"train.py": training(steps=4, before="step == 3 and model[0].weight.register_hook(lambda g: g)")})
    run = watch(tmp_path)
    (found,), _ = run.judge(Hooks)
    assert (found.outcome, found.techniques[0], found.subject.step) == ("suspicious", "B5", 3)
    place = run.line_of("train.py", "register_hook")
    assert found.subject.path == place
    findings, link = run.judge(Hooks, Approval(check="hooks", place="train.py"))
    assert (findings, link.state) == ([], "explained")
