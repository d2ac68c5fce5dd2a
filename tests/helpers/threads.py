"""Threads that other tests leave in this process, taken out of what the code under test counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def alone() -> Iterator[None]:
    """Within, `threading.active_count()` counts this thread and those begun inside."""
    there = set(threading.enumerate()) - {threading.current_thread()}

    def count() -> int:
        return len([thread for thread in threading.enumerate() if thread not in there])

    with mock.patch.object(threading, "active_count", count):
        yield
