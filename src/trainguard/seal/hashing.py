"""Hash a checkpoint while it is saved: a file-like that writes through and digests exactly what was written.

    with open(path, "wb") as file:
        tee = TeeHash(file)
        torch.save(state, tee)
    tee.digest()                    # "sha256:…", or None with `tee.reason`

Standard library only (blake3 when asked for and there), any Python >= 3.8, because it runs inside a training process
and is loaded there by file path. It never breaks a save: a digest that cannot be had is None with a reason.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Optional

SLICE_BYTES = 1 << 18
"""A quarter of a MiB at a time: what was just copied out to the file is still in the core's cache when it is hashed."""

ALGORITHMS = ("sha256", "blake3", "blake2b")
"""Hash types OMS v1.0 knows; blake2b is read, never chosen."""

DIGEST_BYTES = {"sha256": 32, "blake3": 32, "blake2b": 64}


SHARDED = "-sharded-"
"""OMS v1.0 method `shards`: `sha256-sharded-1000000000` digests every piece of that many bytes by itself."""


def new_hasher(algorithm: str) -> Any:
    """An object with update() and hexdigest(). Raises ValueError for other names, ImportError without blake3."""
    base, sharded, size = algorithm.partition(SHARDED)
    if sharded and size.isdigit() and int(size) > 0:
        return ShardedHash(base, int(size))
    if algorithm == "sha256":
        return hashlib.sha256()
    if algorithm == "blake2b":
        return hashlib.blake2b()
    if algorithm == "blake3":
        from blake3 import blake3

        return blake3()
    raise ValueError("hash: expected one of {}, found {!r}".format(", ".join(ALGORITHMS), algorithm[:40]))


class ShardedHash:
    """Digests of a file's pieces of `shard_bytes` each, one behind the other; of an empty file there are none."""

    def __init__(self, algorithm: str, shard_bytes: int) -> None:
        self._algorithm = algorithm
        self._shard_bytes = shard_bytes
        self._done: list[str] = []
        self._hasher: Any = new_hasher(algorithm)
        self._taken = 0
        """Bytes of the piece that is being read."""

    def update(self, data: Any) -> None:
        """Take more of the file."""
        view = memoryview(data).cast("B")
        while view:
            part = view[: self._shard_bytes - self._taken]
            self._hasher.update(part)
            self._taken += len(part)
            view = view[len(part) :]
            if self._taken == self._shard_bytes:
                self._close()

    def _close(self) -> None:
        self._done.append(self._hasher.hexdigest())
        self._hasher, self._taken = new_hasher(self._algorithm), 0

    def hexdigest(self) -> str:
        """The pieces' digests so far, joined: what the root digest of OMS is taken over."""
        return "".join(self._done) + (self._hasher.hexdigest() if self._taken else "")


class TeeHash:
    """Writes through to `file` and digests it. Everything but writing and moving about is the file's own.

    Only sequential writing can be digested: after a write anywhere but at the end, `digest()` is None and `reason`
    says so. torch.save, pickle.dump and safetensors write sequentially.
    """

    def __init__(self, file: Any, algorithm: str = "sha256") -> None:
        self._file = file
        self._algorithm = algorithm
        self._hasher: Any = None
        self.reason: Optional[str] = None  # noqa: UP045 - Python 3.8
        """Why there is no digest; None while there is one."""
        self.size = 0
        """Bytes written and digested so far."""
        self._position = 0
        """Where the next write goes, as far as we were told."""
        try:
            self._hasher = new_hasher(algorithm)
        except (ImportError, ValueError) as error:
            self.reason = str(error)

    def write(self, data: Any) -> int:
        """Write all of `data`; returns its length in bytes. Raises only what the file raises."""
        view = memoryview(data)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        for start in range(0, len(view), SLICE_BYTES):
            self._write_slice(view[start : start + SLICE_BYTES])
        return len(view)

    def _write_slice(self, piece: memoryview) -> None:
        while piece:
            count = self._file.write(piece)
            if count is None:  # a raw file in non-blocking mode, or a file-like that does not say
                count = len(piece)
            self._take(piece[:count])
            piece = piece[count:]

    def _take(self, piece: memoryview) -> None:
        if self.reason is None:
            if self._position != self.size:
                self.reason = f"written at byte {self._position} after {self.size} bytes: not sequential"
                return
            self._hasher.update(piece)
            self.size += len(piece)
        self._position += len(piece)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move as the file moves; a write away from the end gives up the digest."""
        self._position = self._file.seek(offset, whence)
        return self._position

    def truncate(self, size: Optional[int] = None) -> int:  # noqa: UP045 - Python 3.8
        """Truncate as the file does; what was digested may be gone then, so the digest is given up."""
        self.reason = self.reason or "truncated while it was written"
        return int(self._file.truncate(size))

    def digest(self) -> Optional[str]:  # noqa: UP045 - Python 3.8
        """`algorithm:hex` of everything written, or None (see `reason`)."""
        return f"{self._algorithm}:{self._hasher.hexdigest()}" if self.reason is None else None

    def __enter__(self) -> TeeHash:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        if name == "fileno":  # whoever has the descriptor writes past us
            raise AttributeError("fileno: hidden, so that writers do not go around the digest")
        return getattr(self._file, name)


def open_tee(path: str | os.PathLike[str], algorithm: str = "sha256") -> TeeHash:
    """A TeeHash over a new file at `path`; closing it closes the file."""
    return TeeHash(open(path, "wb"), algorithm)  # noqa: PTH123 - closed by the caller, on any Python
