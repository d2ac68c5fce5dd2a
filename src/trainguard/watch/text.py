"""Link *text*, outer half: are the machine instructions of a process still those of its files?

A library's text is mapped from its file and shared with every process that maps it. Who changes an instruction in
memory gets a private copy of that page, and the kernel's page map says which pages are private (bit 61 clear). These
few are compared with the file, byte by byte, from outside; nothing inside the process is asked. Two reads of /proc a
mapping, no pause of the process, no privilege beyond what reading a process of one's own account needs.

A body of kind "text" (spec/evidence.md):

    {"mappings", "pages", "differ": [{"path", "offset", "expected", "found"}, …], "restored": n, "unread": [path, …],
     "anonymous": bytes, "probes": bool, "tracer": pid or 0, "error"?}

Left out: libraries that say they relocate their own text (DT_TEXTREL), which rewrite it as they load. Anonymous
executable memory is counted only: oneDNN, libffi, LLVM and every other just-in-time compiler put code there, and it
has no file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
DIFFER_LIMIT = 50
PAGES_LIMIT = 1 << 21
"""Pages of executable mappings looked at in one process: 8 GiB of text."""

_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61
_PT_DYNAMIC, _DT_TEXTREL, _DT_FLAGS, _DF_TEXTREL = 2, 22, 30, 4


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps."""

    low: int
    high: int
    executable: bool
    offset: int
    inode: int
    path: str


def mappings(pid: int) -> list[Mapping]:
    """The memory map of a process. Raises OSError when it is gone or not ours."""
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            span, rights, offset, _device, inode, *rest = line.rstrip("\n").split(None, 5)
            low, high = span.split("-")
            path = rest[0] if rest else ""
            found.append(Mapping(int(low, 16), int(high, 16), "x" in rights, int(offset, 16), int(inode), path))
    return found


def look(pid: int) -> dict[str, Any]:
    """The body of one record. Never raises: what cannot be read is said."""
    try:
        return _look(pid)
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error.strerror}"}


def _look(pid: int) -> dict[str, Any]:
    everything = mappings(pid)
    text = [one for one in everything if one.executable and one.inode]
    body: dict[str, Any] = {"mappings": len(text), "pages": 0, "differ": [], "restored": 0, "unread": []}
    relocated: dict[str, bool] = {}
    with (
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pages,
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
    ):
        for one in text:
            for address in _private(pages, one):
                if one.path not in relocated:
                    relocated[one.path] = _relocates_itself(_file(pid, one))
                if not relocated[one.path]:
                    _compare(pid, one, address, memory, body)
            body["pages"] += (one.high - one.low) // PAGE
            if body["pages"] > PAGES_LIMIT or len(body["differ"]) >= DIFFER_LIMIT:
                break
    own = [one for one in everything if one.executable and not one.inode and not one.path.startswith("[v")]
    body["anonymous"] = sum(one.high - one.low for one in own if one.path != "[uprobes]")
    body["probes"] = any(one.path == "[uprobes]" for one in own)
    body["tracer"] = _tracer(pid)
    body["unread"] = sorted(set(body["unread"]))[:20]
    return body


def _private(pages: Any, one: Mapping) -> Iterator[int]:
    """Addresses of the pages of a mapping that are no longer the file's."""
    count = min((one.high - one.low) // PAGE, PAGES_LIMIT)
    pages.seek(one.low // PAGE * 8)
    data = pages.read(count * 8)
    words = memoryview(data[: len(data) // 8 * 8]).cast("Q")
    for number, word in enumerate(words):
        if word and word & (_PRESENT | _SWAPPED) and not word & _OF_FILE:
            yield one.low + number * PAGE


def _compare(pid: int, one: Mapping, address: int, memory: Any, body: dict[str, Any]) -> None:
    """A private page and the same bytes of the file: equal (written and restored), or not."""
    offset = one.offset + address - one.low
    try:
        if one.path.endswith(" (deleted)"):
            raise FileNotFoundError(2, "deleted")
        with open(_file(pid, one), "rb") as file:
            status = os.fstat(file.fileno())
            file.seek(offset)
            expected = file.read(PAGE)
        if status.st_ino != one.inode:
            raise FileNotFoundError(2, "replaced")
        memory.seek(address)
        found = memory.read(PAGE)
    except OSError:
        body["unread"].append(one.path)
        return
    expected += bytes(len(found) - len(expected))
    if expected == found:
        body["restored"] += 1
        return
    first = next(n for n in range(len(found)) if expected[n] != found[n])
    line = {"path": one.path, "offset": offset + first, "expected": expected[first : first + 16].hex()}
    body["differ"].append(line | {"found": found[first : first + 16].hex()})


def _file(pid: int, one: Mapping) -> str:
    """The file as the process sees it, also from another mount namespace."""
    return f"/proc/{pid}/root{one.path}"


def _tracer(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("TracerPid:")), 0)


def _relocates_itself(path: str) -> bool:
    """Whether an ELF file carries DT_TEXTREL: its loader writes to its text (System V ABI, dynamic section)."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if head[:6] != b"\x7fELF\x02\x01":
                return False
            start, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
            file.seek(start)
            table = file.read(size * min(count, 128))
            for at in range(0, len(table) - 55, max(size, 56)):
                if struct.unpack_from("<I", table, at)[0] == _PT_DYNAMIC:
                    file.seek(struct.unpack_from("<Q", table, at + 8)[0])
                    return _says_textrel(file.read(min(struct.unpack_from("<Q", table, at + 32)[0], 1 << 16)))
    except (OSError, struct.error):
        pass
    return False


def _says_textrel(dynamic: bytes) -> bool:
    tags = struct.iter_unpack("<QQ", dynamic[: len(dynamic) // 16 * 16])
    return any(tag == _DT_TEXTREL or (tag == _DT_FLAGS and value & _DF_TEXTREL) for tag, value in tags)
