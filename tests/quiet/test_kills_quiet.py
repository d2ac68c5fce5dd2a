"""Honest ends: launchers, loaders, shells, timeouts and crashes end processes every day, and none of it is sabotage."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.guarded import run
from tests.helpers.supervised import supervise

from trainguard.appraise.kills import Kills
from trainguard.watch.ledger import Ledger

PYTHON = sys.executable

HONEST = {
    "a pool is terminated by its parent": """
import multiprocessing, time
def work(x):
    time.sleep(60)
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=work, args=(1,))
    child.start(); child.terminate(); child.join()
    spawned = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    spawned.start(); time.sleep(0.5); spawned.kill(); spawned.join()
""",
    "a child runs out of time": """
import subprocess, sys
try:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=1.0)
except subprocess.TimeoutExpired:
    pass
subprocess.run(["timeout", "0.5", sys.executable, "-c", "import time; time.sleep(60)"])
subprocess.run(["sh", "-c", f"{sys.executable} -c 'import time; time.sleep(60)' & sleep 0.5; kill $!; wait"])
subprocess.run(["sh", "-c", f"{sys.executable} -c 'import time; time.sleep(60)' & sleep 0.5; /bin/kill $!; wait"])
""",
    "a process signals itself": """
import os, signal, subprocess, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
os.kill(os.getpid(), signal.SIGUSR1)
subprocess.run([sys.executable, "-c", "import os; os.abort()"])
subprocess.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"])
""",
    "a group is ended by its leader": """
import os, subprocess, sys, signal
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
os.killpg(child.pid, signal.SIGTERM); child.wait()
""",
}


@pytest.mark.parametrize("what", HONEST)
def test_ends_by_kin_are_no_findings(tmp_path: Path, what: str) -> None:
    """Whoever started a process may end it, in every usual way."""
    (tmp_path / "job.py").write_text(HONEST[what])
    done = run(tmp_path, PYTHON, "job.py")
    assert done.status == 0
    assert done.by("kills") == []
    assert done.link("kills")["held"] > 0
    assert done.link("kills")["blind"] == []


def test_what_a_process_sent_itself_is_recorded_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the supervisor is slow, and the process is gone by the time its signal is read."""
    messages = Ledger.messages

    def slow(ledger: Ledger) -> Iterator[dict[str, Any]]:
        for told in messages(ledger):
            time.sleep(0.5)
            yield told

    monkeypatch.setattr(Ledger, "messages", slow)
    (tmp_path / "job.py").write_text(HONEST["a process signals itself"])
    findings, link = supervise(tmp_path, [PYTHON, "job.py"]).judge(Kills)
    assert findings == []
    assert link.blind == ()


def test_a_segfault_is_named_as_a_crash(tmp_path: Path) -> None:
    """A read of address 0 in a rank: the kernel's doing, without a sender, and no accusation (S8)."""
    (tmp_path / "job.py").write_text(
        "import os, subprocess, sys\n"
        "env = dict(os.environ, RANK='0', WORLD_SIZE='1')\n"
        "subprocess.run([sys.executable, '-c', 'import ctypes; ctypes.string_at(0)'], env=env)\n"
    )
    done = run(tmp_path, PYTHON, "job.py")
    assert done.by("kills") == []
    (note, rate) = done.link("kills")["blind"]
    assert "rank 0 was ended by SIGSEGV: a crash" in note
    assert "by nature" in rate


def test_a_command_that_crashes_is_no_accusation(tmp_path: Path) -> None:
    """Its end is a reason not to call the run verified, and that is all."""
    done = run(tmp_path, PYTHON, "-c", "import ctypes; ctypes.string_at(0)")
    assert done.by("kills") == []
    assert any("SIGSEGV: a crash" in reason for reason in done.verdict["reasons"])


@pytest.mark.skipif("TRAINGUARD_TEST_CGROUP" not in os.environ, reason="name a writable memory cgroup folder to run it")
def test_a_real_memory_kill_is_not_sabotage(tmp_path: Path) -> None:
    """N4: the kernel ends a process of a control group that ran out of memory."""
    group = Path(os.environ["TRAINGUARD_TEST_CGROUP"])
    (tmp_path / "job.py").write_text(
        "import os, subprocess, sys\n"
        f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "hog = 'x = []\\nwhile True: x.append(bytearray(1 << 20))'\n"
        "subprocess.run([sys.executable, '-c', hog])\n"
    )
    done = run(tmp_path, PYTHON, "job.py")
    assert done.by("kills") == []
    assert any("out of memory" in note for note in done.link("kills")["blind"])


@pytest.mark.torch
@pytest.mark.slow
def test_torchrun_and_loader_workers_end_quietly(tmp_path: Path) -> None:
    """Two ranks with loader workers; the agent ends what is left when one rank fails."""
    (tmp_path / "train.py").write_text(
        "import os, sys, time, torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "torch.set_num_threads(1)\n"
        "loader = DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=2, num_workers=2)\n"
        "next(iter(loader))\n"
        "for _ in loader: pass\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        "time.sleep(60)\n"
    )
    done = run(tmp_path, PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py")
    assert done.status == 1
    assert done.by("kills") == []
    assert done.link("kills")["held"] > 0


def test_a_rank_that_raises_is_quoted_and_accuses_nobody(tmp_path: Path) -> None:
    """Its exception and line, as the interpreter kept them."""
    (tmp_path / "rank.py").write_text("import os\nif os.environ['RANK'] == '0':\n    raise ValueError('loss is nan')\n")
    launch = "import os, subprocess, sys\nfor rank in '01':\n    subprocess.run([sys.executable, 'rank.py'], "
    launch += "env=dict(os.environ, RANK=rank, WORLD_SIZE='2'), stderr=subprocess.DEVNULL)\n"
    (tmp_path / "job.py").write_text(launch)
    done = supervise(tmp_path, [PYTHON, "job.py"])
    findings, link = done.judge(Kills)
    assert findings == []
    (note, _rate) = link.blind
    assert "rank 0 ended by itself" in note
    assert note.endswith(f": ValueError at {tmp_path}/rank.py:3: loss is nan")
