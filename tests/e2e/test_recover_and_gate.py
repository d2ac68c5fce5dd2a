"""After an attack: what is clean, what is not, how to go on, and what may be released."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.guarded import run, trainguard

PYTHON = sys.executable

TRAIN = """
import argparse, pathlib, torch
torch.set_num_threads(1)
p = argparse.ArgumentParser()
p.add_argument("--resume"); p.add_argument("--base"); p.add_argument("--edit-at", type=int); p.add_argument("--out")
a = p.parse_args()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
done = 0
if a.base:
    model.load_state_dict(torch.load(a.base)["model"])
if a.resume:
    state = torch.load(a.resume)
    model.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"]); done = state["step"]
pathlib.Path(a.out).mkdir(exist_ok=True)
for step in range(done + 1, 21):
    x = torch.randn(32, 8)
    optimizer.zero_grad()
    (model(x) - x.sum(1, keepdim=True)).pow(2).mean().backward()
    optimizer.step()
    if step == a.edit_at:
        with torch.no_grad():
            model[0].weight.mul_(1.01)
    if step % 5 == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                    "rng": torch.get_rng_state()}, f"{a.out}/step-{step:03d}.pt")
"""


def document(folder: Path, *arguments: str) -> dict[str, Any]:
    """A verb's one JSON document."""
    done = trainguard(folder, *arguments, "--json")
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.nightly
@pytest.mark.torch
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_an_attacked_run_goes_on_from_its_last_good_checkpoint_and_ends_where_an_untouched_one_does(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    command = (PYTHON, "train.py", "--out")
    reference = run(tmp_path, *command, "reference", options=("--name", "reference"))
    assert reference.verdict["verdict"] == "UNKNOWN", "no lock: nothing was found, and not all was looked at"

    attacked = run(tmp_path, *command, "out", "--edit-at", "13", options=("--name", "attacked"))
    assert "E4" in attacked.techniques()
    downstream = run(tmp_path, *command, "tuned", "--base", "out/step-020.pt", options=("--name", "downstream"))
    assert "E4" not in downstream.techniques(), "nothing is wrong with the run itself"

    plan = document(tmp_path, "recover", "attacked")
    assert plan["first_bad_step"] in (13, 14)
    assert Path(plan["checkpoint"]["place"]).name == "step-010.pt"
    assert [Path(c["place"]).name for c in plan["later"]] == ["step-015.pt", "step-020.pt"]
    assert (tmp_path / "out" / "step-015.pt").exists(), "asking changes nothing"

    gates = {name: trainguard(tmp_path, "gate", "--require", "UNKNOWN", name).returncode for name in GATED}
    assert gates == GATED
    report = trainguard(tmp_path, "lineage").stdout
    assert report.index("Affected") < report.index("step-020.pt (run downstream") < report.index("Not known")
    assert report.index("Not known") < report.index("step-020.pt (run reference")
    refused = trainguard(tmp_path, "gate", "reference/step-020.pt")
    assert refused.returncode == 3
    assert "the verdict is UNKNOWN, VERIFIED is required" in refused.stdout

    moved = document(tmp_path, "recover", "attacked", "--quarantine")["moved"]
    assert [Path(m["place"]).name for m in moved] == ["step-015.pt", "step-020.pt"]
    kept = sorted(path.name for path in (tmp_path / "out" / "quarantine" / "attacked").iterdir())
    assert kept == ["QUARANTINE.json", "step-015.pt", "step-020.pt"]

    resumed = run(tmp_path, *command, "out", "--resume", "out/step-010.pt", options=("--name", "resumed"))
    assert resumed.status == 0, resumed.stderr
    same = trainguard(tmp_path, "recover", "resumed", "--check", "reference")
    assert same.returncode == 0, same.stdout
    assert "bit for bit" in same.stdout
    other = trainguard(tmp_path, "recover", "attacked", "--check", "reference")
    assert other.returncode == 1
    assert "model.0.weight" in other.stdout


GATED = {
    "reference/step-020.pt": 0,
    "out/step-010.pt": 0,
    "out/step-015.pt": 1,
    "tuned/step-020.pt": 1,
}
"""checkpoint → exit status of `gate`: the one made from a tainted one is refused too."""
