"""Run a command under a small stand-in for the supervisor and keep its records in memory: for tests and drills.

    records, status = run_guarded([sys.executable, "train.py"], cwd=folder)
    kinds = {record.kind for record in records}

The stand-in speaks the frame format of `watch/client.py` and writes the records `start`, `process`, the processes'
own, `exit` and `end`, as the real supervisor does. It attests nothing, seals nothing and watches no signals.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainguard.evidence import Evidence

BOOT = Path(__file__).parent.parent / "watch" / "boot"
FRAME_LIMIT_BYTES = 256 * 1024

DEFAULTS: dict[str, Any] = {
    "links": "governed",
    "budget_percent": 1.0,
    "credit_seconds": 1.0,
    "always_steps": 20,
    "tensors": 4,
    "elements": 32,
    "pycache": "",
    "key": "00" * 32,
}
"""The welcome; run_guarded's keyword arguments change single fields."""


class _Collector:
    """Accepts processes and appends one record a frame."""

    def __init__(self, path: str, welcome: Mapping[str, Any]) -> None:
        self.records: list[Evidence] = []
        self._welcome = welcome
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(128)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._processes = 0

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> None:
        """Append one record."""
        record = Evidence(n=len(self.records), at=time.time_ns(), source=source, kind=kind, body=body, **fields)
        self.records.append(record)

    def poll(self, seconds: float) -> bool:
        """Take what waits; returns whether anything did."""
        events = self._selector.select(seconds)
        for key, _ in events:
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._read(key.fileobj, key.data)
        return bool(events)

    def close(self) -> None:
        """Close every socket."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _accept(self) -> None:
        link, _ = self._listener.accept()
        pid, uid, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        who = {"process": self._processes, "pid": pid, "uid": uid, "rank": None}
        self._processes += 1
        self._selector.register(link, selectors.EVENT_READ, who)

    def _read(self, link: Any, who: dict[str, Any]) -> None:
        try:
            data = link.recv(FRAME_LIMIT_BYTES)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(link)
            link.close()
            self.add("exit", {}, **who)
            return
        frame = json.loads(data)
        if frame["k"] != "hello":
            self.add(frame["k"], frame["b"], source="process", seq=frame["q"], step=frame.get("s"), **who)
            return
        rank = frame["b"].get("env", {}).get("RANK")
        who["rank"] = int(rank) if rank is not None else None
        self.add("process", {"hello": frame["b"]}, **who)
        link.send(json.dumps({**self._welcome, "process": who["process"]}).encode())


def run_guarded(
    command: Sequence[str],
    *,
    cwd: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    first: Sequence[tuple[str, dict[str, Any]]] = (),
    timeout_seconds: float = 100.0,
    **settings: Any,
) -> tuple[list[Evidence], subprocess.CompletedProcess[str]]:
    """Every record of `command` run under watch in `cwd`, and how it ended, with its output as text.

    cache: folder for the private bytecode cache (made with mode 0700); None runs without one.
    first: further supervisor records (kind, body), such as `measurement`, put right after `start`.
    settings: fields of the welcome; see DEFAULTS. Raises subprocess.TimeoutExpired past `timeout_seconds`.
    """
    if cache is not None:
        Path(cache).mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trainguard-") as folder, tempfile.TemporaryFile("w+") as output:
        path = str(Path(folder) / "s")
        collector = _Collector(path, {**DEFAULTS, "pycache": str(cache or ""), **settings})
        collector.add("start", {"run": "test", "command": list(command), "cwd": os.fspath(cwd), "lock": None})
        for kind, body in first:
            collector.add(kind, body)
        child = subprocess.Popen(
            list(command), cwd=cwd, env=_environment(path, cache, env), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _listen(collector, child, time.monotonic() + timeout_seconds)
        finally:
            child.kill()
            child.wait()
            collector.close()
        collector.add("end", {"status": child.returncode, "signal": None})
        output.seek(0)
        return collector.records, subprocess.CompletedProcess(list(command), child.returncode, output.read(), "")


def _environment(path: str, cache: Any, extra: Mapping[str, str] | None) -> dict[str, str]:
    env = {**os.environ, **(extra or {}), "TRAINGUARD_SOCKET": path}
    inherited = env.get("PYTHONPATH")
    env["PYTHONPATH"] = f"{BOOT}{os.pathsep}{inherited}" if inherited else str(BOOT)
    if cache is not None:
        env["PYTHONPYCACHEPREFIX"] = str(cache)
    return env


def _listen(collector: _Collector, child: subprocess.Popen[bytes], deadline: float) -> None:
    while child.poll() is None:
        collector.poll(0.05)
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(child.args, deadline)
    while collector.poll(0.1):
        pass
