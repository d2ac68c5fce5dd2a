"""Flags, modes and settings changed while training runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.recorded import judge, recording
from tests.helpers.watched import Watched, training, watch, write
from torch import nn

from trainguard.appraise.modules import Modules
from trainguard.evidence import Evidence
from trainguard.policy import Approval

CHANGES = """
import torch

def go(step, model):
    if step == 7:
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(2)
    if step == 18:
        model[2].p = 0.6
    if step == 23:
        model.eval()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Numeric flag and thread count at step 7, dropout at step 18, mode at step 23."""
    folder = tmp_path_factory.mktemp("job")
    script = training(steps=26, top="import helper\n", before="helper.go(step, model)")
    write(folder, {"train.py": script, "helper.py": CHANGES})
    run = watch(folder)
    assert run.status == 0, run.output
    assert run.faults() == []
    return run


@pytest.mark.parametrize(
    ("name", "technique", "step", "before", "now"),
    [
        ("numeric flag float32_matmul_precision", "A10", 7, "highest", "medium"),
        ("numeric flag num_threads", "A11", 7, "1", "2"),
        ("module setting 2.p", "C11", 20, "0.1", "0.6"),
        ("mode of module root.training and of 4 more", "C11", 25, "True", "False"),
    ],
)
def test_a_change_is_named_with_both_values(
    run: Watched, name: str, technique: str, step: int, before: str, now: str
) -> None:
    """Flags in the same step, module settings within five."""
    findings, link = run.judge(Modules)
    (found,) = [finding for finding in findings if finding.message.startswith(name + " ")]
    assert (found.outcome, found.techniques, found.subject.step) == ("suspicious", (technique,), step)
    assert (found.expected, found.found) == (before, now)
    assert link.state == "broken"


def test_an_approved_setting_is_explained(run: Watched) -> None:
    """By its name."""
    findings, link = run.judge(Modules, Approval(check="modules", place="2.p"))
    assert not [finding for finding in findings if "2.p" in finding.message]
    assert link.explained == ("2.p",)


def test_evaluation_between_steps_and_a_counter_are_no_changes(tmp_path: Path) -> None:
    """eval() and back, a step counter in a module, and another model that is put to eval()."""
    after = "model.eval(); model(torch.ones(1, 4)); model.train(); other.eval(); model[0].seen = step"
    text = training(steps=12, after=after).replace("\nfor step", "\nother = torch.nn.Linear(2, 2)\nfor step", 1)
    write(tmp_path, {"train.py": text})
    run = watch(tmp_path)
    findings, link = run.judge(Modules)
    assert (run.status, run.faults(), findings, link.state) == (0, [], [], "held")


def test_a_closure_that_sets_the_mode_itself_is_no_change() -> None:
    """A trainer that validates every third step, and calls train() only inside what it hands to step()."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        model.train()
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with recording() as recorder:
        for step in range(12):
            optimizer.step(closure)
            if step % 3 == 0:
                model.eval()
    findings, states = judge(Modules, recorder.records)
    assert (findings, states["modules"].state) == ([], "held")


def test_a_rank_that_starts_with_another_flag_is_named() -> None:
    """Read back from torch on each rank, not from a configuration."""
    findings = []
    from trainguard.appraise.interface import Context
    from trainguard.policy import Policy

    check = Modules(Context(run="test", policy=Policy(), blob=lambda digest: b""))
    for n, (rank, value) in enumerate([(0, "highest"), (1, "highest"), (2, "high")]):
        body = {"modules": {"flags": {"float32_matmul_precision": value}, "changed": []}}
        record = Evidence(n=n, at=0, source="process", kind="step", body=body, process=rank, rank=rank, step=1)
        findings += list(check.see(record))
    (found,) = findings
    assert (found.techniques, found.subject.rank) == (("A10", "F1"), 2)


def test_a_part_that_joins_later_changes_no_setting_of_the_others() -> None:
    """A model of several bare modules, of which the largest is frozen at first: which is the largest changes."""
    torch.set_num_threads(1)
    trunk = nn.LSTM(4, 8, batch_first=True).requires_grad_(False)
    head, other = nn.Linear(8, 6), nn.Linear(8, 1)
    optimizer = torch.optim.SGD([*head.parameters(), *other.parameters()], lr=0.1)
    with recording() as recorder:
        for number in range(1, 41):
            if number == 20:
                trunk.requires_grad_(True)
                optimizer.add_param_group({"params": trunk.parameters()})
            optimizer.zero_grad()
            hidden = trunk(torch.randn(3, 5, 4))[0]
            (head(hidden).square().mean() + other(hidden).square().mean()).backward()
            optimizer.step()
    findings, states = judge(Modules, recorder.records)
    assert (findings, states["modules"].state) == ([], "held")
