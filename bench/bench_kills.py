"""What the kill ledger costs: system calls it does not ask about, and signals it does.

    python bench/bench_kills.py

Runs the same loop in a child with and without the ledger by turns, and prints the best of five each: CPU nanoseconds
a getppid, wall microseconds a kill, and how often kill was cut short (EINTR) while signals rained on the sender (an
interpreter without the guard inside, so without watch/shield.py).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from trainguard.watch import ledger

LOOP = """
import ctypes, json, os, signal, sys, time
getppid, kill, own = ctypes.CDLL(None).getppid, os.kill, os.getpid()
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
def timed(count, call, clock):
    best = 1.0
    for _ in range(20):
        began = clock()
        for _ in range(count):
            call()
        best = min(best, (clock() - began) / count)
    return best
result = {
    "getppid_cpu_ns": 1e9 * timed(20_000, getppid, time.process_time),
    "kill_wall_us": 1e6 * timed(200, lambda: kill(own, signal.SIGUSR1), time.perf_counter),
}
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
cut = 0
for _ in range(3_000):
    try:
        kill(own, signal.SIGUSR1)
    except InterruptedError:
        cut += 1
signal.setitimer(signal.ITIMER_REAL, 0)
result["cut_short_of_3000"] = cut
json.dump(result, open(sys.argv[1], "w"))
"""


def once(guarded: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        words = [sys.executable, "-S", "-c", LOOP, str(path)]

        def spawn() -> int:
            return os.posix_spawn(sys.executable, words, dict(os.environ))

        book = ledger.Ledger()
        pid = book.start(spawn) if guarded else spawn()
        os.waitpid(pid, 0)
        for _ in book.messages():
            pass
        book.close()
        result: dict[str, float] = json.loads(path.read_text())
        return result


def main() -> None:
    results: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(5):
        for guarded in (False, True):
            results[guarded].append(once(guarded))
    for name in results[True][0]:
        plain, guarded = (min(result[name] for result in results[g]) for g in (False, True))
        print(f"{name:>20}: {plain:10.1f} without, {guarded:10.1f} with the ledger")


if __name__ == "__main__":
    main()
