"""How a process ended, as the kernel tells it to somebody who is not its parent, and whether memory ran out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainguard.watch import endings

GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", sys.argv[1]])
print(child.pid, flush=True)
sys.stdin.readline()
child.wait()
print("collected", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("code", "status", "number"),
    [
        ("import sys; sys.stdin.read(); sys.exit(7)", 7, None),
        ("import os, sys; sys.stdin.read(); os.kill(os.getpid(), 9)", None, signal.SIGKILL),
        ("import ctypes, sys; sys.stdin.read(); ctypes.string_at(0)", None, signal.SIGSEGV),
    ],
)
def test_the_end_of_a_process_that_is_not_our_child_is_known(code: str, status: int | None, number: int | None) -> None:
    """While its parent has not collected it, from /proc; afterwards, where the kernel can, from the pidfd."""
    waits = f"import time; time.sleep(0.5); import sys, io; sys.stdin = io.StringIO(); {code}"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", GRANDCHILD, waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        if parent.stdin is None or parent.stdout is None:
            raise AssertionError("pipes")
        pid = int(parent.stdout.readline())
        pidfd = endings.open_pidfd(pid)
        assert endings.ending(pid, None, pidfd) is None
        deadline = time.monotonic() + 20
        while (told := endings.ending(pid, None, pidfd)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert told == {"status": status, "signal": number}
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "collected\n"
        assert endings.ending(pid, None, pidfd) in (None, told)
        parent.stdin.write("\n")
    if pidfd is not None:
        os.close(pidfd)


def test_another_process_under_the_same_number_is_not_mistaken() -> None:
    """Pids recur: the start time goes with them."""
    assert endings.ending(os.getpid(), 1, None) is None


@pytest.mark.parametrize(
    ("line", "file", "before", "after"),
    [
        ("0::/job\n", "job/memory.events", "low 0\noom 0\noom_kill 2\n", "low 0\noom 4\noom_kill 3\n"),
        ("4:memory:/job\n", "memory/job/memory.oom_control", "under_oom 0\noom_kill 0\n", "under_oom 0\noom_kill 1\n"),
    ],
)
def test_memory_kills_are_counted_from_when_a_group_was_first_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, file: str, before: str, after: str
) -> None:
    """Control groups of version 2 and of version 1."""
    counter = tmp_path / file
    counter.parent.mkdir(parents=True)
    counter.write_text(before)
    groups = endings._groups
    monkeypatch.setattr(
        endings, "_groups", lambda pid, root: [(line, counter)] if groups(pid, root) is not None else []
    )
    memory = endings.Memory(tmp_path)
    memory.watch(os.getpid())
    assert memory.killed()["group"] == 0
    counter.write_text(after)
    memory.watch(os.getpid())
    assert memory.killed()["group"] == 1


def test_counters_that_cannot_be_read_are_not_zero(tmp_path: Path) -> None:
    """Unknown is None: no control group to be found below this folder."""
    memory = endings.Memory(tmp_path)
    memory.watch(os.getpid())
    assert memory.killed()["group"] is None
