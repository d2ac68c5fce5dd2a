"""Digests of bytes, files and JSON values.

SHA-256 is the default (RECORD, OMS, in-toto and FIPS all speak it); BLAKE3 is for bulk state. A `Digest`
always names its algorithm, so two digests of different kinds never compare equal by accident.
Canonical JSON is RFC 8785 (JCS): equal values give equal bytes on every machine.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import rfc8785

from trainguard.errors import MalformedEvidence, Unavailable

CHUNK_BYTES = 1 << 20
"""Read size for files; mmap gains nothing here but resident memory."""

HEX_SHA256_LENGTH = 64


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data`, in 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def parse_sha256(text: object, *, where: str) -> str:
    """`text` if it is exactly 64 lower-case hex digits; raises MalformedEvidence naming `where` otherwise."""
    if isinstance(text, str) and len(text) == HEX_SHA256_LENGTH and set(text) <= set("0123456789abcdef"):
        return text
    raise MalformedEvidence(f"{where}: expected 64 hex digits of SHA-256, found {str(text)[:80]!r}")


def canonical_json(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value (dict, list, str, int below 2**53, float, bool, None)."""
    return bytes(rfc8785.dumps(value))


def file_sha256(path: str | os.PathLike[str], *, limit_bytes: int | None = None) -> str:
    """SHA-256 of a regular file, read once, without following a symbolic link at its end.

    Raises Unavailable when it is not a regular file, cannot be read, grows past `limit_bytes`, or changes
    while it is read (size, mtime or ctime differ before and after).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be opened for reading: {error.strerror}") from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise Unavailable(f"{path}: expected a regular file, found another kind (mode {before.st_mode:o})")
        if limit_bytes is not None and before.st_size > limit_bytes:
            raise Unavailable(f"{path}: expected at most {limit_bytes} bytes, found {before.st_size}")
        hasher = hashlib.sha256()
        buffer = bytearray(min(CHUNK_BYTES, before.st_size + 1))
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            hasher.update(view[:count])
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    ):
        raise Unavailable(f"{path}: changed while it was read", next_step="run again when nothing writes to it")
    return hasher.hexdigest()


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data` so that after a crash it holds either all of the old or all of the new bytes.

    open(tmp, O_EXCL) · write · fsync(file) · rename · fsync(folder). Raises Unavailable on any of them.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be written: {error.strerror}") from error
