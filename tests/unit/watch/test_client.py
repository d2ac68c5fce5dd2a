"""The process's end of the socket: threads wait for each other, and nothing is lost without a trace."""

import json
import os
import socket
import threading
import time
from pathlib import Path

from trainguard.watch.client import Client


def test_frames_of_many_threads_all_arrive_in_one_numbering(tmp_path: Path) -> None:
    """Eight threads send at once: every frame is there, numbered without a gap."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    received: list[dict] = []

    def serve() -> None:
        link, _ = listener.accept()
        received.append(json.loads(link.recv(1 << 18)))
        link.send(b"{}")
        while data := link.recv(1 << 18):
            received.append(json.loads(data))
        link.close()

    server = threading.Thread(target=serve)
    server.start()
    client = Client(str(tmp_path / "s"))
    assert client.open()
    senders = [
        threading.Thread(target=lambda name: [client.send("note", {"of": name}) for _ in range(200)], args=(name,))
        for name in range(8)
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    client.close()
    server.join(20)
    listener.close()
    assert client.dropped == 0
    assert [frame["q"] for frame in received] == list(range(len(received)))
    assert sum(frame["k"] == "note" for frame in received) == 8 * 200


def test_a_goodbye_waits_for_a_supervisor_that_is_slow_to_read(tmp_path: Path) -> None:
    """A busy host: the queue is full when the process ends, and is read only seconds later."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    received: list[dict] = []
    leaving = threading.Event()

    def serve() -> None:
        link, _ = listener.accept()
        link.recv(1 << 18)
        link.send(b"{}")
        leaving.wait(20)
        time.sleep(1.5)  # longer than an impatient process would wait
        while data := link.recv(1 << 18):
            received.append(json.loads(data))
        link.close()

    server = threading.Thread(target=serve)
    server.start()
    client = Client(str(tmp_path / "s"))
    assert client.open()
    while not client.queue:
        client.send("note", {"text": "x" * 100_000})
    leaving.set()
    client.close()
    server.join(20)
    listener.close()
    assert received[-1]["k"] == "bye"


def test_without_a_supervisor_the_client_stays_asleep(tmp_path: Path) -> None:
    """No socket: nothing is sent, nothing is raised."""
    client = Client(str(tmp_path / "none"))
    assert not client.open()
    client.send("note", {})
    client.close()
    assert client.pid == os.getpid()
