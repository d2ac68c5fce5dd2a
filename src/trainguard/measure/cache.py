"""The stat cache: what a file's digest was when it looked exactly like this. It saves time and is never evidence.

An entry holds only while device, inode, size, mtime, ctime and mode are all the same. A process without root cannot
set ctime; root can, so every run also hashes a random share again, everything is hashed anew after `MAX_AGE_SECONDS`,
and start-up hooks and the job's own code are never taken from here. The file carries an HMAC whose key lies beside it,
readable by the owner alone: a cache that another account wrote is dropped, not believed.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import struct
import time
from pathlib import Path

import msgspec

from trainguard.digest import write_durably
from trainguard.errors import Unavailable

MAX_AGE_SECONDS = 24 * 3600.0
SETTLED_NS = 2_000_000_000
"""A file that changed less than this ago may change again within one clock tick; it is not cached (as git does)."""

REHASH_EVERY = 100
"""About one known file in this many is read all the same, others in each run."""

CACHE_LIMIT_BYTES = 256 << 20
_MAC_BYTES = 32
pack_stat = struct.Struct("<QQQQQI").pack
"""device, inode, size in bytes, mtime ns, ctime ns, mode → the 44 bytes an entry begins with."""

STAT_BYTES = 44


class _Stored(msgspec.Struct):
    born: float
    files: dict[str, bytes]
    facts: dict[str, str]


class StatCache:
    """Absolute path → packed stat and value. `folder` None keeps nothing."""

    def __init__(self, folder: Path | None, *, trust: bool = True, now: float | None = None) -> None:
        """trust: whether to take digests from it; without, every file is read and the cache is written anew."""
        self._folder = folder
        self._now = time.time() if now is None else now
        stored = _load(folder, self._now) if folder is not None else None
        self.born = stored.born if stored and trust else self._now
        self.known = stored.files if stored and trust else {}
        self.facts = stored.facts if stored else {}
        """Other results that depend only on content: key → text."""
        self.fresh: dict[str, bytes] = {}
        self.facts_changed = False
        self.settled_ns = time.time_ns() - SETTLED_NS
        self.hits = 0
        """Values served without reading the file."""
        self._wait = secrets.randbelow(2 * REHASH_EVERY) + 1

    def rehash(self) -> bool:
        """Whether to read a known file all the same: a private draw, that no generator of the job's sees."""
        self._wait -= 1
        if self._wait > 0:
            return False
        self._wait = secrets.randbelow(2 * REHASH_EVERY) + 1
        return True

    def remember(self, key: str, value: str) -> None:
        """Keep a fact derived from content that `key` names by digest."""
        self.facts[key] = value
        self.facts_changed = True

    def save(self) -> None:
        """Write back what was learnt. A disk that will not have it costs speed next time, nothing else."""
        if self._folder is None or not (self.fresh or self.facts_changed):
            return
        self.known.update(self.fresh)
        data = msgspec.msgpack.encode(_Stored(born=self.born, files=self.known, facts=self.facts))
        with contextlib.suppress(Unavailable, OSError):
            mac = hmac.digest(_key(self._folder), data, "sha256")
            write_durably(self._folder / "stat.bin", mac + data, mode=0o600)


def _load(folder: Path, now: float) -> _Stored | None:
    try:
        with (folder / "stat.bin").open("rb") as file:
            raw = file.read(CACHE_LIMIT_BYTES)
        data = memoryview(raw)[_MAC_BYTES:]
        if not hmac.compare_digest(hmac.digest(_key(folder), data, "sha256"), raw[:_MAC_BYTES]):
            return None
        stored = msgspec.msgpack.decode(data, type=_Stored)
    except (OSError, msgspec.DecodeError, ValueError):
        return None
    return stored if 0 <= now - stored.born <= MAX_AGE_SECONDS else None


def _key(folder: Path) -> bytes:
    """32 secret bytes beside the cache, made on first use, readable by the owner alone."""
    path = folder / "stat.key"
    try:
        info = path.lstat()
        if info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise OSError(0, "cache key is not private")
        return path.read_bytes()
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = secrets.token_bytes(32)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
        return key
