"""Reads a folder whole: every file's SHA-256 and size, every live `.pyc`, every native library's build id.

One pass over directory descriptors, one open per file that the stat cache cannot answer. Links to files are followed,
because the import system follows them; a folder is entered once however many links lead to it. What is neither file
nor folder, cannot be read, or changes while it is read becomes a note, and a note is never green.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from trainguard.errors import Unavailable
from trainguard.measure.cache import STAT_BYTES, StatCache, pack_stat
from trainguard.measure.native import build_id

WHOLE_BYTES = 4 << 20
"""Files up to this size are read in one call."""

CHUNK_BYTES = 1 << 20
READ_TIMES = 3
"""Looks at a file that changes while it is read, before that is said."""
PYC_HEADER_BYTES = 16
KIND, REGULAR, LINK = 0o170000, 0o100000, 0o120000
"""Bits of st_mode; constants, because this is asked of every file."""

HOOK_SUFFIXES = (".pth", ".start")


@dataclass(slots=True)
class Limits:
    """How much of a folder is read. Past a limit the walk stops, keeps what lies directly in it, and says so."""

    files: int = 400_000
    bytes: int = 1 << 46
    depth: int = 40
    entries: int = 4_000_000
    """Names looked at, taken or not."""
    file_bytes: int = 1 << 62
    """Larger files are left out without a word: they are not what is looked for."""


@dataclass(slots=True)
class Found:
    """What a walk saw."""

    files: dict[str, str] = field(default_factory=dict)
    """Path below the root → `<sha256> <size>`."""
    bytecode: dict[str, str] = field(default_factory=dict)
    """Path of a `.pyc` that Python may run → `<sha256 of the payload> <state>`."""
    native: dict[str, str] = field(default_factory=dict)
    """Path of a native library → build id."""
    notes: list[str] = field(default_factory=list)
    bytes: int = 0
    entries: int = 0


class Walker:
    """Walks folders with one cache. tag: the target interpreter's cache tag, such as `cpython-311`."""

    def __init__(self, cache: StatCache, *, tag: str = "", optimise: int = 0) -> None:
        self.cache = cache
        self._pyc_end = f".{tag}.opt-{optimise}.pyc" if optimise else f".{tag}.pyc"

    def tree(
        self,
        root: Path,
        *,
        fresh: bool = False,
        skip_folder: Callable[[str, str], bool] | None = None,
        want: Callable[[str], bool] | None = None,
        limits: Limits | None = None,
    ) -> Found:
        """Everything below `root`.

        fresh: hash every file, whatever the cache says. skip_folder(path below the root, name): leave it out.
        want(path below the root): take this file; None takes all. A root that cannot be listed is a note.
        """
        limits = limits or Limits()
        found = Found()
        seen: set[tuple[int, int]] = set()
        pending: list[tuple[str, int, dict[str, tuple[int, int]]]] = [("", 0, {})]
        top = str(root)
        while pending:
            prefix, depth, sources = pending.pop()
            folder = os.path.join(top, prefix) if prefix else top  # noqa: PTH118 - strings, in the hot loop
            try:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                found.notes.append(f"{folder}: cannot be listed: {error.strerror}")
                continue
            try:
                info = os.fstat(descriptor)
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
                with os.scandir(descriptor) as entries:
                    folders, own = self._folder(
                        entries,
                        descriptor,
                        folder,
                        prefix,
                        sources,
                        found,
                        fresh=fresh,
                        want=want,
                        file_bytes=limits.file_bytes,
                    )
            finally:
                os.close(descriptor)
            if (
                len(found.files) > limits.files
                or found.bytes > limits.bytes
                or found.entries > limits.entries
                or depth >= limits.depth
            ):
                _cut(found, top, limits)
                break
            for name in folders:
                below = f"{prefix}{name}/"
                if skip_folder is None or not skip_folder(below[:-1], name):
                    pending.append((below, depth + 1, own if name == "__pycache__" else {}))
        return found

    def _folder(
        self,
        entries: Iterable[os.DirEntry[str]],
        descriptor: int,
        folder: str,
        prefix: str,
        sources: dict[str, tuple[int, int]],
        found: Found,
        *,
        fresh: bool,
        want: Callable[[str], bool] | None,
        file_bytes: int,
    ) -> tuple[list[str], dict[str, tuple[int, int]]]:
        """Take the files of one folder; returns its folders, and mtime and size of its Python sources by stem."""
        folders: list[str] = []
        own: dict[str, tuple[int, int]] = {}
        compiled: list[tuple[str, str]] = []
        cached = prefix.endswith("__pycache__/")
        known, rehash, hits = self.cache.known, self.cache.rehash, 0
        start = folder if prefix else folder + "/"
        for entry in entries:
            found.entries += 1
            name = entry.name
            is_pyc = name.endswith(".pyc")
            if is_pyc and cached and not name.endswith(self._pyc_end):
                continue
            try:
                if entry.is_dir():
                    folders.append(name)
                    continue
                if want is not None and not is_pyc and not want(prefix + name):
                    continue
                info = entry.stat(follow_symlinks=False)
                if info.st_mode & KIND == LINK:
                    info = entry.stat()
            except OSError:
                found.files[escaped(prefix + name)] = "-> " + escaped(_target(name, descriptor))
                continue
            mode, size, mtime = info.st_mode, info.st_size, info.st_mtime_ns
            if mode & KIND != REGULAR:
                found.notes.append(f"{folder}/{name}: neither a file nor a folder; it was not read")
                continue
            if not is_pyc:
                if name.endswith(".py"):
                    own[name[:-3]] = (mtime // 1_000_000_000 & 0xFFFFFFFF, size & 0xFFFFFFFF)
                elif size > file_bytes:
                    continue
            key = pack_stat(info.st_dev, info.st_ino, size, mtime, info.st_ctime_ns, mode)
            place = start + name
            entry_known = known.get(place)
            if (
                entry_known is not None
                and entry_known.startswith(key)
                and not (fresh or name.endswith(HOOK_SUFFIXES) or rehash())
            ):
                hits += 1
                value = entry_known[STAT_BYTES:].decode()
            else:
                value = self._value(place, name, descriptor, info, found)
            if is_pyc:
                compiled.append((name, value))
                continue
            if value.count(" ") == 2:
                value, _, identity = value.rpartition(" ")
                found.native[escaped(prefix + name)] = identity
            found.files[escaped(prefix + name)] = value
            found.bytes += size
        self.cache.hits += hits
        for name, value in compiled:
            state = self._state(name, value, sources if cached else own, cached=cached)
            if state is not None:
                found.bytecode[escaped(prefix + name)] = f"{value[:64]} {state}"
        return folders, own

    def _value(self, path: str, name: str, folder: int, info: os.stat_result, found: Found) -> str:
        """Read one file and remember what it is; what it was, if the cache said otherwise, becomes a note."""
        known = self.cache.known.get(path)
        try:
            value, info = _settled(name, folder, info)
        except OSError as error:
            found.notes.append(f"{path}: cannot be read: {error.strerror}")
            return "unreadable 0"
        if value is None:
            found.notes.append(f"{path}: changed while it was read")
            return "unreadable 0"
        key = _packed(info)
        if known is not None and known.startswith(key) and known[STAT_BYTES:].decode() != value:
            found.notes.append(
                f"{path}: content changed while every time stamp stayed: clock or disk was tampered with"
            )
        if max(info.st_mtime_ns, info.st_ctime_ns) < self.cache.settled_ns and "\\" not in escaped(path):
            entry = key + value.encode()
            if entry != known:
                self.cache.fresh[path] = entry
        return value

    def _state(self, name: str, value: str, sources: dict[str, tuple[int, int]], *, cached: bool) -> str | None:
        """What Python would do with this `.pyc`: live, checked, unchecked, sourceless; None where it never runs it."""
        stem = name[: -len(self._pyc_end)] if cached else name[:-4]
        source = sources.get(stem)
        if not cached:  # one with a tag in its name is no module: bytecode kept in a folder of its own looks so
            return "sourceless" if source is None and "." not in stem else None
        if source is None:
            return None
        if value.startswith("unreadable"):
            return "live"
        _, flags, mtime, size = value.split(" ")
        if flags == "0":
            return "live" if (int(mtime), int(size)) == source else None
        return "checked" if int(flags) & 2 else "unchecked"

    def file(self, path: Path, *, fresh: bool = True) -> str:
        """`<sha256> <size>` of one file, links followed. Raises Unavailable when it cannot be read."""
        try:
            info = path.stat()
            if info.st_mode & KIND != REGULAR:
                raise Unavailable(f"{path}: expected a file")
            known = None if fresh else self.cache.known.get(str(path))
            if known is not None and known.startswith(_packed(info)):
                return " ".join(known[STAT_BYTES:].decode().split(" ")[:2])
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"{path}: cannot be read: {error.strerror}") from error
        found = Found()
        try:
            value = self._value(str(path), path.name, folder, info, found)
        finally:
            os.close(folder)
        if found.notes and value.startswith("unreadable"):
            raise Unavailable(found.notes[0])
        return " ".join(value.split(" ")[:2])


def _cut(found: Found, top: str, limits: Limits) -> None:
    """Keep what lies directly in the root: which of the rest was read is chance, and would differ every time."""
    found.notes.append(
        f"{top}: too much to measure: past {limits.files} files, {limits.bytes} bytes, {limits.entries} names or "
        f"{limits.depth} levels; only what lies directly in it was"
    )
    for kept in (found.files, found.bytecode, found.native):
        for path in [path for path in kept if "/" in path]:
            del kept[path]


def _packed(info: os.stat_result) -> bytes:
    return pack_stat(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_mode)


def _settled(name: str, folder: int, info: os.stat_result) -> tuple[str | None, os.stat_result]:
    """What a file is, and its stat then; read again where it changed since `info`, if only by getting a new name."""
    for _ in range(READ_TIMES):
        value = _read(name, folder, info)
        if value is not None:
            return value, info
        info = os.stat(name, dir_fd=folder)
    return None, info


def _read(name: str, folder: int, info: os.stat_result) -> str | None:
    """`<sha256> <size>[ <build id>]`, or for a `.pyc` `<sha256 of the payload> <flags> <mtime> <size>`; None if it
    is not the file `info` describes."""
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        size = info.st_size
        if size <= WHOLE_BYTES:
            data = os.read(descriptor, size + 1)
            if len(data) != size:
                return None
            if name.endswith(".pyc"):
                value = _pyc(data)
            elif data.startswith(b"\x7fELF"):
                value = f"{hashlib.sha256(data).hexdigest()} {size} {build_id(data) or '-'}"
            else:
                value = f"{hashlib.sha256(data).hexdigest()} {size}"
        else:
            value = _long(descriptor, size)
        return value if _packed(os.fstat(descriptor)) == _packed(info) else None
    finally:
        os.close(descriptor)


def _long(descriptor: int, size: int) -> str:
    hasher = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    first = b""
    while count := os.readv(descriptor, [buffer]):
        first = first or bytes(view[: min(count, 1 << 16)])
        hasher.update(view[:count])
    identity = f" {build_id(first) or '-'}" if first.startswith(b"\x7fELF") else ""
    return f"{hasher.hexdigest()} {size}{identity}"


def _pyc(data: bytes) -> str:
    """PEP 552 header: magic (4 bytes), flags (4), then mtime (4) and size (4) of the source, or its hash (8)."""
    flags, mtime, size = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
    return f"{hashlib.sha256(data[PYC_HEADER_BYTES:]).hexdigest()} {flags & 3} {mtime} {size}"


def _target(name: str, folder: int) -> str:
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return "?"


def escaped(path: str) -> str:
    """File names are bytes; those that are not UTF-8 are written with backslashes."""
    if path.isascii():
        return path
    return os.fsencode(path).decode("utf-8", "backslashreplace")
