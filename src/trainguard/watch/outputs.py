"""Which files a job saves, as the kernel tells it: inotify on the job's working folder, from outside the job.

Nothing in the training process is hooked for this. A file counts as saved when a writer closed it or it was renamed
into place, it has not been touched for `SETTLE_SECONDS`, and its first bytes are those of a model file. Model code is
saved by C++ writers that no Python hook sees; the kernel sees them all.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

IN_CLOSE_WRITE = 0x00000008
IN_MOVED_TO = 0x00000080
IN_CREATE = 0x00000100
IN_ISDIR = 0x40000000
IN_Q_OVERFLOW = 0x00004000
_MASK = IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

FOLDER_LIMIT = 2048
"""Folders watched at most; kernels allow 8,192 inotify watches and more per user."""

SETTLE_SECONDS = 0.5
SKIPPED = frozenset({".git", ".trainguard", "__pycache__", "node_modules", ".venv", "site-packages"})
SNIFF_BYTES = 64


@dataclass(slots=True)
class Outputs:
    """Watches the folders below `root`. `fileno` becomes readable when something was saved."""

    root: Path
    overflowed: bool = False
    """Whether the kernel dropped events or there were more folders than are watched: something may be missed."""
    _descriptor: int = -1
    _folders: dict[int, Path] = field(default_factory=dict)
    _changed: dict[Path, float] = field(default_factory=dict)
    _library: ctypes.CDLL = field(default_factory=lambda: ctypes.CDLL(None, use_errno=True))

    def open(self) -> bool:
        """Start watching; False where the kernel will not have it."""
        self._descriptor = self._library.inotify_init1(_FLAGS)
        if self._descriptor < 0:
            return False
        self._watch(self.root)
        return True

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        """The inotify descriptor, for a selector."""
        return self._descriptor

    def read(self) -> None:
        """Take what the kernel has to tell; nothing where it would not have us watch."""
        if self._descriptor < 0:
            return
        try:
            data = os.read(self._descriptor, 1 << 16)
        except (BlockingIOError, OSError):
            return
        offset = 0
        while offset + 16 <= len(data):
            watch, mask, _, length = struct.unpack_from("iIII", data, offset)
            name = data[offset + 16 : offset + 16 + length].rstrip(b"\0")
            offset += 16 + length
            self._take(watch, mask, os.fsdecode(name))

    def settled(self, seconds: float = SETTLE_SECONDS) -> list[Path]:
        """Model files that were saved and have been quiet for `seconds`; each is returned once for each save."""
        now = time.monotonic()
        ready = [path for path, changed in self._changed.items() if now - changed >= seconds]
        for path in ready:
            del self._changed[path]
        return [path for path in ready if is_model_file(path)]

    def _take(self, watch: int, mask: int, name: str) -> None:
        if mask & IN_Q_OVERFLOW:
            self.overflowed = True
            return
        folder = self._folders.get(watch)
        if folder is None or not name:
            return
        path = folder / name
        if mask & IN_ISDIR:
            self._watch(path)
        elif mask & (IN_CLOSE_WRITE | IN_MOVED_TO):
            self._changed[path] = time.monotonic()

    def _watch(self, top: Path) -> None:
        """Watch `top` and what is below it. Files that were there before the watch are not news."""
        pending = [top]
        while pending:
            folder = pending.pop()
            if len(self._folders) >= FOLDER_LIMIT:
                self.overflowed = True
                return
            if folder.name in SKIPPED or (folder / "pyvenv.cfg").exists():
                continue
            number = self._library.inotify_add_watch(self._descriptor, os.fsencode(folder), _MASK)
            if number < 0:
                continue
            self._folders[number] = folder
            fresh = folder != self.root and top != self.root
            try:
                for entry in os.scandir(folder):
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    elif fresh:
                        # Written between the folder's creation and our watch on it.
                        self._changed[Path(entry.path)] = time.monotonic()
            except OSError:
                continue


def is_model_file(path: Path) -> bool:
    """Whether the first bytes are those of a torch, safetensors or pickle file. Never follows a link, never blocks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        start = os.read(descriptor, SNIFF_BYTES)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    if start.startswith(b"PK\x03\x04"):
        # A torch archive begins with a record of the folder named after the file: <stem>/data.pkl, .format_version …
        return b"/" in start[30:]
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    return len(start) > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30
