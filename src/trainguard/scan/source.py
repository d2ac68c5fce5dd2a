"""Bytes that are read by offset: a file, a piece of one, or memory. Never mapped.

A mapping would kill the process (SIGBUS) when somebody shortens the file while it is read; `pread` only returns less,
which is an error we can name. A source has a fixed `size` from the moment it is opened.
"""

from __future__ import annotations

import os
from typing import Protocol


class Changed(Exception):
    """The file became shorter than it was when it was opened."""


class Source(Protocol):
    """Random access to `size` bytes."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset+length), cut at the end of the source; empty behind it."""
        ...


class FileSource:
    """An open file descriptor; the caller keeps and closes it."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._descriptor = descriptor

    def read(self, offset: int, length: int) -> bytes:
        """As Source.read; raises Changed when the file has become shorter."""
        wanted = max(0, min(length, self.size - offset))
        data = os.pread(self._descriptor, wanted, offset) if wanted else b""
        while len(data) < wanted:
            more = os.pread(self._descriptor, wanted - len(data), offset + len(data))
            if not more:
                raise Changed
            data += more
        return data


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        """As Source.read."""
        if offset == 0 and length >= self.size:
            return self._data
        return self._data[offset : offset + max(0, length)]


class PartSource:
    """`size` bytes of another source, from `start`."""

    def __init__(self, whole: Source, start: int, size: int) -> None:
        self.size = max(0, min(size, whole.size - start))
        self._whole = whole
        self._start = start

    def read(self, offset: int, length: int) -> bytes:
        """As Source.read."""
        return self._whole.read(self._start + offset, max(0, min(length, self.size - offset)))
