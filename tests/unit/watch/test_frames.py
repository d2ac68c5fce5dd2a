"""The answering thread inside the job: it says where another thread is, and nobody else notices that it is there."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainguard.watch import frames


class Client:
    """As much of the client as the link needs."""

    alive = True

    def __init__(self, link: socket.socket) -> None:
        self.socket = link
        self.frames: list[Any] = []
        self.errors: list[BaseException] = []

    def send(self, kind: str, body: Any, step: int | None = None) -> None:
        self.frames.append((kind, json.loads(json.dumps(body))))

    def fault(self, place: str, error: BaseException) -> None:
        self.errors.append(error)


@pytest.fixture
def asked() -> Iterator[tuple[Client, frames.Frames, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = Client(theirs)
    link = frames.Frames(client)  # type: ignore[arg-type]
    yield client, link, ours
    frames._before_fork()
    ours.close()
    theirs.close()
    assert client.errors == []


def answers(client: Client, count: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 20
    while len(client.frames) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return [body for _, body in client.frames]


def test_it_tells_the_line_a_thread_stands_at(asked: tuple[Client, frames.Frames, socket.socket]) -> None:
    """File, line and function, innermost first; the same stack again only by its number."""
    client, link, ours = asked
    gate, told = threading.Event(), []

    def stand() -> None:
        told.append(link.after(None))
        gate.wait(30)

    thread = threading.Thread(target=stand)
    thread.start()
    while not told:
        time.sleep(0.01)
    assert told[0] == {"tid": thread.native_id, "pid": os.getpid()}
    time.sleep(0.2)
    slices = int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[2])
    for ask in (1, 2):
        ours.send(json.dumps({"ask": ask, "slices": slices}).encode())
    first, second = answers(client, 2)
    gate.set()
    thread.join()
    assert (first["ask"], first["same"], second["id"]) == (1, True, first["id"])
    assert "frames" not in second
    assert first["frames"][0].endswith(":wait")
    assert any(frame.startswith(__file__) and frame.endswith(":stand") for frame in first["frames"])


def answering() -> set[int]:
    """The threads of this process that answer, told by what they run: others come and go."""
    code = frames._Answerer._serve.__code__
    stacks = {ident: traceback.walk_stack(frame) for ident, frame in sys._current_frames().items()}
    return {ident for ident, stack in stacks.items() if any(frame.f_code is code for frame, _ in stack)}


def come_to(count: int) -> bool:
    """Whether so many threads answer, soon."""
    deadline = time.monotonic() + 5
    while len(answering()) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(answering()) == count


def test_nobody_who_looks_for_threads_finds_it(asked: tuple[Client, frames.Frames, socket.socket]) -> None:
    """A job may join every thread that threading knows."""
    _, link, _ = asked
    link.after(None)
    assert come_to(1)
    assert not answering() & {thread.ident for thread in threading.enumerate()}


def test_it_is_gone_for_the_length_of_a_fork(asked: tuple[Client, frames.Frames, socket.socket]) -> None:
    """The child has no thread of ours, and the parent's next step starts it anew."""
    _, link, _ = asked
    link.after(None)
    assert come_to(1)
    frames._before_fork()
    assert come_to(0)
    link.after(None)
    assert come_to(1)


def test_a_client_without_a_connection_gets_no_thread() -> None:
    """Nothing to answer to."""

    class Alone:
        alive = True

    link = frames.Frames(Alone())  # type: ignore[arg-type]
    assert link.after(None) is not None
    assert frames._answerer is None
