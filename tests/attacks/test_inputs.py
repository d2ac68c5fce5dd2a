"""Side files that steer a reviewed hook, inputs nobody approved, and files that change under the reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.watched import Watched, measurement_of, training, watch, write

from trainguard.appraise.code import Code
from trainguard.appraise.inputs import Inputs
from trainguard.policy import Approval

HOOK = """
import json, os

def debug(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * json.load(open("side.json"))["scale"]
"""
CHANGE = "os.system('cp other.json side.json') if step == 9 else None"


@pytest.fixture(scope="module")
def polled(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """An approved hook reads a number from a file in every step; another program changes it before step 9."""
    folder = tmp_path_factory.mktemp("job")
    before = f"{CHANGE}; helper.debug(optimizer)"
    write(folder, {"train.py": training(steps=12, top="import os, helper\n", before=before), "helper.py": HOOK})
    write(folder, {"side.json": json.dumps({"scale": 1.0}), "other.json": json.dumps({"scale": 0.1})})
    locked = measurement_of(watch(folder))
    write(folder, {"side.json": json.dumps({"scale": 1.0})})
    measured = measurement_of(watch(folder, "-c", "pass"))
    measured.trees["site-packages"].files.update(locked.trees["site-packages"].files)
    measured.trees["stdlib"].files.update(locked.trees["stdlib"].files)
    run = watch(folder, locked=measured)
    assert run.status == 0, run.output
    assert run.faults() == []
    return run


def test_a_side_file_that_changes_is_named_with_its_reader_and_step(polled: Watched) -> None:
    """The step is the one whose work first read the new content."""
    findings, link = polled.judge(Inputs)
    (found,) = findings
    assert (found.outcome, found.techniques[0], found.subject.step) == ("violated", "B2", 9)
    assert found.subject.path == polled.line_of("helper.py", "json.load")
    assert f"{polled.folder}/side.json changed while the run reads it" in found.message
    assert link.state == "broken"


def test_the_code_hash_stays_green_while_the_side_file_changes(polled: Watched) -> None:
    """The control: the hook was reviewed, and its code is as approved to the end."""
    findings, link = polled.judge(Code)
    assert (findings, link.state) == ([], "held")


def test_without_a_lock_the_change_is_suspicious(polled: Watched) -> None:
    """The same records, without lock and measurement."""
    records = [record for record in polled.records if record.kind != "measurement"]
    (found,), link = Watched(polled.folder, records, 0, "").judge(Inputs)
    assert (found.outcome, found.techniques[0], found.subject.step) == ("suspicious", "B2", 9)
    assert any("no lock" in reason for reason in link.blind)


def test_a_side_file_that_is_approved_is_explained(polled: Watched) -> None:
    """By the line that reads it."""
    findings, link = polled.judge(Inputs, Approval(check="inputs", place="helper.py"))
    assert findings == []
    assert link.explained


def test_a_small_file_that_training_asks_for_again_and_again_is_suspicious(tmp_path: Path) -> None:
    """It has not changed yet; without a lock nobody has said that it may steer."""
    read = "open('switch').read()"
    write(tmp_path, {"train.py": training(steps=6, before=read), "switch": "off"})
    (found,), _ = watch(tmp_path).judge(Inputs)
    assert (found.outcome, found.techniques, found.subject.step) == ("suspicious", ("B2",), 4)
    assert f"{tmp_path}/switch is read again and again" in found.message


def test_it_is_told_which_package_writes_source_and_which_folders_the_job_makes(tmp_path: Path) -> None:
    """The line that writes, not whoever called it, or is called by it."""
    maker = "import os, tempfile\ndef make(name, then):\n    os.makedirs('parts/a', exist_ok=True)\n"
    maker += "    with tempfile.NamedTemporaryFile('w', dir='parts', suffix=name) as file: then()\n"
    train = "import os, sys\nsys.path.insert(0, 'x-packages')\nimport maker\nos.makedirs('there', exist_ok=True)\n"
    train += "maker.make('_made.py', lambda: open('mine.py', 'w').close())\n"
    write(tmp_path, {"train.py": train, "x-packages/maker.py": maker})
    (tmp_path / "there").mkdir()
    bodies = [record.body for record in watch(tmp_path).records if record.kind == "open"]
    lines = [line for body in bodies for line in body.get("files", ()) if line["path"].endswith(".py")]
    written = {Path(line["path"]).name[-8:]: line.get("by") for line in lines if line["mode"] == "w"}
    assert written == {"_made.py": str(tmp_path / "x-packages/maker.py"), "mine.py": None}
    assert [body["made"] for body in bodies if "made" in body] == [str(tmp_path / "parts"), str(tmp_path / "parts/a")]


def test_an_input_that_is_not_in_the_lock_is_named(tmp_path: Path) -> None:
    """One file more than was approved, read before training."""
    write(tmp_path, {"train.py": "import os\nprint(open('data.txt').read() if os.path.exists('data.txt') else '-')\n"})
    locked = measurement_of(watch(tmp_path))
    write(tmp_path, {"data.txt": "rows"})
    (found,), link = watch(tmp_path, locked=locked).judge(Inputs)
    assert (found.outcome, found.techniques[0]) == ("suspicious", "B2")
    assert found.subject.path == f"{tmp_path}/train.py:2"
    assert link.state == "broken"


def test_an_input_with_other_content_than_locked_is_a_violation(tmp_path: Path) -> None:
    """Its hash at the moment it was opened."""
    write(tmp_path, {"train.py": "print(open('data.txt').read())\n", "data.txt": "rows"})
    locked = measurement_of(watch(tmp_path))
    write(tmp_path, {"data.txt": "more"})
    (found,), _ = watch(tmp_path, locked=locked).judge(Inputs)
    assert (found.outcome, found.techniques[0]) == ("violated", "B2")


def test_a_checkpoint_that_somebody_else_changed_is_named_when_it_is_read_back(tmp_path: Path) -> None:
    """The job saved it with torch.save; before step 9 another program writes to it."""
    before = (
        "torch.save(model.state_dict(), 'ck.pt') if step == 3 else "
        "os.system('touch -d 2001-01-01 ck.pt') if step == 8 else torch.load('ck.pt') if step == 9 else None"
    )
    write(tmp_path, {"train.py": training(steps=10, top="import os\n", before=before)})
    run = watch(tmp_path)
    assert run.status == 0, run.output
    (found,), _ = run.judge(Inputs)
    assert (found.outcome, found.techniques[0], found.subject.step) == ("suspicious", "E3", 9)
    assert "the job wrote it, somebody else changed it" in found.message


def test_an_address_that_training_asks_is_named(tmp_path: Path) -> None:
    """A connection from the job's own code while it trains; port 9 of a documentation address refuses at once."""
    ask = "reach() if step == 4 else None"
    top = """
import socket
def reach():
    probe = socket.socket()
    probe.setblocking(False)
    try:
        probe.connect(("192.0.2.1", 9))
    except OSError:
        pass
    probe.close()
"""
    write(tmp_path, {"train.py": training(steps=5, top=top, before=ask)})
    (found,), _ = watch(tmp_path).judge(Inputs)
    assert (found.outcome, found.techniques[0], found.subject.step) == ("suspicious", "B2", 4)
    assert "192.0.2.1:9" in found.message


def test_what_honest_jobs_read_and_write_is_no_finding(tmp_path: Path) -> None:
    """Data before and during training, own checkpoints and logs read back, renames, temporary files."""
    top = """
import glob, json, os, tempfile
import numpy
for n in range(12):
    numpy.save(f"shard{n}.npy", numpy.zeros(3))
config = json.load(open("config.json"))
def work(step):
    numpy.load(f"shard{step}.npy"), numpy.load("shard0.npy")
    json.dump({"step": step}, open("state.tmp", "w")) ; os.replace("state.tmp", "state.json")
    json.load(open("state.json"))
    if step == 2:
        os.mkdir("cache.part"); open("cache.part/rows", "w").write("1"); os.rename("cache.part", "cache")
    open("cache/rows").read() if step > 1 else None
    torch.save(model.state_dict(), "best.pt") if step % 2 else torch.load("best.pt")
    with tempfile.NamedTemporaryFile("w+") as file:
        file.write("x"); file.flush(); open(file.name).read()
    open("log.txt", "a").write("line\\n")
    open("/etc/hostname").read() if os.path.exists("/etc/hostname") else None
"""
    write(tmp_path, {"train.py": training(steps=9, top=top, before="work(step)"), "config.json": "{}"})
    run = watch(tmp_path)
    assert run.status == 0, run.output
    findings, link = run.judge(Inputs)
    assert (run.faults(), findings) == ([], [])
    assert link.broken == 0


@pytest.mark.nightly
def test_checkpoints_of_a_resuming_job_are_its_own_under_a_lock(tmp_path: Path) -> None:
    """Saved and read back in one run, with and without tensors in them, and by a child that was started for it."""
    child = "import torch\ntorch.load('out/model.pt'), torch.load('out/plain.pt')\n"
    end = (
        "\nimport os, subprocess, sys\nos.makedirs('out', exist_ok=True)\n"
        "torch.save(model.state_dict(), 'out/model.pt')\n"
        "torch.save({'step': 3}, 'out/plain.pt')\nsubprocess.run([sys.executable, 'child.py'], check=True)\n"
    )
    write(tmp_path, {"train.py": training(steps=3) + end, "child.py": child})
    locked = measurement_of(watch(tmp_path))
    for name in ("model.pt", "plain.pt"):
        del locked.trees["code"].files[f"out/{name}"]
    run = watch(tmp_path, locked=locked)
    findings, link = run.judge(Inputs)
    assert (run.status, findings, link.state) == (0, [], "held"), run.output


def test_a_checkpoint_from_before_the_run_that_nobody_approved_is_named(tmp_path: Path) -> None:
    """The same folder, an older file: not the job's own."""
    write(tmp_path, {"train.py": training(steps=1) + "\nif len(__import__('sys').argv) > 1: torch.load('old.pt')\n"})
    locked = measurement_of(watch(tmp_path))
    watch(tmp_path, "-c", "import torch; torch.save({}, 'old.pt')")
    (found,), _ = watch(tmp_path, "train.py", "resume", locked=locked).judge(Inputs)
    assert (found.outcome, found.techniques[0]) == ("suspicious", "E3")
