"""Folders for the length of one replay: those that a killed audit left behind are deleted by the next one.

with scratch("trainguard-task-") as folder:
    …

A folder belongs to whoever holds the lock of its file `owner`. The kernel lets go of it when the process ends, however
it ends; so a folder of ours whose lock can be had is nobody's any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

OWNER = "owner"
SWEPT_LIMIT = 100


@contextlib.contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder, deleted at the end. prefix: one that nobody else uses. parent: by default the temporary folder."""
    top = parent if parent is not None else Path(tempfile.gettempdir())
    sweep(top, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=top, ignore_cleanup_errors=True) as name:
        descriptor = os.open(Path(name) / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(descriptor)


def sweep(parent: Path, prefix: str) -> list[Path]:
    """Delete what ended audits of this account left below `parent`; returns which. Never raises."""
    swept: list[Path] = []
    with contextlib.suppress(OSError):
        for path in sorted(parent.glob(f"{prefix}*"))[:SWEPT_LIMIT]:
            if _is_ours(path) and _is_left(path / OWNER):
                shutil.rmtree(path, ignore_errors=True)
                swept.append(path)
    return swept


def _is_ours(path: Path) -> bool:
    """A folder that this account made for itself alone; no link."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _is_left(owner: Path) -> bool:
    """Whether the process that locked this file is gone. A folder without the file is being made, or is not ours."""
    try:
        descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
