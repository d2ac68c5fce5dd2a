"""Every system call by which the log changes a disk, in one value that a test can replace.

`Disk` is the seam for faults: a test's subclass fails the k-th call, before or after it took effect. Two rules hold
above it: what was acknowledged was followed by an fdatasync, and a name, once it holds bytes, never holds others
(`checkpoint` and `edge` aside, which are replaced whole by rename).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE_MODE = 0o644
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


class Disk:
    """open · write · fdatasync · fsync · ftruncate · rename · link · unlink · rmdir · mkdir, and nothing else."""

    def open(self, path: Path, flags: int, mode: int = FILE_MODE) -> int:
        return os.open(path, flags | _FLAGS, mode)

    def write(self, descriptor: int, data: bytes, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def fdatasync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)  # noqa: PTH104 -- one system call per method

    def link(self, old: Path, new: Path) -> None:
        os.link(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)  # noqa: PTH108 -- one system call per method

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)  # noqa: PTH106 -- one system call per method

    def mkdir(self, path: Path, mode: int = 0o755) -> None:
        os.mkdir(path, mode)  # noqa: PTH102 -- one system call per method


DISK = Disk()


def write_all(disk: Disk, descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`; a kernel may take it in pieces."""
    view = memoryview(data)
    while view:
        count = disk.write(descriptor, bytes(view) if len(view) < len(data) else data, offset)
        view, offset = view[count:], offset + count


def write_file(disk: Disk, path: Path, data: bytes, mode: int = FILE_MODE, *, sync: bool = True) -> None:
    """Create `path`, which must not exist, with `data` in it, and fsync it. Its folder's entry is not yet durable."""
    descriptor = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        write_all(disk, descriptor, data, 0)
        if sync:
            disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(disk: Disk, folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = disk.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(disk: Disk, folder: Path, mode: int = 0o755) -> None:
    """Create `folder` and what is missing above it, each name durable."""
    if folder.is_dir():
        return
    make_folders(disk, folder.parent, mode)
    try:
        disk.mkdir(folder, mode)
    except FileExistsError:
        return
    sync_folder(disk, folder.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the one exclusive flock on `path` among all processes of this machine; freed by the kernel on death."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
