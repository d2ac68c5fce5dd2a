"""S11: a checkpoint is edited between save and resume. The run that saved it was watched, so the edit is named."""

import json
import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import run, trainguard

PYTHON = sys.executable
SAVE = """
import sys, torch
torch.manual_seed(0); torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
if sys.argv[1:] == ["resume"]:
    saved = torch.load("out.pt")
    model.load_state_dict(saved["model"]); optimizer.load_state_dict(saved["optimizer"])
for step in range(5):
    optimizer.zero_grad(); model(torch.randn(3, 4)).pow(2).mean().backward(); optimizer.step()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "out.pt")
"""
EDIT = """
import torch
saved = torch.load("out.pt")
saved["model"]["1.weight"] *= 1.01
torch.save(saved, "out.pt")
"""


@pytest.mark.torch
@pytest.mark.slow
def test_weights_edited_between_save_and_resume_are_named_by_tensor(tmp_path: Path) -> None:
    """E3: size and keys unchanged, every value finite, and yet the log knows what was saved."""
    (tmp_path / "train.py").write_text(SAVE)
    first = run(tmp_path, PYTHON, "train.py")
    assert first.link("seals")["held"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".trainguard", "out.pt", "train.py"]
    size = (tmp_path / "out.pt").stat().st_size
    quiet = run(tmp_path, PYTHON, "train.py", "resume")
    assert not quiet.by("seal")
    assert quiet.link("seals")["held"] == 2
    exec(EDIT.replace('"out.pt"', repr(str(tmp_path / "out.pt"))), {})
    assert (tmp_path / "out.pt").stat().st_size == size
    told = trainguard(tmp_path, "verdict", "./out.pt", "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["run"] == quiet.verdict["run"]
    tampered = run(tmp_path, PYTHON, "train.py", "resume")
    assert tampered.verdict["verdict"] == "TAINTED"
    (finding,) = (f for f in tampered.by("seal") if f["outcome"] == "violated")
    assert finding["techniques"][0] == "E3"
    assert "1.weight" in finding["message"] or finding["subject"]["tensor"] == "model.1.weight"


RESUMING = SAVE.replace('sys.argv[1:] == ["resume"]', '__import__("os").path.exists("out.pt")')
FOREIGN = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
torch.save({"model": model.state_dict(), "optimizer": torch.optim.AdamW(model.parameters()).state_dict()}, "out.pt")
"""


@pytest.mark.torch
@pytest.mark.slow
def test_a_locked_run_goes_on_from_what_a_run_under_the_same_lock_saved(tmp_path: Path) -> None:
    """The command that was approved resumes by itself: its own checkpoint need not be declared, another one is told."""
    (tmp_path / "train.py").write_text(RESUMING)
    assert trainguard(tmp_path, "lock", "--", PYTHON, "train.py").returncode == 0
    assert run(tmp_path, PYTHON, "train.py").verdict["verdict"] == "VERIFIED"
    resumed = run(tmp_path, PYTHON, "train.py")
    assert (resumed.verdict["verdict"], resumed.by("inputs")) == ("VERIFIED", [])
    (tmp_path / ".trainguard" / "keys").rename(tmp_path / "kept")
    (tmp_path / ".trainguard").rename(tmp_path / "gone")
    (tmp_path / ".trainguard").mkdir()
    (tmp_path / "kept").rename(tmp_path / ".trainguard" / "keys")
    exec(FOREIGN.replace('"out.pt"', repr(str(tmp_path / "out.pt"))), {})
    told = run(tmp_path, PYTHON, "train.py")
    assert told.verdict["verdict"] == "SUSPECT"
    (finding,) = told.by("inputs")
    assert (finding["outcome"], finding["techniques"][0]) == ("suspicious", "E3")
    assert "not among the inputs of the lock" in finding["message"]


@pytest.mark.torch
@pytest.mark.slow
def test_a_checkpoint_with_code_that_the_job_opens_is_named(tmp_path: Path) -> None:
    """E1: the job loads pickles as it always did; the file it opened is vetted outside the job."""
    load = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    marker = tmp_path / "marker"
    (tmp_path / "base.pt").write_bytes(b"\x80\x02cbuiltins\nopen\nX\x06\x00\x00\x00markerX\x01\x00\x00\x00w\x86R.")
    done = run(tmp_path, PYTHON, "-c", load, "base.pt")
    assert marker.exists()
    assert done.verdict["verdict"] == "TAINTED"
    (finding,) = (f for f in done.by("scan") if f["outcome"] == "violated")
    assert finding["techniques"][0] == "E1"
    (tmp_path / "base.pt").write_bytes(b"\x80\x02}q\x00X\x01\x00\x00\x00aK\x01s.")
    assert not run(tmp_path, PYTHON, "-c", load, "base.pt").by("scan")
