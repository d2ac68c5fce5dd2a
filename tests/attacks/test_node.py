"""F8 from outside the job: `trainguard node` names senders that no run contains; without it the record says why not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.guarded import clean_environment, trainguard
from tests.helpers.supervised import supervise
from tests.helpers.watched import write

from trainguard.appraise.kills import Kills
from trainguard.watch import node

RANK = """
import os, time
open("new", "w").write(str(os.getpid()))
os.rename("new", "pid")
time.sleep(30)
"""

LINE = (
    b"          python3-9906    [001] d..1.  1234.567890: signal_generate: sig=9 errno=0 code=0 "
    b"comm=python pid=9905 grp=1 res=0"
)


@pytest.fixture
def node_ledger(tmp_path: Path) -> Iterator[str]:
    """A node's ledger with tracefs mounted for it alone; where it listens."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root")
    (tmp_path / "tracing").mkdir()
    path = str(tmp_path / "desk" / "node")
    script = f"mount -t tracefs nodev {tmp_path}/tracing && exec {sys.executable} -m trainguard node --tracing "
    script += f"{tmp_path}/tracing --socket {path}"
    env = clean_environment() | {"TRAINGUARD_HOME": str(tmp_path / "node-home")}
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", script], env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path(path).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is not None:
        error = process.stderr.read() if process.stderr is not None else ""
        pytest.skip(f"no tracefs here: {error[-200:]}")
    yield path
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0


def end_from_outside(folder: Path, number: int = 9) -> threading.Thread:
    """Something that is no part of the job signals the rank once it is there."""

    def work() -> None:
        while not (folder / "pid").exists():
            time.sleep(0.05)
        code = f"import os, time; os.kill({(folder / 'pid').read_text()}, {number}); time.sleep(0.5)"
        subprocess.run([sys.executable, "-S", "-c", code], check=True)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def job(folder: Path) -> list[str]:
    launch = "import os, subprocess, sys; subprocess.run([sys.executable, 'rank.py'], env=dict(os.environ, RANK='0'))"
    write(folder, {"rank.py": RANK})
    return [sys.executable, "-c", launch]


def test_a_sender_outside_the_job_is_named(tmp_path: Path, node_ledger: str) -> None:
    """Process, account, command line and session, from the kernel's trace; the node seals its own record too."""
    thread = end_from_outside(tmp_path)
    run = supervise(tmp_path, job(tmp_path), env={"TRAINGUARD_NODE": node_ledger})
    thread.join()
    findings, link = run.judge(Kills)
    (finding,) = findings
    assert (finding.outcome, finding.techniques, finding.subject.rank) == ("suspicious", ("F8",), 0)
    assert "outside the job, sent SIGKILL to process" in finding.message
    assert f"of account {os.getuid()}" in finding.message
    assert any("sent from outside the job by process" in note for note in link.blind)


def test_without_it_the_sender_stays_unknown_and_the_reason_is_said(tmp_path: Path) -> None:
    """Not checked, with what would have seen it."""
    thread = end_from_outside(tmp_path)
    run = supervise(tmp_path, job(tmp_path), env={"TRAINGUARD_NODE": str(tmp_path / "nobody")})
    thread.join()
    (finding,) = run.judge(Kills)[0]
    assert finding.outcome == "not_checked"
    assert "whose sender is outside the job or is the kernel; this ledger does not see those" in finding.message


def test_without_tracefs_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 3 and one sentence; without root the same."""
    done = trainguard(tmp_path, "node", "--tracing", str(tmp_path / "nothing"))
    assert done.returncode == 3
    assert "no node's ledger here: " in done.stderr
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(node.Unsupported, match="needs root"):
        node.find_tracing()


def test_the_kernels_lines_are_read_strictly() -> None:
    """Names with spaces and dashes, signals of the kernel, signals that were not delivered, noise."""
    event = node.parse(LINE)
    assert event is not None
    assert (event["signal"], event["target"], event["sender"]) == (9, 9905, {"pid": 9906, "comm": "python3"})
    assert event["kernel"] is False
    odd = LINE.replace(b"python3-9906", b"a-7 [001] d 1.2-12").replace(b"code=0", b"code=128")
    odd = odd.replace(b"comm=python", b"comm=x pid=5 grp=1")
    told = node.parse(odd)
    assert told is not None
    assert (told["sender"]["pid"], told["target"], told["kernel"]) == (12, 9905, True)
    assert node.parse(LINE.replace(b"sig=9", b"sig=17")) is None
    assert node.parse(LINE.replace(b"res=0", b"res=1")) is None
    assert node.parse(b"CPU:1 [LOST 12 EVENTS]") is None
    assert node.parse(b"") is None


def test_only_roots_ledger_is_believed(tmp_path: Path) -> None:
    """A socket that another account made is left alone; one that does not exist is no error."""
    assert node.ask(str(tmp_path / "none")) is None
    if os.geteuid() != 0:
        desk = node.Desk(str(tmp_path / "mine"))
        assert node.ask(desk.path) is None
        desk.close()
