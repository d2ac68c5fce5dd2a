"""What a checkpoint consists of: every file, folder and link under it, read once, strictly.

    manifest = read_manifest(Path("checkpoints/step-900"))              # or a single file
    manifest.entries                                                    # Entry, sorted by name
    root_digest(manifest), directory_hash(manifest)

Rules, each with a test that breaks it:
 1. Nothing but regular files, folders, and links that end at a regular file inside the folder. FIFOs, sockets, devices,
    links that leave the folder, dangle or go in circles are refused before anything is opened.
 2. Files are opened one path component at a time with O_NOFOLLOW, so no link can be put in the way meanwhile.
 3. `lstat` when listed, `fstat` when opened, `fstat` after the last byte: all the same, or the file changed.
 4. The folder is listed again at the end; it must show the same names.
 5. What OMS leaves out (`.git*`, empty folders, modes, link targets) is in the manifest too.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainguard.digest import CHUNK_BYTES
from trainguard.errors import Misuse, Unavailable
from trainguard.seal.hashing import new_hasher
from trainguard.seal.tensors import Digester, read_layout

SEAL_NAME = "model.sig"
"""The bundle's name inside a folder: what the OMS tools write and look for."""
SEAL_SUFFIX = ".sig"
"""The bundle of the file `x` is `x.sig` beside it (OMS v1.0 section 9)."""

OMS_IGNORED = (".git", ".gitattributes", ".github", ".gitignore")
"""Left out of OMS resources at the top of the folder (section 6.2); bound by our own record."""

SINGLE = "."
"""Resource name of a checkpoint that is one file: what model_signing 1.1 writes and expects (see spec/seal.md)."""

ENTRY_LIMIT = 100_000
DEPTH_LIMIT = 64
WORKERS = min(4, os.cpu_count() or 1)
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Kind = Literal["file", "folder", "link"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing in a checkpoint."""

    name: str
    """Path relative to the folder, `/` between parts; SINGLE for a checkpoint that is one file."""
    kind: Kind
    mode: int | None
    """Permission bits, set-uid, set-gid and sticky included; None for links, and where another tool's seal has none."""
    size: int | None = None
    """Bytes of a file, or of the file a link ends at; None for folders, and where another tool's seal has none."""
    digest: str | None = None
    """Of the content, in the manifest's hash type, hex; None for folders and before reading."""
    target: str | None = None
    """What a link says, verbatim."""
    tensors: Mapping[str, str] | None = None
    """Name → digest of the tensors in it; None where there are none we can place, or they were not asked for."""

    @property
    def ignored_by_oms(self) -> bool:
        """Whether OMS leaves it out by default."""
        return self.name.split("/", 1)[0] in OMS_IGNORED


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint as it lay on the disk."""

    name: str
    """Last part of its path."""
    hash_type: str
    single: bool
    """One file rather than a folder."""
    entries: tuple[Entry, ...]
    """Sorted by name; empty folders only, since the others are in the names."""

    @property
    def resources(self) -> tuple[Entry, ...]:
        """The entries OMS lists: files and links to files, without what it ignores."""
        return tuple(e for e in self.entries if e.kind != "folder" and not e.ignored_by_oms)

    @property
    def others(self) -> tuple[Entry, ...]:
        """The entries OMS does not list."""
        return tuple(e for e in self.entries if e.kind == "folder" or e.ignored_by_oms)


class NotSealable(Unavailable):
    """Something that may not be part of a checkpoint: a FIFO, a device, a link that leaves the folder."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """An entry with what `lstat` said of the file that will be read."""

    entry: Entry
    path: str
    """Path to open, relative to the root: the link's end for a link."""
    identity: tuple[int, ...]


def seal_path_of(path: Path) -> Path:
    """Where the seal of the checkpoint at `path` lies."""
    return path / SEAL_NAME if path.is_dir() else path.with_name(path.name + SEAL_SUFFIX)


def resolve(path: Path) -> Path:
    """The checkpoint itself, links followed. Raises Unavailable where there is none or links go in circles."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "links go in circles"
        raise Unavailable(f"{path}: expected a checkpoint file or folder: {why}") from error
    except ValueError as error:  # a NUL in the name
        raise Misuse(f"{str(path)!r}: not a path: {error}") from error


def list_entries(path: Path) -> tuple[Entry, ...]:
    """The entries at `path` (resolved) by name, kind, size and mode alone; nothing is opened but folders."""
    return tuple(listed.entry for listed in _list(path))


def read_manifest(
    path: Path, *, hash_type: str = "sha256", tensors: bool = True, only: frozenset[str] | None = None
) -> Manifest:
    """Read everything at `path` (resolved) once.

    tensors: digest tensors in the same pass, for the record of a seal; verifying needs them only where files differ.
    only: names to read; the others are listed without digest.
    Raises Unavailable for what may not be part of a checkpoint, cannot be read, or changes while it is read.
    """
    before = _list(path)
    wanted = [item for item in before if item.entry.kind != "folder" and (only is None or item.entry.name in only)]
    if not any(item.entry.kind != "folder" for item in before):
        raise Unavailable(f"{path}: expected a checkpoint, found no file in it")
    with _opened_root(path) as root, ThreadPoolExecutor(WORKERS) as pool:
        try:
            read = {e.name: e for e in pool.map(lambda item: _read(path, root, item, hash_type, tensors), wanted)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if [(item.entry.name, item.identity) for item in _list(path)] != [(i.entry.name, i.identity) for i in before]:
        raise _changed(str(path))
    return Manifest(
        name=path.name,
        hash_type=hash_type,
        single=before[0].entry.name == SINGLE,
        entries=tuple(read.get(item.entry.name, item.entry) for item in before),
    )


def root_digest(digests: Iterator[str]) -> str:
    """OMS root digest (section 6.5.1): SHA-256 over the digests of the resources in order. It does not bind names."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def directory_hash(names_and_digests: Iterator[tuple[str, str]]) -> str:
    """Hash1 of Go's x/mod/sumdb/dirhash in hex, which in-toto calls `dirHash`: binds names and SHA-256 of all files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(names_and_digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def go_dirhash(dir_hash: str) -> str:
    """The same as Go prints it: `h1:` and base64."""
    return "h1:" + base64.b64encode(bytes.fromhex(dir_hash)).decode()


# -- listing ----------------------------------------------------------------------------------------------------------


def _list(path: Path) -> list[_Listed]:
    """Everything at `path`, sorted by name."""
    try:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            listed = sorted(_walk(path), key=lambda item: item.entry.name)
        else:
            listed = [_file(SINGLE, status, str(path))]
    except OSError as error:
        raise Unavailable(f"{error.filename or path}: cannot be listed: {error.strerror}") from error
    return listed


def _walk(root: Path) -> Iterator[_Listed]:
    pending = [("", 0)]
    count = 0
    while pending:
        folder, depth = pending.pop()
        if depth > DEPTH_LIMIT:
            raise NotSealable(f"{root / folder}: folders are nested deeper than {DEPTH_LIMIT}")
        with os.scandir(root / folder) as listing:
            items = list(listing)
        found = [item for item in items if folder or item.name != SEAL_NAME]
        if folder and not found:
            yield _folder(root, folder)
        for item in found:
            count += 1
            if count > ENTRY_LIMIT:
                raise NotSealable(f"{root}: more than {ENTRY_LIMIT} entries")
            name = _checked_name(f"{folder}/{item.name}" if folder else item.name, root)
            if item.is_dir(follow_symlinks=False):
                pending.append((name, depth + 1))
            elif item.is_symlink():
                yield _link(root, name)
            else:
                yield _file(name, item.stat(follow_symlinks=False), str(root / name))


def _checked_name(name: str, root: Path) -> str:
    """`name` if it can stand in JSON and in Hash1's lines: UTF-8 without control characters."""
    if name.isprintable() or not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return name
    raise NotSealable(
        f"{str(root)!r}: file name {name[:200]!r} is not UTF-8 or has control characters",
        next_step="rename the file; such names cannot be signed unambiguously",
    )


def _folder(root: Path, name: str) -> _Listed:
    status = (root / name).lstat()
    return _Listed(Entry(name=name, kind="folder", mode=stat.S_IMODE(status.st_mode)), name, (status.st_mode,))


def _file(name: str, status: os.stat_result, shown: str) -> _Listed:
    if not stat.S_ISREG(status.st_mode):
        raise NotSealable(
            f"{shown}: expected a regular file, found {_kind_word(status.st_mode)}",
            next_step="remove it from the checkpoint",
        )
    entry = Entry(name=name, kind="file", mode=stat.S_IMODE(status.st_mode), size=status.st_size)
    return _Listed(entry, name, _identity(status))


def _link(root: Path, name: str) -> _Listed:
    """A link that ends at a regular file inside the folder; anything else is refused."""
    shown = root / name
    target = str(shown.readlink())
    try:
        end = shown.resolve(strict=True)
        status = end.lstat()
    except (OSError, RuntimeError) as error:
        raise NotSealable(f"{shown}: symbolic link to {target[:200]!r} leads nowhere or in circles") from error
    if not end.is_relative_to(root):
        raise NotSealable(
            f"{shown}: symbolic link leaves the folder, to {str(end)[:200]!r}",
            next_step="copy the file in its place (cp -L) and seal again",
        )
    if not stat.S_ISREG(status.st_mode):
        raise NotSealable(f"{shown}: symbolic link to {_kind_word(status.st_mode)}; only links to files can be sealed")
    entry = Entry(name=name, kind="link", mode=None, size=status.st_size, target=_checked_name(target, root))
    return _Listed(entry, end.relative_to(root).as_posix(), _identity(status))


def _kind_word(mode: int) -> str:
    words = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
        stat.S_IFCHR: "a character device",
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a symbolic link",
    }
    return words.get(stat.S_IFMT(mode), "another kind")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# -- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened_root(path: Path) -> Iterator[int | None]:
    """A descriptor of the folder, or None where the checkpoint is one file."""
    if not path.is_dir():
        yield None
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: Path, root: int | None, name: str) -> int:
    """Open `name` under `root` without following any link on the way (rule 2)."""
    if root is None:
        return os.open(path, _OPEN_FLAGS)
    folder = root
    *parents, last = name.split("/")
    try:
        for part in parents:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            if folder != root:
                os.close(folder)
            folder = inner
        return os.open(last, _OPEN_FLAGS, dir_fd=folder)
    finally:
        if folder != root:
            os.close(folder)


def _read(path: Path, root: int | None, item: _Listed, hash_type: str, tensors: bool) -> Entry:
    """The entry with its digests. Raises Unavailable where it cannot be read or changed (rule 3)."""
    shown = str(path) if root is None else str(path / item.entry.name)
    try:
        descriptor = _open(path, root, item.path)
    except OSError as error:
        raise Unavailable(f"{shown}: cannot be opened for reading: {error.strerror}") from error
    try:
        if _identity(os.fstat(descriptor)) != item.identity:
            raise _changed(shown)
        digest, table = _digest(descriptor, item.entry.size or 0, hash_type, tensors)
        if _identity(os.fstat(descriptor)) != item.identity:
            raise _changed(shown)
    except OSError as error:
        raise Unavailable(f"{shown}: cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return replace(item.entry, digest=digest, tensors=table)


def _digest(descriptor: int, size: int, hash_type: str, tensors: bool) -> tuple[str, dict[str, str] | None]:
    """Digest of the file and of its tensors, in one pass."""
    hasher = new_hasher(hash_type)
    layout = read_layout(descriptor, size) if tensors else None
    digester = Digester(layout) if layout is not None else None
    buffer = bytearray(min(CHUNK_BYTES, size + 1))
    view = memoryview(buffer)
    offset = 0
    while count := os.readv(descriptor, [buffer]):
        hasher.update(view[:count])
        if digester is not None:
            digester.update(offset, view[:count])
        offset += count
    return hasher.hexdigest(), digester.digests() if digester is not None else None


def _changed(shown: str) -> Unavailable:
    return Unavailable(f"{shown}: changed while it was read", next_step="run again when nothing writes to it")
