"""Bytes that stay what they were when they were checked: a private copy in memory, closed to every writer.

    with hold(Path("model.pt")) as held:
        vet_file(held.descriptor)               # the copy is judged …
        torch.load(held.open())                 # … and the copy is loaded

On Linux the copy is a memfd with F_SEAL_WRITE, so that not even this process can change it. Elsewhere it is an unlinked
temporary file of ours. Costs the size of the file in memory while it is held.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from trainguard.errors import Misuse, Unavailable

COPY_BYTES = 1 << 30
"""One sendfile call moves at most this much (the kernel's own limit is just below 2 GiB)."""
_SEALS = ("F_SEAL_WRITE", "F_SEAL_GROW", "F_SEAL_SHRINK", "F_SEAL_SEAL")


class Held:
    """One file's bytes. Close it, or use it as a context."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        """Bytes."""

    @property
    def path(self) -> str:
        """A path under which libraries that want one can open it, in this process."""
        return f"/proc/self/fd/{self.descriptor}"

    def open(self) -> BinaryIO:
        """A fresh file over the bytes, at their beginning; the caller closes it."""
        if Path(self.path).exists():
            return open(self.path, "rb")  # noqa: PTH123 - a descriptor's own name
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        return os.fdopen(os.dup(self.descriptor), "rb")

    def read(self) -> bytes:
        """All of it."""
        return self.slice(0, self.size)

    def slice(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length), cut at the end."""
        parts, at = [], start
        while at < start + length and (part := os.pread(self.descriptor, min(COPY_BYTES, start + length - at), at)):
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Let go of the copy."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def hold(path: Path) -> Held:
    """A copy of the regular file at `path`; links are followed.

    Raises Misuse where no file is there or it is of another kind, Unavailable where it cannot be read, has no room in
    memory, or changed while it was copied.
    """
    source = _open(path)
    try:
        before = os.fstat(source)
        if not stat.S_ISREG(before.st_mode):
            raise Misuse(f"{path}: expected a checkpoint in a regular file, found {_kind(before.st_mode)}")
        _check_room(path, before.st_size)
        held = Held(_empty(), before.st_size)
        try:
            _copy(source, held, path, before)
        except BaseException:
            held.close()
            raise
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror or error}") from error
    finally:
        os.close(source)
    return held


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise Misuse(f"{path}: no such file or folder") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Unavailable(f"{path}: cannot be opened: {why}") from error


def _empty() -> int:
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            return os.memfd_create("checkpoint", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    descriptor, name = tempfile.mkstemp(prefix="trainguard-")
    Path(name).unlink()
    return descriptor


def _copy(source: int, held: Held, path: Path, before: os.stat_result) -> None:
    """All bytes, without passing through Python; then nobody can write to the copy."""
    at = 0
    while at < held.size:
        count = os.sendfile(held.descriptor, source, at, min(COPY_BYTES, held.size - at))
        if not count:
            raise _changed(path)
        at += count
    if _identity(os.fstat(source)) != _identity(before):
        raise _changed(path)
    _close_to_writers(held.descriptor)


def _close_to_writers(descriptor: int) -> None:
    """From here on nobody can write, grow or shrink it; not possible for a temporary file, which has no name."""
    if all(hasattr(fcntl, name) for name in ("F_ADD_SEALS", *_SEALS)):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, sum(getattr(fcntl, name) for name in _SEALS))


def _check_room(path: Path, size: int) -> None:
    available = _available_bytes()
    if available is not None and size > available:
        raise Unavailable(
            f"{path}: {size} bytes, and {available} bytes of memory are available to hold them while they are loaded",
            next_step="load it where there is more memory, or file by file",
        )


def _available_bytes() -> int | None:
    """MemAvailable, or None where the kernel does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed(path: Path) -> Unavailable:
    return Unavailable(f"{path}: changed while it was read", next_step="load it when nothing writes to it")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "a folder" if stat.S_ISDIR(mode) else "another kind")
