"""The support matrix: in every way of training of tests/helpers/cells.py a link holds, or says why it is blind."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers import cells
from tests.helpers.watched import watch, write

from trainguard.appraise.code import Code
from trainguard.appraise.optimizer import Optimizer

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:Sparse invariant checks")]


@pytest.mark.parametrize("name", [name for name in cells.CELLS if name not in cells.SLOW])
def test_honest_training_has_no_finding_and_every_link_says_how_it_stands(name: str) -> None:
    """No alarm, and what is blind is so for the reason that the table gives."""
    assert cells.agrees(name, cells.run(name)) == []


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, about its compiler
@pytest.mark.parametrize("name", cells.SLOW)
def test_compiled_training_too(name: str) -> None:
    """Compiling takes seconds."""
    assert cells.agrees(name, cells.run(name)) == []


def test_the_matrix_is_wide() -> None:
    """As many ways to train as were measured before the first line was written."""
    assert len(cells.CELLS) >= 52


OWN = """
import torch

class Mine(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())

torch.manual_seed(0)
torch.set_num_threads(1)
net = torch.nn.Linear(4, 2)
optimizer = Mine(net.parameters(), {"lr": 0.01})
for _ in range(6):
    optimizer.zero_grad()
    net(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
"""


def test_a_script_with_an_optimizer_of_its_own_is_repeated_and_leaves_no_other_trace(tmp_path: Path) -> None:
    """In a real process: its source is the main script, which is not run again; link *code* hears nothing of it."""
    write(tmp_path, {"train.py": OWN})
    run = watch(tmp_path)
    assert run.status == 0, run.output
    assert run.faults() == []
    findings, link = run.judge(Optimizer)
    assert findings == []
    assert (link.state, link.held) == ("held", 6)
    findings, link = run.judge(Code)
    assert findings == []
    assert not [r for r in run.records if r.kind == "code" and "ran" in r.body]
