"""Runs recorded through the real writer and log, from records made up by a test: no process, no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainguard.archive import RunWriter
from trainguard.envelope import load_or_create_key
from trainguard.home import Home
from trainguard.log import Log

Told = tuple[str, dict[str, Any], dict[str, Any]]
"""Kind, body and the fields of Evidence."""

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m\u202e{{7*7}}"
"""A name as an attacker would choose it: markup, attribute breaks, an escape sequence, direction marks, a template."""


def start(command: Sequence[str] = ("python", "train.py"), **fields: Any) -> Told:
    """The first record of a run."""
    body = {
        "command": list(command),
        "cwd": "/home/u",
        "host": "node-7",
        "kernel": "6.1",
        "account": {"uid": 1000, "name": "victim-a"},
        "trainguard": "0.1.0",
        "policy": None,
        "lock": None,
        "settings": {"links": "governed"},
    }
    return ("start", body | fields, {})


def at_work() -> Told:
    """The supervisor begins."""
    return ("ledger", {"state": "on", "reason": None, "child": 800, "supervisor": 799, "keeper": 798}, {})


def process(number: int = 0, rank: int | None = None, command: Sequence[str] = ("python", "train.py")) -> Told:
    """A hello, as the supervisor records it."""
    body = {"hello": {"version": "3.11.7"}, "cmdline": list(command), "ppid": 1, "of_the_job": True}
    return ("process", body, {"process": number, "pid": 800 + number, "uid": 1000, "rank": rank})


def step(number: int, process: int = 0, rank: int | None = None, **links: Any) -> Told:
    """A step frame."""
    body = {"opt": 0, "index": number, "wall_ns": 10_000_000, "own_ns": 50_000, "checked": True, "level": 0}
    where = {"process": process, "pid": 800 + process, "rank": rank, "step": number, "source": "process"}
    return ("step", body | links, where)


def leave(number: int = 0, *, orderly: bool = True) -> list[Told]:
    """Goodbye and the closed connection."""
    where = {"process": number, "pid": 800 + number}
    bye: list[Told] = [("bye", {"dropped": 0, "faults": {}}, where | {"source": "process"})] if orderly else []
    return [*bye, ("exit", {"said_bye": orderly, "frames": 1, "greeted": True}, where)]


def end(status: int | None = 0, **fields: Any) -> Told:
    """The last record of a run."""
    return ("end", {"status": status, "signal": None, "wall_ns": 4_000_000_000, "cpu_ns": 1, "key": "00"} | fields, {})


def whole_run(*steps: Told) -> list[Told]:
    """A run of one process that makes `steps` and ends well."""
    return [start(), at_work(), process(), *steps, *leave(), end()]


def record(
    home: Home,
    run: str,
    told: Sequence[Told],
    *,
    final: bool = True,
    clock: Callable[[], int] = time.time_ns,
) -> None:
    """Write, seal and log `told` as the run `run`; without `final` its record has no end.

    clock: asked once a record, and once a segment.
    """
    home.prepare()
    log = Log.open(home.log, home.keys / "log.key")
    writer = RunWriter(home, run, log, load_or_create_key(home.keys / "attestation.pem"), clock=clock)
    try:
        begin = next((body for kind, body, _ in told if kind == "start"), {})
        writer.begin(begin)
        for index, (kind, body, fields) in enumerate(told):
            writer.add(kind, body, **fields)
            if index % 50 == 49:
                writer.seal()
        writer.seal(final=final)
    finally:
        writer.close()
        log.publish()
        log.close()


def spool(home: Home, run: str) -> Path:
    """The file an attacker on the host would edit."""
    return home.run(run) / "spool"
