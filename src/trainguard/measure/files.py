"""Reading a small file whose name the attacker chose: never a pipe, never a device, never more than asked for."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_small(path: Path, limit_bytes: int) -> bytes | None:
    """The first `limit_bytes` of a regular file (links followed); None when it is no such file or cannot be read.

    Opened without blocking: a FIFO put in its place must not hold up the measurement.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read(limit_bytes)
    except OSError:
        return None
    finally:
        os.close(descriptor)
