"""One shard of training data as it is registered: its files by content, and which rows of them are meant.

A manifest is canonical JSON, kept as a blob by its SHA-256, which the signed entry in the log names. Links to files are
followed, since content is what counts; links to folders, pipes and devices are left out and said so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from trainguard.digest import canonical_json, file_sha256, parse_sha256
from trainguard.errors import MalformedEvidence, Misuse, Unavailable

SCHEMA = "trainguard/shard/v1"
FILES_LIMIT = 1_000_000
DEPTH_LIMIT = 32
NOTES_LIMIT = 100
PATH_LIMIT = 4096
SKIPPED = frozenset((".git", ".trainguard", "__pycache__"))


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one `data add` registered."""

    schema: str = SCHEMA
    name: str
    """What people call it; unique within its source."""
    root: str
    """Absolute path it lay at; information, never compared."""
    files: dict[str, str]
    """Path below the root (the file's own name for a single file) → `<sha256> <size in bytes>`."""
    rows: tuple[int, int] | None = None
    """First row and the one after the last, of one file whose other rows are not part of the shard; None for all."""
    left_out: tuple[str, ...] = ()
    """What was not read and why, one sentence each."""

    @property
    def contents(self) -> dict[str, int]:
        """SHA-256 → size in bytes."""
        pairs = (value.split(" ", 1) for value in self.files.values())
        return {digest: int(size) for digest, size in pairs}

    def encode(self) -> bytes:
        """The bytes that are kept and whose SHA-256 is signed."""
        return canonical_json(msgspec.to_builtins(self))


def read_shard(path: Path, *, name: str | None = None, rows: tuple[int, int] | None = None) -> Shard:
    """The shard that lies at `path`, a file or a folder; reads all of it.

    rows: first row and the one after the last, where only part of one file is meant.
    Raises Misuse for a path that cannot be a shard, Unavailable for one that cannot be read.
    """
    given = Path(os.path.normpath(Path.cwd() / path))
    named = name if name is not None else str(path)
    if not given.exists():
        raise Misuse(f"{path}: expected a file or folder of data, found nothing there")
    if rows is not None and not given.is_file():
        raise Misuse(f"{path}: rows are of one file, found a folder", next_step="name the file that holds the rows")
    if rows is not None and not 0 <= rows[0] < rows[1]:
        raise Misuse(f"{path}: expected rows FIRST:END with FIRST before END, found {rows[0]}:{rows[1]}")
    notes: list[str] = []
    found = {given.name: given} if given.is_file() else dict(_files(given, "", notes, 0))
    if not found:
        raise Misuse(f"{path}: expected data, found no file in it")
    files = {below: _value(file) for below, file in sorted(found.items())}
    return Shard(name=named, root=str(given), files=files, rows=rows, left_out=tuple(notes[:NOTES_LIMIT]))


def parse_shard(data: bytes, *, where: str) -> Shard:
    """The inverse of `Shard.encode`. Raises MalformedEvidence for anything else."""
    try:
        shard = msgspec.json.decode(data, type=Shard)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not the manifest of a shard: {error}") from None
    if shard.schema != SCHEMA:
        raise MalformedEvidence(f"{where}: expected schema {SCHEMA}, found {shard.schema[:60]!r}")
    if len(shard.files) > FILES_LIMIT:
        raise MalformedEvidence(f"{where}: expected at most {FILES_LIMIT} files, found {len(shard.files)}")
    for below, value in shard.files.items():
        digest, _, size = value.partition(" ")
        parse_sha256(digest, where=f"{where}: {below[:80]}")
        if not (size.isascii() and size.isdigit() and len(size) < 20):
            raise MalformedEvidence(f"{where}: {below[:80]}: expected a size in bytes, found {size[:40]!r}")
    if shard.rows is not None and not (0 <= shard.rows[0] < shard.rows[1] and len(shard.files) == 1):
        raise MalformedEvidence(f"{where}: expected rows of one file, found {shard.rows} of {len(shard.files)}")
    return shard


def _files(folder: Path, below: str, notes: list[str], depth: int) -> Iterator[tuple[str, Path]]:
    if depth > DEPTH_LIMIT:
        notes.append(f"{below}: more than {DEPTH_LIMIT} folders deep")
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise Unavailable(f"{folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name in SKIPPED:
            continue
        name = f"{below}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), f"{name}/", notes, depth + 1)
        elif _is_file(entry):
            yield name, Path(entry.path)
        else:
            notes.append(f"{name}: neither a file nor a folder, or a link to a folder")


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _value(path: Path) -> str:
    if len(os.fsencode(path)) > PATH_LIMIT:
        raise Misuse(f"{str(path)[:200]}…: path of more than {PATH_LIMIT} bytes")
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise Misuse(f"{path}: expected a regular file, found another kind")
    return f"{file_sha256(real)} {status.st_size}"
