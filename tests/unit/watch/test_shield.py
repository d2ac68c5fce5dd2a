"""os.kill under the ledger: never cut short by a signal, and no trace left in the thread that called it."""

import sys
import textwrap

from tests.unit.watch.test_supervisor import watch

COMMON = """
import os, signal, sys, time
def clean():
    state = signal.pthread_sigmask(signal.SIG_BLOCK, []), sys.gettrace(), sys.getprofile(), sys._getframe(1).f_trace
    return state == (set(), None, None, None)
def child():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid
"""


def status(code: str) -> int | None:
    ended, records = watch(sys.executable, "-c", COMMON + textwrap.dedent(code))
    assert not [record.body for record in records.of("note") if "fault" in record.body]
    assert records.of("ledger")[0].body["state"] == "on"
    return ended.status


def test_ending_many_children_with_a_handler_for_their_ends_never_fails() -> None:
    """Without the shield up to 4 in 10 of these raise InterruptedError: each child's end interrupts the next kill."""
    code = """
    ends = []
    signal.signal(signal.SIGCHLD, lambda *_: ends.append(1))
    for _ in range(25):
        children = [child() for _ in range(4)]
        for pid in children:
            os.kill(pid, signal.SIGTERM)
        for pid in children:
            os.waitpid(pid, 0)
    raise SystemExit(not (ends and clean()))
    """
    assert status(code) == 0


def test_a_handler_runs_even_where_nothing_is_called_afterwards() -> None:
    """A loop that waits for its handler without a call or a return still gets its signal."""
    code = """
    def main():
        done = []
        signal.signal(signal.SIGCHLD, lambda *_: done.append(1))
        pid = child()
        os.kill(pid, 9)
        turns = 0
        while not done and turns < 500_000_000:
            turns += 1
        return bool(done)
    raise SystemExit(not (main() and clean()))
    """
    assert status(code) == 0


def test_a_kill_that_fails_leaves_the_thread_as_it_was() -> None:
    """ProcessLookupError passes through; the mask, the trace and the profile function are back."""
    code = """
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = child()
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    try:
        os.kill(pid, 9)
        raise SystemExit(1)
    except ProcessLookupError:
        raise SystemExit(not clean())
    """
    assert status(code) == 0


def test_a_signal_to_oneself_is_handled_before_the_call_returns() -> None:
    """Code relies on it; nothing is held back there."""
    code = """
    got = []
    signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    os.kill(os.getpid(), signal.SIGUSR1); seen = len(got)
    raise SystemExit(seen != 1)
    """
    assert status(code) == 0


def test_a_jobs_own_profiler_is_left_alone() -> None:
    """A thread that is profiled or traced keeps what it has."""
    code = """
    seen = []
    profiler = lambda frame, event, argument: seen.append(event)
    sys.setprofile(profiler)
    pid = child()
    os.kill(pid, 9)
    kept = sys.getprofile() is profiler
    sys.setprofile(None)
    os.waitpid(pid, 0)
    raise SystemExit(not kept)
    """
    assert status(code) == 0
