"""The gate outside: which files it judges, and that nobody's odd request harms it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import socket
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest

from trainguard.cli._gate import Gate, is_candidate
from trainguard.errors import Misuse
from trainguard.home import Home
from trainguard.policy import Policy


def zipped(*names: str, comment: bytes = b"") -> bytes:
    """A zip with empty members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
        archive.comment = comment
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (pickle.dumps([1]), True),
        (gzip.compress(pickle.dumps([1]), mtime=0), True),
        (gzip.compress(b"text of a data set", mtime=0), False),
        (zipped("a/data.pkl"), True),
        (zipped(*(f"a/data/{n}" for n in range(2000)), "a/DATA.PKL"), True),
        (zipped("a.npy"), True),
        (zipped("images/1.png", "README.md"), False),
        (zipped("images/1.png", comment=b"an honest comment"), False),
        (zipped("a/data.pkl", comment=b"a comment no model reader takes"), True),
    ],
)
def test_archives_and_streams_are_judged_only_where_a_model_loader_would_read_them(
    tmp_path: Path, content: bytes, wanted: bool
) -> None:
    """Somebody's data may be zipped in any way it likes."""
    path = tmp_path / "f"
    path.write_bytes(content)
    with path.open("rb") as file:
        assert is_candidate(file.fileno(), len(content)) is wanted


def ask(gate: Gate, path: Path, *, data: bytes | None = None, descriptors: int = 1) -> dict[str, Any] | None:
    """One request as a process makes it; None where no answer comes."""
    message = json.dumps({"path": str(path), "place": "a.py:1", "step": 3, "own": False, "wait": True}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link, path.open("rb") as file:
        link.settimeout(20)
        link.connect(gate.path)
        socket.send_fds(link, [message if data is None else data], [file.fileno()] * descriptors)
        answer = link.recv(1 << 14)
    return json.loads(answer) if answer else None


def test_requests_are_answered_recorded_once_and_survive_odd_ones(tmp_path: Path) -> None:
    """Claims that are none, no descriptor, too many, a connection that says nothing."""
    records: list[tuple[str, dict[str, Any]]] = []

    def add(kind: str, body: dict[str, Any], **fields: Any) -> None:
        records.append((kind, body))

    (tmp_path / "good.pkl").write_bytes(pickle.dumps({"w": numpy.eye(2)}))
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(os.mkdir))
    gate = Gate(Home(tmp_path / "state"), "run-a", Policy(load="stop"), add, lambda path: False)
    before = len(os.listdir("/proc/self/fd"))
    gate.start()
    try:
        assert ask(gate, tmp_path / "good.pkl") == {"refuse": False, "why": ""}
        for odd in (b"", b"{", b"[]", b'{"path": 3}', b'{"path": "\\u0000"}'):
            assert ask(gate, tmp_path / "good.pkl", data=odd or b" ") is None
        assert ask(gate, tmp_path / "good.pkl", descriptors=2) == {"refuse": False, "why": ""}
        refused = ask(gate, tmp_path / "bad.pkl")
        assert refused is not None
        assert refused["refuse"]
        assert "bad.pkl" in refused["why"]
        assert ask(gate, tmp_path / "good.pkl") == {"refuse": False, "why": ""}
    finally:
        gate.close()
    assert [(kind, Path(body["path"]).name, body["refused"]) for kind, body in records] == [
        ("opened", "good.pkl", False),
        ("opened", "bad.pkl", True),
    ]
    assert not Path(gate.path).exists()
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.torch
def test_by_stop_a_checkpoint_that_was_changed_since_it_was_sealed_is_refused_with_its_tensor(tmp_path: Path) -> None:
    """S11: blocked at the load, not found after it; what was sealed passes, and so does what the run saved itself."""
    from tests.helpers import checkpoints

    home = Home(tmp_path / "state")
    path = checkpoints.save_file(tmp_path / "a.pt", 3)
    checkpoints.seal(home, path, 3)
    records: list[dict[str, Any]] = []
    ours: set[str] = set()

    def add(kind: str, body: dict[str, Any], **fields: Any) -> None:
        records.append(body)

    gate = Gate(home, "run-b", Policy(load="stop"), add, ours.__contains__)
    gate.start()
    try:
        assert ask(gate, path) == {"refuse": False, "why": ""}
        data = bytearray(path.read_bytes())
        weight = checkpoints.state(3)["model"]["block.0.weight"].numpy().tobytes()
        data[data.index(weight) + 2] ^= 1
        path.write_bytes(data)
        refused = ask(gate, path)
        assert refused is not None
        assert refused["refuse"]
        assert "model.block.0.weight" in refused["why"]
        os.utime(path)  # another identity: it is judged anew
        ours.add(str(path))
        assert ask(gate, path) == {"refuse": False, "why": ""}
    finally:
        gate.close()
    assert [finding["techniques"] for finding in records[1]["findings"]] == [("E3",)]


def test_a_trust_line_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """A policy that trusts what runs code is a usage error."""
    for line in ("posix.system call", "what is this"):
        with pytest.raises(Misuse, match="trust"):
            Gate(Home(tmp_path), "r", Policy(load_trust=(line,)), lambda *_, **__: None, lambda _: False)
