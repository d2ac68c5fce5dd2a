"""Code that is left behind to run later: threads, handlers, callbacks, import hooks, replaced builtins."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.watched import Watched, measurement_of, training, watch, write

from trainguard.appraise.deferred import Deferred

LEFT_BEHIND = """
import _thread, builtins, gc, signal, sys, threading, time

def nudge():
    time.sleep(60)

begun = threading.Event()

def unseen():
    begun.set()
    time.sleep(60)

def on_alarm(number, frame):
    pass

def collected(phase, info):
    pass

class Finder:
    def find_spec(self, name, path=None, target=None):
        return None

def go():
    threading.Thread(target=nudge, name="logger", daemon=True).start()
    _thread.start_new_thread(unseen, ())
    begun.wait()
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 3600)
    gc.callbacks.append(collected)
    sys.meta_path.append(Finder())
    kept = builtins.isinstance
    builtins.isinstance = lambda thing, kinds: kept(thing, kinds)
"""

PLACES = {
    "thread nudge (logger)": "def nudge",
    "thread unseen (not started through threading)": "def unseen",
    "signal handler on_alarm (signal 14)": "def on_alarm",
    "gc callback collected": "def collected",
    "import finder planted.Finder": "def find_spec",
    "builtin go.<locals>.<lambda> (isinstance)": "lambda thing",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Everything is left behind before step 3 by a file outside the job's folder."""
    job, elsewhere = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, {"planted.py": LEFT_BEHIND})
    top = "import sys\nsys.path.append(sys.argv[1])\nimport planted\n"
    write(job, {"train.py": training(steps=5, top=top, before="planted.go() if step == 3 else None")})
    run = watch(job, "train.py", str(elsewhere))
    assert run.status == 0, run.output
    assert run.faults() == []
    run.folder = elsewhere
    return run


@pytest.mark.parametrize("what", sorted(PLACES))
def test_what_was_left_behind_is_named_with_its_line(run: Watched, what: str) -> None:
    """In the step after which the number of threads was seen to have changed."""
    findings, link = run.judge(Deferred)
    (found,) = [finding for finding in findings if finding.message.startswith(what + " ")]
    assert (found.outcome, found.techniques[0], found.subject.step) == ("suspicious", "B7", 3)
    assert found.subject.path == run.line_of("planted.py", PLACES[what])
    assert link.state == "broken"


def test_a_running_interval_timer_is_listed(run: Watched) -> None:
    """It has no code of its own: its handler is the finding."""
    listed = [line for r in run.records if r.body.get("what") == "deferred" for line in r.body["found"]]
    assert any(line["kind"] == "interval timer" and line["function"] == "real" for line in listed)


def test_a_thread_of_a_file_that_is_not_as_locked_is_a_violation(tmp_path: Path) -> None:
    """With a lock the same thread is proof."""
    write(tmp_path, {"train.py": training(steps=3, top="import extra\n"), "extra.py": "pass\n"})
    locked = measurement_of(watch(tmp_path))
    later = "import threading, time\nthreading.Thread(target=lambda: time.sleep(60), daemon=True).start()\n"
    write(tmp_path, {"extra.py": later})
    (found,), _ = watch(tmp_path, locked=locked).judge(Deferred)
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "B7", f"{tmp_path}/extra.py:2")


def test_threads_and_handlers_of_the_script_and_its_libraries_are_only_listed(tmp_path: Path) -> None:
    """A writer thread and a SIGTERM handler of the script; loader workers are not needed for it."""
    top = """
import signal, threading, queue
inbox = queue.Queue()
threading.Thread(target=inbox.get, daemon=True).start()
threading.Thread(target=lambda: inbox.get(), daemon=True).start()
signal.signal(signal.SIGTERM, lambda number, frame: None)
"""
    write(tmp_path, {"train.py": training(steps=3, top=top)})
    run = watch(tmp_path)
    findings, link = run.judge(Deferred)
    assert (run.status, run.faults(), findings, link.state) == (0, [], [], "held")
    listed = [line["kind"] for r in run.records if r.body.get("what") == "deferred" for line in r.body["found"]]
    assert listed.count("thread") == 2
    assert "signal handler" in listed


def test_a_debugger_that_attaches_is_named(tmp_path: Path) -> None:
    """The job's own child attaches to it and lets go at the end; nothing is changed."""
    attach = """
import ctypes, os, subprocess, sys, time
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1 & (2**64 - 1)), 0, 0, 0)
CHILD = '''
import ctypes, os, time
call = ctypes.CDLL(None, use_errno=True).ptrace
call.argtypes = [ctypes.c_long] * 4
print(call(0x4206, os.getppid(), 0, 0), flush=True)
time.sleep(100)
'''
child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
print("attached", child.stdout.readline().strip())
"""
    write(tmp_path, {"train.py": training(steps=2, top=attach) + "child.kill(); child.wait()\n"})
    run = watch(tmp_path)
    if "attached 0" not in run.output:
        pytest.skip("this kernel lets no child attach to its parent")
    (found,) = [f for f in run.judge(Deferred)[0] if "debugger" in f.message]
    assert (found.outcome, found.techniques, found.subject.step) == ("suspicious", ("B8",), 1)
    assert "python" in found.message
