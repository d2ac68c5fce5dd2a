"""F8: one process of a job ends another. Whatever the way, the sender is named: pid, account, program, line."""

import os
from pathlib import Path

import pytest
from tests.helpers.guarded import Guarded, run

LAUNCHER = """
import os, subprocess, sys
command = [sys.executable, "rank.py"]
ranks = [subprocess.Popen(command, env=dict(os.environ, RANK=str(rank), WORLD_SIZE="2")) for rank in (0, 1)]
print([rank.wait() for rank in ranks])
"""

RANK = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
pathlib.Path("pid." + rank + ".new").write_text(str(os.getpid()))
os.rename("pid." + rank + ".new", "pid." + rank)
if rank == "1":
    time.sleep(30)
while not pathlib.Path("pid.1").exists():
    time.sleep(0.01)
victim = int(pathlib.Path("pid.1").read_text())
import attack
attack.end(victim)
"""

WAYS = {
    "os.kill": ("import os\ndef end(pid):\n    os.kill(pid, 9)\n", "attack.py:3", "SIGKILL"),
    "SIGTERM": ("import os\ndef end(pid):\n    os.kill(pid, 15)\n", "attack.py:3", "SIGTERM"),
    "ctypes": ("import ctypes\ndef end(pid):\n    ctypes.CDLL(None).kill(pid, 9)\n", "attack.py:3", "SIGKILL"),
    "bin-kill": (
        "import subprocess\ndef end(pid):\n    subprocess.run(['kill', '-9', str(pid)])\n",
        "attack.py:3",
        "SIGKILL",
    ),
    "os.system": ("import os\ndef end(pid):\n    os.system(f'kill -9 {pid}')\n", "attack.py:3", "SIGKILL"),
    "pidfd": (
        "import os, signal\ndef end(pid):\n    signal.pidfd_send_signal(os.pidfd_open(pid), 9)\n",
        "rank.py",
        "SIGKILL",
    ),
    "raw-syscall": (
        "import ctypes, platform\nNUMBER = {'x86_64': 234, 'aarch64': 131}[platform.machine()]\n"
        "def end(pid):\n    ctypes.CDLL(None).syscall(NUMBER, pid, pid, 9)\n",
        "attack.py:4",
        "SIGKILL",
    ),
}


def job(folder: Path, attack: str) -> Guarded:
    (folder / "launcher.py").write_text(LAUNCHER)
    (folder / "rank.py").write_text(RANK)
    (folder / "attack.py").write_text(attack)
    return run(folder, "python", "launcher.py")


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_kills_another_is_named_with_its_line(tmp_path: Path, way: str) -> None:
    """The kernel names the process, the guard inside it the line; the signal itself went through."""
    attack, place, name = WAYS[way]
    done = job(tmp_path, attack)
    assert done.stdout == f"[0, {-15 if name == 'SIGTERM' else -9}]"
    (finding,) = done.by("kills")
    assert (finding["outcome"], finding["techniques"], finding["subject"]["rank"]) == ("violated", ["F8"], 1)
    assert f"sent {name} to process {(tmp_path / 'pid.1').read_text()}, rank 1" in finding["message"]
    assert f"of account {os.getuid()}" in finding["message"]
    assert finding["subject"]["path"].endswith(place)
    assert done.verdict["verdict"] == "TAINTED"
    assert any(f"rank 1 was ended by {name}, sent by process" in note for note in done.link("kills")["blind"])


def test_a_stopped_rank_is_a_finding_too(tmp_path: Path) -> None:
    """SIGSTOP hangs a job as well as SIGKILL, and leaves no exit status at all."""
    lines = ("import os, time", "def end(pid):", "    os.kill(pid, 19)", "    time.sleep(0.2)", "    os.kill(pid, 9)")
    done = job(tmp_path, "\n".join(lines))
    assert any("sent SIGSTOP" in finding["message"] for finding in done.by("kills"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another account")
def test_a_sender_under_another_account_is_named_by_that_account(tmp_path: Path) -> None:
    """The account is the kernel's, not the sender's claim; an attempt the kernel refuses is on record as well."""
    attack = """
import os
def end(pid):
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            os.kill(pid, 9)
        except PermissionError:
            os._exit(7)
        os._exit(0)
    print("refused" if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7 else "done", flush=True)
    os.kill(pid, 9)
"""
    done = job(tmp_path, attack)
    assert done.stdout.startswith("refused")
    messages = [finding["message"] for finding in done.by("kills")]
    assert any("of account 65534" in message for message in messages)


def test_a_helper_that_left_its_parents_is_still_named(tmp_path: Path) -> None:
    """Fork twice, new session: no parent leads back, but the filter is inherited by everything."""
    attack = """
import os, time
def end(pid):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(0.3)
            os.kill(pid, 9)
            os._exit(0)
        os._exit(0)
    os.wait()
    time.sleep(1)
"""
    done = job(tmp_path, attack)
    (finding,) = done.by("kills")
    assert finding["outcome"] in ("violated", "suspicious")
    assert finding["subject"]["path"].endswith("attack.py:8")


def test_killing_the_guards_keeper_is_a_finding_and_does_not_stop_the_ledger(tmp_path: Path) -> None:
    """The keeper is started again, and the next signal is named as well."""
    attack = """
import os, pathlib, time
def end(pid):
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit() and b"keeper.py" in (folder / "cmdline").read_bytes():
            status = (folder / "stat").read_text().split()
            if int(status[3]) == top():
                os.kill(int(folder.name), 9)
    time.sleep(0.5)
    os.kill(pid, 9)

def top():
    launcher = pathlib.Path(f"/proc/{os.getppid()}/stat").read_text().split()
    return int(launcher[3])
"""
    done = job(tmp_path, attack)
    assert {"G7", "F8"} <= done.techniques()
    assert "[0, -9]" in done.stdout
