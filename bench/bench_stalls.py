"""What watching for stalls costs: the supervisor's thread, a question inside the training process, a step of the link.

    python bench/bench_stalls.py [SECONDS]

Outside: CPU time of the looking thread over wall time, with 1 and with 8 training processes that work and sleep by
turns and make ten steps a second; budget 0.2 % of one processor (after a credit of 20 ms). Inside: CPU time of the
thread that answers, per question (questions: at most 2 a second in the long run), and what the link adds to a checked
step.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from trainguard.watch import frames, stalls

CHILD = """
import time
while True:
    end = time.process_time() + 0.05
    while time.process_time() < end: pass
    time.sleep(0.05)
"""


def outside(processes: int, seconds: float) -> dict[str, float]:
    """Look at `processes` children for `seconds`."""
    children = [subprocess.Popen([sys.executable, "-S", "-c", CHILD]) for _ in range(processes)]
    records: list[str] = []
    looking = stalls.Stalls(lambda kind, body, **fields: records.append(json.dumps([kind, body, fields])))
    began, step = time.monotonic(), 0
    try:
        while time.monotonic() - began < seconds:
            step += 1
            for number, child in enumerate(children):
                told: dict[str, Any] = {"stalls": {"tid": child.pid, "pid": child.pid}} if step == 1 else {}
                looking.stepped(number, child.pid, number, step, told, len)
            time.sleep(0.1)
        wall = time.monotonic() - began
        own, looks = looking.own_ns, looking.looks
    finally:
        for child in children:
            child.kill()
            child.wait()
        looking.close()
    return {
        "share_percent": own / wall / 1e7,
        "share_percent_after_credit": (own - stalls.CREDIT_NS) / wall / 1e7,
        "looks_per_second_and_process": looks / wall / processes,
        "us_per_look": own / 1e3 / looks,
        "record_bytes_per_second_and_process": sum(map(len, records)) / wall / processes,
    }


class _Client:
    """As much of watch.client.Client as the link needs."""

    alive = True

    def __init__(self, link: socket.socket) -> None:
        self.socket = link
        self.sent = 0

    def send(self, kind: str, body: Any, step: int | None = None) -> None:
        self.sent += len(json.dumps(body))

    def fault(self, place: str, error: BaseException) -> None:
        raise error


def inside(asks: int = 300) -> dict[str, float]:
    """Ask this very process where its main thread is."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = _Client(theirs)
    answerer = frames._Answerer(client)  # type: ignore[arg-type]
    answerer.follow(threading.get_ident(), threading.get_native_id())
    answerer._answer({"ask": 0, "slices": 0})
    began = time.thread_time_ns()
    for ask in range(asks):
        answerer._answer({"ask": ask, "slices": 0})
    answered = (time.thread_time_ns() - began) / asks
    link = frames.Frames(client)  # type: ignore[arg-type]
    link.before(None)
    link.after(None)
    began = time.thread_time_ns()
    for _ in range(20_000):
        link.before(None)
        link.after(None)
    stepped = (time.thread_time_ns() - began) / 20_000
    frames._before_fork()
    ours.close()
    theirs.close()
    return {"us_per_answer": answered / 1e3, "us_per_step": stepped / 1e3}


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    for processes in (1, 8):
        for name, value in outside(processes, seconds).items():
            print(f"{processes} process(es) {name:>38}: {value:9.3f}")
    for name, value in inside().items():
        print(f"inside        {name:>38}: {value:9.3f}")
    print(f"machine: {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
