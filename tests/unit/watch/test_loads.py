"""The gate inside a process: what it asks about, what it does with the answer, and what it leaves alone."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from trainguard.watch import audit, loads
from trainguard.watch.loads import Loads, begins_like_model


class Client:
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, kind: str, body: dict[str, Any], step: int | None = None) -> None:
        self.sent.append(body)


class Outside:
    """Answers each request by `decide(path, content)`: None lets it pass, a text refuses it."""

    def __init__(self, address: Path, decide: Callable[[str, bytes], str | None]) -> None:
        self.asked: list[str] = []
        self._decide = decide
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(address))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            with link:
                data, (descriptor,), _, _ = socket.recv_fds(link, 1 << 14, 1)
                request = json.loads(data)
                why = self._decide(request["path"], os.pread(descriptor, 1 << 20, 0))
                os.close(descriptor)
                self.asked.append(Path(request["path"]).name)
                if request["wait"]:
                    link.send(json.dumps({"refuse": why is not None, "why": why}).encode())

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    """Refuses what holds the word EVIL."""
    server = Outside(tmp_path / "g", lambda path, content: f"{path}: evil" if b"EVIL" in content else None)
    yield server
    server.close()


def gate(tmp_path: Path, mode: str = "stop") -> tuple[Loads, Client]:
    """The gate of a process, and what it sends."""
    client = Client()
    return Loads(client, {"mode": mode, "path": str(tmp_path / "g")}), client  # type: ignore[arg-type]


def heads() -> dict[str, tuple[bytes, bool]]:
    """Content → whether a model loader may read it."""
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a/data.pkl", b"")
    arrays: dict[str, bytes] = {}
    for name, array in (("plain", numpy.eye(3)), ("objects", numpy.array([None]))):
        saved = io.BytesIO()
        numpy.save(saved, array, allow_pickle=True)
        arrays[name] = saved.getvalue()
    return {
        **{f"protocol {p}": (pickle.dumps({"a": [1, 2.5]}, protocol=p), True) for p in (2, 3, 4, 5)},
        "protocol 0 that names something": (pickle.dumps(os.mkdir, protocol=0), True),
        "protocol 1 that names something": (b"(" + pickle.dumps(os.mkdir, protocol=1), True),
        "zip": (zipped.getvalue(), True),
        "object array": (arrays["objects"], True),
        "number array": (arrays["plain"], False),
        "safetensors": ((64).to_bytes(8, "little") + b'{"w":' + b" " * 100, True),
        "gzip": (b"\x1f\x8b\x08\0", True),
        "text": (b"classes\ncat\ndog\nconfig\nmodel\n", False),
        "json": (b'{"config": 1}', False),
        "source": (b"import os\nclass A:\n    pass\n", False),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(64), False),
        "jpeg": (b"\xff\xd8\xff\xe0" + bytes(64), False),
        "nothing": (b"", False),
    }


@pytest.mark.parametrize("name", heads())
def test_only_what_begins_like_a_model_file_is_asked_about(name: str) -> None:
    """By content, whatever the name."""
    content, wanted = heads()[name]
    assert begins_like_model(content[: loads.HEAD_BYTES], len(content)) is wanted


def test_an_unsafe_file_is_refused_before_it_is_opened_and_a_good_one_is_asked_about_once(
    tmp_path: Path, outside: Outside
) -> None:
    """By `stop`; the answer is remembered for as long as the file stays what it is."""
    state, _ = gate(tmp_path)
    for name, content in (("bad.pt", b"EVIL"), ("good.pt", b"good")):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    for _ in range(2):
        with pytest.raises(audit.Refused, match=r"bad\.pt: evil"):
            state.on_open((str(tmp_path / "bad.pt"), "r", os.O_RDONLY))
        state.on_open((str(tmp_path / "good.pt"), "rb", os.O_RDONLY))
    assert outside.asked == ["bad.pt", "good.pt", "bad.pt"]
    (tmp_path / "good.pt").write_bytes(pickle.dumps(b"now EVIL"))
    with pytest.raises(audit.Refused):
        state.on_open((os.fsencode(tmp_path / "good.pt"), None, os.O_RDONLY | os.O_CLOEXEC))


def test_writing_pipes_folders_and_missing_files_are_left_alone(tmp_path: Path, outside: Outside) -> None:
    """Nothing is asked, nothing blocks, nothing is raised."""
    state, client = gate(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(b"EVIL"))
    os.mkfifo(tmp_path / "fifo")
    reading, writing = os.pipe()
    os.write(writing, pickle.dumps(b"EVIL"))
    state.on_open((str(tmp_path / "a.pkl"), "w", os.O_WRONLY | os.O_CREAT))
    for target in (tmp_path, tmp_path / "fifo", tmp_path / "missing", "/proc/self/status", "bad\0name"):
        state.on_open((str(target), "r", os.O_RDONLY))
    state.on_open((reading, "rb", os.O_RDONLY))
    state.on_open((None, "rb", os.O_RDONLY))
    os.close(reading)
    os.close(writing)
    assert not outside.asked
    assert not client.sent


def test_a_descriptor_is_looked_at_like_a_path(tmp_path: Path, outside: Outside) -> None:
    """`open(fd)` after os.open by native code; its position does not move."""
    state, _ = gate(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(b"EVIL"))
    descriptor = os.open(tmp_path / "a.pkl", os.O_RDONLY)
    with pytest.raises(audit.Refused, match=r"a\.pkl"):
        state.on_open((descriptor, "rb", os.O_RDONLY))
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
    os.close(descriptor)


def test_a_file_put_in_place_between_the_answer_and_the_opening_is_asked_about_again(
    tmp_path: Path, outside: Outside
) -> None:
    """The first name an unpickler resolves is the moment to look whether it reads what was let pass."""
    state, _ = gate(tmp_path)
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(b"good"))
    state.on_open((str(path), "rb", os.O_RDONLY))
    (tmp_path / "other").write_bytes(pickle.dumps(b"EVIL"))
    (tmp_path / "other").rename(path)
    with path.open("rb"), pytest.raises(audit.Refused, match="evil"):
        state.on_find_class(("collections", "OrderedDict"))
    state.on_find_class(("collections", "OrderedDict"))


def test_without_anybody_to_ask_log_goes_on_and_stop_does_not(tmp_path: Path) -> None:
    """And both say so."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(b"good"))
    state, client = gate(tmp_path, "log")
    state.on_open((str(tmp_path / "a.pkl"), "rb", os.O_RDONLY))
    assert client.sent[0]["unvetted"].endswith("a.pkl")
    state, client = gate(tmp_path, "stop")
    with pytest.raises(audit.Refused, match="could not be vetted"):
        state.on_open((str(tmp_path / "a.pkl"), "rb", os.O_RDONLY))
    assert client.sent


def test_names_that_run_code_are_told_and_by_stop_refused(tmp_path: Path) -> None:
    """Whatever Python calls them; names that data needs are not."""
    for mode in ("log", "stop"):
        state, client = gate(tmp_path, mode)
        for module, name in (
            ("posix", "system"),
            ("subprocess", "Popen"),
            ("__builtin__", "eval"),
            ("os", "path.system"),
        ):
            if mode == "stop":
                with pytest.raises(audit.Refused, match=f"{module}.{name}"):
                    state.on_find_class((module, name))
            else:
                state.on_find_class((module, name))
        assert [body["refused"] for body in client.sent] == [mode == "stop"] * 4
        for module, name in (
            ("os", "PathLike"),
            ("builtins", "getattr"),
            ("code.models", "Net"),
            ("subprocess", "CompletedProcess"),
            (3, None),
        ):
            state.on_find_class((module, name))
        assert len(client.sent) == 4


def test_what_processes_of_the_job_send_each_other_is_let_be(tmp_path: Path) -> None:
    """A pool that maps os.system is the job's own business."""
    from multiprocessing.reduction import ForkingPickler

    state, client = gate(tmp_path)

    class Listening(pickle._Unpickler):  # type: ignore[name-defined, misc]
        def find_class(self, module: str, name: str) -> Any:
            state.on_find_class((module, name))
            return super().find_class(module, name)

    channel = tmp_path / "multiprocessing"
    code = compile("def receive(read): return read()", str(channel / "connection.py"), "exec")
    space: dict[str, Any] = {}
    exec(code, space)
    data = bytes(ForkingPickler.dumps(os.system))
    assert space["receive"](Listening(io.BytesIO(data)).load) is os.system
    assert not client.sent
    with pytest.raises(audit.Refused):
        Listening(io.BytesIO(data)).load()
