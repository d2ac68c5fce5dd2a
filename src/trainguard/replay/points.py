"""Sealed replay points: hashed when the run wrote them, read strictly, and compared tensor by tensor (spec/replay.md).

seal_point(folder)            what the supervisor's side logs of a point: digests of its two files
open_point(folder, point)     its index, once both files are what the log says
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from trainguard.digest import file_sha256
from trainguard.errors import MalformedEvidence, Unavailable, VerificationError
from trainguard.replay.committed import Point

NAME = re.compile(r"p\d{1,6}-step-\d{8,12}")
INDEX_LIMIT_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What a point holds."""

    version: int
    step: int
    tensors: list[tuple[str, str, list[int], int, int]]
    """(name, dtype, shape, offset in `data`, bytes)."""
    numbers: dict[str, float | int | bool] = {}
    python: Any = None
    numpy: Any = None


def seal_point(folder: Path) -> dict[str, Any]:
    """Digests of a point as it lies there now. Raises Unavailable for what is no plain file, or changes meanwhile."""
    index = file_sha256(folder / "index.json", limit_bytes=INDEX_LIMIT_BYTES)
    digest, size = _blake3(folder / "data")
    return {
        "name": folder.name,
        "index_sha256": index,
        "data_blake3": digest,
        "bytes": size + (folder / "index.json").stat().st_size,
    }


def open_point(folder: Path, point: Point) -> Index:
    """The index of a sealed point whose files are what the log says.

    Raises Unavailable where it is gone, VerificationError where it was altered, MalformedEvidence where it is no point.
    """
    if not NAME.fullmatch(point.name) or not (folder / "data").exists():
        raise Unavailable(f"{folder}: replay point of step {point.step} is not there any more")
    found = seal_point(folder)
    for name in ("index_sha256", "data_blake3"):
        if found[name] != getattr(point, name):
            raise VerificationError(
                f"{folder}: replay point of step {point.step} was altered after it was sealed: {name} is "
                f"{found[name][:16]}, the log has {getattr(point, name)[:16]}"
            )
    return read_index(folder)


def read_index(folder: Path) -> Index:
    """The index of a point, every offset within its data. Raises MalformedEvidence."""
    path = folder / "index.json"
    try:
        if path.stat().st_size > INDEX_LIMIT_BYTES:
            raise MalformedEvidence(f"{path}: larger than {INDEX_LIMIT_BYTES} bytes")
        index = msgspec.json.decode(path.read_bytes(), type=Index)
        size = (folder / "data").stat().st_size
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise MalformedEvidence(f"{path}: not the index of a replay point: {error}") from error
    if index.version != 1:
        raise MalformedEvidence(f"{path}: expected version 1, found {index.version}")
    for name, _, shape, offset, nbytes in index.tensors:
        if offset < 0 or nbytes < 0 or offset + nbytes > size or any(length < 0 for length in shape):
            raise MalformedEvidence(f"{path}: {name[:200]} lies outside the data ({offset} + {nbytes} of {size} bytes)")
    return index


def digests(folder: Path, index: Index) -> dict[str, str]:
    """Tensor → BLAKE3 of its type, shape and bytes."""
    found = {}
    with (folder / "data").open("rb") as file:
        for name, dtype, shape, offset, nbytes in index.tensors:
            hasher = blake3(f"{dtype} {shape}\n".encode())
            file.seek(offset)
            left = nbytes
            while left:
                data = file.read(min(left, CHUNK_BYTES))
                if not data:
                    raise MalformedEvidence(f"{folder}: ends within {name[:200]}")
                hasher.update(data)
                left -= len(data)
            found[name] = hasher.hexdigest()
    return found


def first_unequal(run: Mapping[str, str], clean: Mapping[str, str]) -> str | None:
    """The first tensor of what is trained that two points do not agree on.

    Random streams are compared step by step; modules that nobody trains may be gone in one and not in the other.
    """
    for name in (*run, *(name for name in clean if name not in run)):
        if not name.startswith(("rng/", "param/x", "buffer/x")) and run.get(name) != clean.get(name):
            return name
    return None


def _blake3(path: Path) -> tuple[str, int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be opened for reading: {error.strerror}") from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise Unavailable(f"{path}: expected a regular file")
        hasher = blake3()
        while data := file.read(CHUNK_BYTES):
            hasher.update(data)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise Unavailable(f"{path}: changed while it was read")
    return hasher.hexdigest(), after.st_size
