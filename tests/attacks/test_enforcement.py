"""`run --enforce`: log never interferes, stop ends the job at the first proof, deny-signals keeps the target alive."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import msgspec
import pytest
from tests.attacks.test_kills import LAUNCHER
from tests.helpers.guarded import run, trainguard
from tests.helpers.supervised import supervise
from tests.helpers.watched import write

from trainguard.appraise.kills import Kills
from trainguard.errors import Misuse
from trainguard.policy import Policy, parse_policy

RANK = """
import attack, os, pathlib, sys, time
if os.environ["RANK"] == "1":
    pathlib.Path("pid.new").write_text(str(os.getpid()))
    os.rename("pid.new", "pid")
    for _ in range(600):
        time.sleep(0.05)
        if pathlib.Path("done").exists():
            sys.exit(5)
while not pathlib.Path("pid").exists():
    time.sleep(0.02)
attack.end(int(pathlib.Path("pid").read_text()))
pathlib.Path("done").touch()
"""

ATTACK = """
import ctypes, os, subprocess
def end(pid):
    told = []
    try:
        os.kill(pid, 9)
    except PermissionError:
        told.append("os.kill")
    library = ctypes.CDLL(None, use_errno=True)
    if library.kill(pid, 15) != 0 and ctypes.get_errno() == 1:
        told.append("ctypes")
    told.append(str(subprocess.run(["kill", "-9", str(pid)], capture_output=True).returncode))
    print(" ".join(told), flush=True)
"""


def test_a_denied_signal_leaves_its_target_alive_and_names_its_sender(tmp_path: Path) -> None:
    """Python, C and /bin/kill all get EPERM; rank 1 ends by itself, with its own status."""
    write(tmp_path, {"launcher.py": LAUNCHER + "\n", "rank.py": RANK, "attack.py": ATTACK})
    launcher = (tmp_path / "launcher.py").read_text().replace("print([", "open('statuses', 'w').write(str([")
    write(tmp_path, {"launcher.py": launcher.replace("for rank in ranks])", "for rank in ranks]))")})
    run = supervise(tmp_path, [sys.executable, "launcher.py"], deny=())
    assert (tmp_path / "statuses").read_text() == "[0, 5]"
    assert [r.body["denied"] for r in run.of("signalled") if r.body["signal"] in (9, 15)] == [True] * 3
    findings, link = run.judge(Kills)
    assert {f.outcome for f in findings} == {"violated"}
    assert all("refused and not delivered" in f.message and f"account {os.getuid()}" in f.message for f in findings)
    assert {f.subject.rank for f in findings} == {1}
    assert not any("was ended by" in note for note in link.blind)


def test_launchers_end_their_own_ranks_under_deny_signals(tmp_path: Path) -> None:
    """A parent, a shell it starts, a timeout, and a process itself: nothing of that is refused."""
    job = """
import os, signal, subprocess, sys, time
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep); child.terminate(); print(child.wait())
child = subprocess.Popen(sleep); print(subprocess.run(["kill", "-9", str(child.pid)]).returncode, child.wait())
child = subprocess.Popen(sleep); os.system(f"kill {child.pid}"); print(child.wait())
child = subprocess.Popen(sleep, start_new_session=True); os.killpg(child.pid, 15); print(child.wait())
print(subprocess.run(["timeout", "0.3", *sleep]).returncode)
open("out", "w").write("done")
os.kill(os.getpid(), 15)
"""
    write(tmp_path, {"job.py": job})
    run = supervise(tmp_path, [sys.executable, "job.py"], deny=())
    assert run.ended.signal == 15
    assert (tmp_path / "out").exists()
    assert not [r for r in run.of("signalled") if r.body.get("denied")]


def test_a_listed_program_may_signal_strangers() -> None:
    """A site's own watchdog, by its base name; signal -1 is refused whoever sends it."""
    from trainguard.watch.keeper import refuses

    def facts(pid: int, exe: str, *above: int) -> dict[str, object]:
        return {"pid": pid, "exe": exe, "comm": "", "ancestry": [[p, 0, "python3", []] for p in above]}

    message = {"call": "kill", "signal": 9, "target": 30, "sender": facts(31, "/opt/bin/nanny", 20, 10)}
    message["targets"] = [facts(30, "/usr/bin/python3", 20, 10)]
    assert refuses(message, 10, frozenset()) is True
    assert refuses(message, 10, frozenset({"nanny"})) is False
    assert refuses(message | {"signal": 10}, 10, frozenset()) is False
    assert refuses(message | {"sender": facts(20, "/usr/bin/python3", 10)}, 10, frozenset()) is False
    assert refuses(message | {"targets": [facts(99, "/usr/bin/vim", 1)]}, 10, frozenset()) is False
    assert refuses(message | {"target": -1}, 10, frozenset({"nanny"})) is True


def job(folder: Path) -> None:
    attack = "import os, time\ndef end(pid):\n    os.kill(pid, 9)\n    time.sleep(3)\n"
    rank = RANK.replace("range(600)", "range(1200)")
    write(folder, {"launcher.py": LAUNCHER, "rank.py": rank + "time.sleep(1)\n", "attack.py": attack})


def test_stop_ends_the_job_at_the_first_proof(tmp_path: Path) -> None:
    """Exit status 4, the reason and the last sealed checkpoint in the verdict; what came after never happened."""
    job(tmp_path)
    launcher = LAUNCHER.replace(
        "print([", "import time, signal; signal.signal(15, lambda *_: None); time.sleep(30); print(["
    )
    write(tmp_path, {"launcher.py": launcher})
    policy = tmp_path / "policy.toml"
    policy.write_text('enforce = "stop"\nstop_grace_seconds = 1.0\n')
    done = run(tmp_path, sys.executable, "launcher.py", options=("--policy", "policy.toml"))
    assert done.status == 4
    assert done.stdout == ""
    assert done.verdict["verdict"] == "TAINTED"
    (reason,) = [text for text in done.verdict["reasons"] if "stopped by the guard" in text]
    assert "kills: process" in reason
    assert "last sealed checkpoint: none" in reason
    assert done.by("kills")[0]["outcome"] == "violated"
    assert len(done.by("kills")) == 1, "the guard's own signals are no findings"
    assert not (tmp_path / "done").exists()


def test_log_never_stops_anything(tmp_path: Path) -> None:
    """The same job under the default goes on to its end, with the same finding."""
    job(tmp_path)
    done = run(tmp_path, sys.executable, "launcher.py", options=("--enforce", "log"))
    assert (done.status, done.stdout) == (0, "[0, -9]")
    assert (tmp_path / "done").exists()
    assert done.verdict["verdict"] == "TAINTED"
    assert not [text for text in done.verdict["reasons"] if "stopped" in text]


def test_flags_and_files_can_only_tighten(tmp_path: Path) -> None:
    """What the policy enforces no flag takes away, nor a project's file what the organisation's says."""
    (tmp_path / "policy.toml").write_text('enforce = ["stop"]\n')
    done = trainguard(tmp_path, "run", "--policy", "policy.toml", "--enforce", "log", "--", "true")
    assert (done.returncode, "the policy enforces stop" in done.stderr) == (2, True)
    with pytest.raises(Misuse, match="enforce"):
        Policy(enforce="deny-signals").tightened(Policy(enforce="stop"))
    both = Policy(enforce=("deny-signals", "stop"))
    assert both.tightened(Policy(enforce="stop")) is both
    with pytest.raises(Misuse, match="allow_signals"):
        msgspec.structs.replace(both, allow_signals=("x",)).tightened(both)
    with pytest.raises(Misuse, match="expected log, stop, deny-signals"):
        parse_policy(b'enforce = "ask"', where="policy.toml")
    assert json.loads(msgspec.json.encode(both))["enforce"] == ["deny-signals", "stop"]
