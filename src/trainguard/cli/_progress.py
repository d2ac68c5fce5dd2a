"""What a command is at, on one line of stderr: where that is a terminal, and the work takes longer than a moment.

with working("measuring the environment"):
    measurement = measure(...)
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

AFTER_SECONDS = 1.0
EVERY_SECONDS = 0.25
WHEEL = "|/-\\"


@contextlib.contextmanager
def working(text: str, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Show `text` and the seconds since it stands there, until the block ends, and leave nothing behind.

    What is given to the block changes the text. Off a terminal, and where not `shown`, nothing is written.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda _text: None
        return
    line = _Line(text)
    thread = threading.Thread(target=line.turn, name="progress", daemon=True)
    thread.start()
    try:
        yield line.say
    finally:
        line.over.set()
        thread.join()


class _Line:
    """The line, and the thread's work on it."""

    def __init__(self, text: str) -> None:
        self.over = threading.Event()
        self._standing = (text, time.monotonic())

    def say(self, text: str) -> None:
        """Another thing is under way."""
        self._standing = (text, time.monotonic())

    def turn(self) -> None:
        """Write the line again and again, from a second on; take it away at the end."""
        if self.over.wait(AFTER_SECONDS):
            return
        for wheel in itertools.cycle(WHEEL):
            text, since = self._standing
            room = max(20, shutil.get_terminal_size().columns - 12)
            shortened = text if len(text) <= room else text[: room - 3] + "..."
            sys.stderr.write(f"\r{wheel} {shortened} {time.monotonic() - since:.0f} s\x1b[K")
            sys.stderr.flush()
            if self.over.wait(EVERY_SECONDS):
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
                return
