"""The looking thread: what a line of the kernel says, what is asked, and that a process is never harmed by it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainguard.watch import stalls

FUTEX_WAIT_BITSET_PRIVATE = 0x189
CALLS = [
    ("running", "running", "running"),
    ("230 0x1 0x0 0x7ffc 0x0 0x0 0x0 0x7ffc 0x7f", "asleep", "clock_nanosleep"),
    ("35 0x7ffc 0x0 0x0 0x0 0x0 0x0 0x7ffc 0x7f", "asleep", "nanosleep"),
    ("34 0x0 0x0 0x0 0x0 0x0 0x0 0x7ffc 0x7f", "asleep", "pause"),
    ("23 0x0 0x0 0x0 0x0 0x7ffc 0x0 0x7ffc 0x7f", "asleep", "select"),
    ("23 0x5 0x7f 0x0 0x0 0x7ffc 0x0 0x7ffc 0x7f", "waits", "select"),
    ("7 0x0 0x0 0x96 0x0 0x0 0x0 0x7ffc 0x7f", "asleep", "poll"),
    ("7 0x7ffc 0x1 0x1388 0x0 0x0 0x0 0x7ffc 0x7f", "waits", "poll"),
    (f"202 0x1 {FUTEX_WAIT_BITSET_PRIVATE:#x} 0x0 0x7ffc 0x0 0xffffffff 0x7ffc 0x7f", "timed", "futex"),
    (f"202 0x1 {FUTEX_WAIT_BITSET_PRIVATE:#x} 0x0 0x0 0x0 0xffffffff 0x7ffc 0x7f", "waits", "futex"),
    ("0 0x3 0x7f 0x20000 0x7f 0x0 0x0 0x7ffc 0x7f", "waits", "read"),
    ("999 0x3 0x7f 0x20000 0x7f 0x0 0x0 0x7ffc 0x7f", "waits", "call 999"),
    ("-1 0x7ffc 0x7f", "waits", "fault"),
]


@pytest.mark.parametrize(("line", "kind", "call"), CALLS)
def test_a_line_of_the_kernel_says_what_kind_of_wait_it_is(line: str, kind: str, call: str) -> None:
    """A poll of nothing is a sleep; a poll of a descriptor, a lock without a limit, a read are not."""
    assert stalls.call_of(line, os.getpid(), "x86_64") == (kind, call)


def test_an_epoll_is_a_sleep_when_it_watches_nothing() -> None:
    """Known from the descriptor itself."""
    import select

    reads, writes = os.pipe()
    epoll = select.epoll()
    line = f"232 {epoll.fileno():#x} 0x7f 0x1 0x64 0x0 0x0 0x7ffc 0x7f"
    assert stalls.call_of(line, os.getpid(), "x86_64") == ("asleep", "epoll_wait")
    epoll.register(reads)
    assert stalls.call_of(line, os.getpid(), "x86_64") == ("waits", "epoll_wait")
    epoll.close()
    os.close(reads)
    os.close(writes)


class Watching:
    """A child with steps told for it, and what was asked and recorded."""

    def __init__(self, code: str, **options: Any) -> None:
        self.child = subprocess.Popen([sys.executable, "-S", "-c", code])
        self.asked: list[dict[str, Any]] = []
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.stalls = stalls.Stalls(self.add, **options)
        self.step = 0

    def add(self, kind: str, body: dict[str, Any], **fields: Any) -> None:
        self.records.append((kind, json.loads(json.dumps(body))))

    def stepped(self) -> None:
        self.step += 1
        told = {"stalls": {"tid": self.child.pid, "pid": self.child.pid}} if self.step == 1 else {}
        self.stalls.stepped(1, self.child.pid, 0, self.step, told, lambda data: self.asked.append(json.loads(data)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [body for name, body in self.records if name == kind]

    def wait_for(self, what: str, **fields: Any) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for body in self.of(what):
                if all(body.get(name) == value for name, value in fields.items()):
                    return body
            time.sleep(0.05)
        raise AssertionError(f"no {what} with {fields} in {self.records}")


@pytest.fixture
def watching() -> Iterator[list[Watching]]:
    made: list[Watching] = []
    yield made
    for one in made:
        one.child.kill()
        one.child.wait()
        one.stalls.close()


pytestmark = pytest.mark.skipif(platform.machine() not in stalls._SLEEPS, reason="no numbers for this machine")


def test_a_sleeping_thread_is_asked_about_once_and_counted(watching: list[Watching]) -> None:
    """One question for one long sleep, however often it is looked at; its end or its length ends the record."""
    one = Watching("import time\ntime.sleep(0.8)\nwhile True: pass")
    watching.append(one)
    one.stepped()
    stall = one.wait_for("stall", why="asleep")
    assert stall["call"] in ("clock_nanosleep", "nanosleep")
    assert stall["samples"] >= 2
    assert {"ask", "slices"} == set(one.asked[0])
    one.stepped()
    one.stalls.gone(1)
    pace = one.of("pace")[-1]
    assert pace["cpus"] == len(os.sched_getaffinity(0))
    assert one.child.poll() is None


def test_a_thread_that_stops_stepping_is_asked_where_it_is(watching: list[Watching]) -> None:
    """A bounded time after the last step, with state and processor time; once."""
    one = Watching("import os\nos.read(os.pipe()[0], 1)", hang_seconds=0.4)
    watching.append(one)
    one.stepped()
    hang = one.wait_for("stall", why="hang")
    assert (hang["call"], hang["kind"], hang["state"], hang["of"]) == ("read", "waits", "S", 1)
    time.sleep(0.8)
    assert len([body for body in one.of("stall") if body["why"] == "hang"]) == 1


def test_a_process_that_cannot_be_looked_at_is_said_to_be(watching: list[Watching]) -> None:
    """Blind with its reason, once."""
    one = Watching("pass")
    watching.append(one)
    one.child.wait()
    one.stepped()
    (pace,) = one.of("pace")
    assert "No such" in pace["blind"]


def test_the_quota_of_a_control_group_is_read_in_both_versions(tmp_path: Path) -> None:
    """Nanoseconds from either file; (0, 0) for none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            folder = (tmp_path / "cpu" if controllers else tmp_path) / path.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
            text = (
                "nr_throttled 3\nthrottled_time 5000000\n" if controllers else "nr_throttled 3\nthrottled_usec 5000\n"
            )
            (folder / "cpu.stat").write_text(text)
    assert stalls.throttled(os.getpid(), tmp_path) == (3, 5_000_000)
    assert stalls.throttled(os.getpid(), tmp_path / "nothing") == (0, 0)
