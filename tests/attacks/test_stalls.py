"""F7: sleeps in the training thread. Named by system call and line, whatever the way, and told from a slow machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.helpers.supervised import supervise
from tests.helpers.watched import write

from trainguard.appraise.stalls import Stalls
from trainguard.policy import Approval

pytestmark = pytest.mark.torch

TRAIN = """
import attack, torch
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
attack.plant(optimizer, model)
for step in range(1, {steps} + 1):
    optimizer.zero_grad()
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
"""

SLEEPS = """
import ctypes, random, select, threading, time
draw = random.Random(7)
library = ctypes.CDLL(None)
never = threading.Event()
def by_time(): time.sleep(0.15)
def by_ctypes(): library.usleep(150_000)
def by_select(): select.select([], [], [], 0.15)
def by_poll(): select.poll().poll(150)
def by_event(): never.wait(0.3)
ways = [by_time, by_ctypes, by_select, by_poll, by_event]
count = 0
def slow(*_):
    global count
    count += 1
    if count > 5:
        ways[count % 5]()
def plant(optimizer, model):
    optimizer.register_step_pre_hook(slow)
"""


def test_every_way_to_sleep_is_named_by_call_and_line(tmp_path: Path) -> None:
    """Python, the C library, a wait for no descriptor, a lock nobody opens: all in a hook of the optimizer (S7)."""
    write(tmp_path, {"train.py": TRAIN.format(steps=45), "attack.py": SLEEPS})
    run = supervise(tmp_path)
    findings, link = run.judge(Stalls)
    named = {finding.subject.path: finding for finding in findings}
    for line, call in (
        (6, "nanosleep"),
        (7, "nanosleep"),
        (8, "select"),
        (9, "poll"),
        (10, "a lock with a time limit"),
    ):
        finding = named[f"{tmp_path}/attack.py:{line}"]
        assert (finding.outcome, finding.techniques, finding.check) == ("suspicious", ("F7",), "stalls")
        assert "in optimizer" in finding.message
        assert any(call in f.message for f in findings if f.subject.path == finding.subject.path)
    assert all("device-hours lost" in f.message for f in findings if " slept " in f.message)
    assert any(" slept " in f.message for f in findings)
    assert link.broken == 5


def test_a_sleep_outside_training_is_nobodys_business(tmp_path: Path) -> None:
    """Before the first step, after the last, in another thread, and in a process that never steps."""
    attack = """
import subprocess, sys, threading, time
def beside():
    while True:
        time.sleep(0.2)
def plant(optimizer, model):
    threading.Thread(target=beside, daemon=True).start()
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    time.sleep(0.5)
"""
    write(tmp_path, {"train.py": TRAIN.format(steps=60) + "\nimport time\ntime.sleep(1.0)\n", "attack.py": attack})
    findings, link = supervise(tmp_path).judge(Stalls)
    assert findings == []
    assert link.held > 0


def test_an_approved_line_explains_its_sleeps(tmp_path: Path) -> None:
    """The policy names the line once; the link says so."""
    attack = "import time\ndef slow(*_): time.sleep(0.12)\ndef plant(optimizer, model):\n" + (
        "    optimizer.register_step_post_hook(slow)\n"
    )
    write(tmp_path, {"train.py": TRAIN.format(steps=12), "attack.py": attack})
    run = supervise(tmp_path)
    assert [f.subject.path for f in run.judge(Stalls)[0]] == [f"{tmp_path}/attack.py:2"] * 2
    findings, link = run.judge(Stalls, Approval(check="stalls", place="attack.py:2"))
    assert (findings, link.explained, link.broken) == ([], (f"{tmp_path}/attack.py:2",), 0)


@pytest.mark.nightly
def test_the_rank_that_holds_up_the_others_is_named(tmp_path: Path) -> None:
    """One rank reads a pipe that stays empty, the other stands in the backward pass and waits for it."""
    train = """
import os, select, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for step in range(1, 21):
    if step == 12 and dist.get_rank() == 1:
        select.select([os.pipe()[0]], [], [], 12)
    optimizer.zero_grad()
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
os._exit(0)
"""
    write(tmp_path, {"train.py": train})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    run = supervise(tmp_path, command, env={"OMP_NUM_THREADS": "1"}, hang_seconds=4.0)
    findings, link = run.judge(Stalls)
    (finding,) = [found for found in findings if "steps stopped" in found.message]
    assert (finding.outcome, finding.subject.rank, finding.subject.path) == ("suspicious", 1, f"{tmp_path}/train.py:9")
    assert "select" in finding.message
    assert "1 of 2 ranks wait for it in a collective" in finding.message
    assert any("rank 0 made none" in note and "in backward" in note for note in link.blind)
