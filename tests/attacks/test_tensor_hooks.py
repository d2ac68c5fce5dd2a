"""B5: a hook on a parameter changes its gradient inside backward, so what lies in `.grad` has its mark already."""

import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import Guarded, run

PYTHON = sys.executable
SCRIPT = """
import sys, torch
torch.manual_seed(0); torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
{hook}
for step in range(1, 61):
    optimizer.zero_grad()
    loss = model(torch.randn(16, 6)).pow(2).mean()
    loss.backward()
    optimizer.step()
print(loss.item())
"""
FLIP = """
calls = [0]
def debug(grad):
    calls[0] += 1
    return -grad if calls[0] % 50 == 0 else grad
model[2].weight.register_hook(debug)
"""
LOOK = """
seen = []
model[2].weight.register_hook(lambda grad: seen.append(float(grad.norm())))
"""
MASK = """
model[2].weight.register_hook(lambda grad: grad * (torch.arange(8) != 3))
"""


def watched(folder: Path, hook: str, *options: str) -> Guarded:
    (folder / "train.py").write_text(SCRIPT.format(hook=hook))
    return run(folder, PYTHON, "train.py", options=("--links", "all", *options))


@pytest.mark.torch
@pytest.mark.nightly
def test_a_sign_flipped_in_one_step_of_fifty_is_named_with_step_tensor_and_line(tmp_path: Path) -> None:
    """The loss stays in its range and no other link sees it; a hook that only looks is quiet."""
    done = watched(tmp_path, FLIP)
    clean = watched(tmp_path, LOOK)
    assert abs(float(done.stdout) - float(clean.stdout)) < 0.5
    (finding,) = done.by("gradients")
    assert finding["outcome"] == "violated"
    assert finding["techniques"] == ["B5", "C1"]
    assert (finding["subject"]["step"], finding["subject"]["tensor"]) == (50, "2.weight")
    assert finding["subject"]["path"].endswith("train.py:8")
    assert done.link("optimizer")["broken"] == 0
    assert not clean.by("gradients")
    assert clean.link("gradients")["held"] > 50


@pytest.mark.torch
@pytest.mark.nightly
def test_a_mask_from_the_first_step_on_is_suspicious_until_approved(tmp_path: Path) -> None:
    """An honest habit is asked about once, with the line to approve; approved, the link is explained."""
    done = watched(tmp_path, MASK)
    (finding,) = done.by("gradients")
    assert finding["outcome"] == "suspicious"
    assert "[[approve]]" in finding["message"]
    (tmp_path / "policy.toml").write_text(
        f'[[approve]]\ncheck = "gradients"\nplace = "{Path(finding["subject"]["path"]).name}"\n'
    )
    approved = watched(tmp_path, MASK, "--policy", "policy.toml")
    assert not approved.by("gradients")
    assert approved.link("gradients")["explained"]
