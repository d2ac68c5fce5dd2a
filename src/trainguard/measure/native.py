"""Native code: the build id a linker gave a library, and what the dynamic loader is told to load first.

ELF: System V ABI, chapters 4 and 5 (file header, program headers, note sections). Only little-endian 64-bit files are
read; of others the content digest stands alone.
"""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<QQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3


def build_id(data: bytes) -> str | None:
    """The GNU build id in the first bytes of an ELF file, hex; None when there is none within `data`.

    data: at least the headers; a note that lies past its end is not found.
    """
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        return None
    _, offset, _, _, _, entry_size, count, _, _, _ = _HEADER.unpack_from(data, 24)
    if entry_size != _SEGMENT.size:
        return None
    for index in range(min(count, 128)):
        at = offset + index * entry_size
        if at + entry_size > len(data):
            return None
        kind, _, start, _, _, length, _, _ = _SEGMENT.unpack_from(data, at)
        if kind == _PT_NOTE and (found := _gnu_note(data[start : start + min(length, 4096)])):
            return found
    return None


def _gnu_note(notes: bytes) -> str | None:
    at = 0
    while at + _NOTE.size <= len(notes):
        name_size, size, kind = _NOTE.unpack_from(notes, at)
        name = at + _NOTE.size
        content = name + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[name : name + 4] == b"GNU\0" and 0 < size <= 64:
            return notes[content : content + size].hex() or None
        at = content + (size + 3 & ~3)
    return None
