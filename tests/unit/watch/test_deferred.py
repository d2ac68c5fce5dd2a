"""When the inventory of deferred code is taken, and of which threads."""

from __future__ import annotations

import _thread
import threading
from types import SimpleNamespace
from typing import Any

from trainguard.watch.deferred import EVERY, Deferred


class Client:
    """As much of the client as the link needs."""

    def __init__(self) -> None:
        self.sweeps: list[dict[str, Any]] = []

    def send(self, kind: str, body: dict[str, Any], number: int) -> None:
        self.sweeps.append(body | {"step": number})

    def fault(self, place: str, error: BaseException) -> None:
        raise error


def test_a_thread_that_threading_never_heard_of_is_looked_for_at_once() -> None:
    """`_thread.start_new_thread` leaves no mark in threading.enumerate()."""
    client = Client()
    link = Deferred(client)  # type: ignore[arg-type]
    begun, stop, over = threading.Event(), threading.Event(), threading.Event()

    def unseen() -> None:
        begun.set()
        stop.wait()
        over.set()

    link.after(SimpleNamespace(number=1))
    link.after(SimpleNamespace(number=2))
    _thread.start_new_thread(unseen, ())
    try:
        assert begun.wait(20)
        link.after(SimpleNamespace(number=3))
        link.after(SimpleNamespace(number=4))
    finally:
        stop.set()
        over.wait(20)
    assert [sweep["step"] for sweep in client.sweeps] == [1, 3]
    (line,) = [line for line in client.sweeps[1]["found"] if line["function"] == "unseen"]
    assert (line["kind"], line["on"]) == ("thread", "not started through threading")


def test_an_unchanged_number_of_threads_is_looked_at_only_now_and_then() -> None:
    """In the first step and every 50."""
    client = Client()
    link = Deferred(client)  # type: ignore[arg-type]
    for number in range(1, EVERY + 2):
        link.after(SimpleNamespace(number=number))
    assert [sweep["step"] for sweep in client.sweeps] == [1, EVERY]
