"""Callbacks of frameworks add names, epochs and metrics to the record; trackers get the verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.guarded import clean_environment, run, trainguard

SCRIPTS = Path(__file__).parents[1] / "scripts"
PYTHON = sys.executable

TRAINER = """
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from trainguard.integrations.transformers import TrainguardCallback

torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)
    def forward(self, x, labels):
        y = self.net(x)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}

rows = [{"x": torch.ones(4) * i, "labels": torch.ones(1)} for i in range(16)]
options = TrainingArguments("out", max_steps=6, logging_steps=2, save_strategy="no", use_cpu=True, report_to="none",
                            disable_tqdm=True, per_device_train_batch_size=2)
Trainer(model=Net(), args=options, train_dataset=rows, callbacks=[TrainguardCallback()]).train()
"""

ACCELERATE = """
import torch
from accelerate import Accelerator
from trainguard.integrations.accelerate import TrainguardTracker

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True, log_with=TrainguardTracker())
accelerator.init_trackers("charlm", config={"lr": 0.1, "name": "small"})
model = torch.nn.Linear(3, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
for step in range(4):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 3)).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step()
    accelerator.log({"loss": loss.item(), "text": "not a number", "bad": float("nan")}, step=step)
accelerator.end_training()
"""

TRACKED = """
import mlflow, torch, wandb
torch.set_num_threads(1)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
wandb.init(project="charlm", mode="offline")
with mlflow.start_run():
    for step in range(4):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).pow(2).mean().backward()
        optimizer.step()
wandb.finish()
"""


def story(folder: Path) -> dict[str, Any]:
    """`show --json` of the only run in `folder`."""
    done = trainguard(folder, "show", "latest", "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def curves(told: dict[str, Any]) -> dict[str, int]:
    """Curve → values it was drawn from."""
    return {curve["name"]: curve["count"] for curve in told["curves"]}


def labels(told: dict[str, Any]) -> str:
    """Everything that integrations named, as one text."""
    return " ".join(event["detail"] for event in told["events"] if event["kind"] == "label")


@pytest.mark.torch
@pytest.mark.slow
def test_the_trainers_names_epochs_and_metrics_stand_in_the_record(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINER)
    guarded = run(tmp_path, PYTHON, "train.py")
    assert guarded.status == 0, guarded.stderr
    assert not guarded.techniques()
    told = story(tmp_path)
    assert curves(told)["loss"] == 3 + 1, "three logged values and the mean at the end"
    assert "model Net" in labels(told)
    assert "max_grad_norm 1.0" in labels(told)


@pytest.mark.torch
@pytest.mark.nightly
def test_lightning_loads_its_callback_by_itself_and_can_be_told_not_to(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text((SCRIPTS / "lightning_fit.py").read_text())
    with_it = run(tmp_path, PYTHON, "train.py", "--steps", "41")
    assert not with_it.techniques()
    told = story(tmp_path)
    assert "module Autoencoder" in labels(told)
    assert curves(told)["val_loss"] == 2, "after the first epoch and at the end"
    without = run(tmp_path, PYTHON, "train.py", "--steps", "41", env={"TRAINGUARD_LIGHTNING": "0"})
    assert labels(story(tmp_path)) == ""
    assert with_it.stdout.splitlines()[-2] == without.stdout.splitlines()[-2], "the same weights, bit for bit"


@pytest.mark.nightly
@pytest.mark.torch
@pytest.mark.slow
def test_what_accelerate_logs_is_drawn_and_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ACCELERATE)
    guarded = run(tmp_path, PYTHON, "train.py")
    assert guarded.status == 0, guarded.stderr
    told = story(tmp_path)
    assert curves(told)["loss"] == 4
    assert "text" not in curves(told)
    assert "bad" not in curves(told)
    assert "lr 0.1, name small" in labels(told)


@pytest.mark.nightly
@pytest.mark.torch
def test_callbacks_do_nothing_in_a_process_that_is_not_guarded(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ACCELERATE + "\nimport sys\nassert '_trainguard' not in sys.modules\n")
    done = subprocess.run(
        [PYTHON, "train.py"], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
@pytest.mark.torch
@pytest.mark.slow
def test_trackers_that_the_job_had_open_are_tagged_with_the_verdict(tmp_path: Path) -> None:
    """Offline: MLflow's local store and a W&B run that was never online."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    pytest.importorskip("wandb", reason="wandb is not installed")
    place = {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    place |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    (tmp_path / "train.py").write_text(TRACKED)
    guarded = run(tmp_path, PYTHON, "train.py", env=place)
    assert guarded.status == 0, guarded.stderr
    done = trainguard(tmp_path, "verdict", "latest", "--tag", "--quiet", env=place)
    assert done.stderr.count("tagged UNKNOWN") == 2, done.stderr
    tags = {path.name: path.read_text() for path in tmp_path.glob("mlruns/0/*/tags/trainguard.*")}
    assert tags["trainguard.verdict"] == "UNKNOWN"
    assert tags["trainguard.level"] == "TIL-1"
    offline = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(offline) == 2, "the run, and the part with the verdict"
    assert len({path.name.rpartition("-")[2] for path in offline}) == 1, "of one run id"
    assert mlflow is not None


@pytest.mark.torch
def test_a_run_without_trackers_has_nothing_to_tag_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('no training here')\n")
    run(tmp_path, PYTHON, "train.py")
    done = trainguard(tmp_path, "verdict", "latest", "--tag", "--quiet")
    assert done.returncode == 3
    assert "names no MLflow or Weights & Biases run" in done.stderr
