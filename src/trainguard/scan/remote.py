"""Vet a model file where it lies: in a bucket or behind http, by ranged reads, without fetching its tensors.

    from trainguard.scan.remote import vet_remote

    report = vet_remote("s3://models/base.pt")      # the end of the zip, its directory, headers and pickles

The same judges read the same way as on a disk; what they read is fetched in blocks, kept, and counted. Of a torch zip
that is its pickle, its directory and some 200 KiB, whatever its size. A format that must be read whole (a bare pickle,
joblib, tar) is read up to a limit and is an error past it. Needs fsspec, and its package for the protocol (s3fs, gcsfs,
adlfs, aiohttp).

The verdict is not bound to the bytes: the rest of the file was not seen, and the store may answer another reader
otherwise. The report has no digest, therefore. Size, ETag and times must be the same before and after. Vet what was
downloaded once more before loading it; `trainguard.open_checkpoint` does.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from trainguard.errors import Misuse, Unavailable
from trainguard.scan.budget import OverBudget
from trainguard.scan.formats.interface import printable
from trainguard.scan.formats.zips import BadZip, find_directory, header_places
from trainguard.scan.limits import VERSION, ScanPolicy
from trainguard.scan.source import Changed
from trainguard.scan.trust import parse_trust_line
from trainguard.scan.verdict import FileReport, Reason, Report, Verdict, worst
from trainguard.scan.vet import judge_source, technique_for

PROTOCOLS = ("s3", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "memory", "file", "hf")
"""Others chain file systems or unpack archives on the way, and would show other bytes than a loader gets."""
BLOCK_BYTES = 512
"""A local header and its padding. Neighbouring blocks are one request."""
FETCH_BYTES = 64 << 20
REQUESTS = 20_000
SECONDS = 300.0
BATCH = 256
"""Ranges asked for at once, where headers of many members are wanted."""
IDENTITY = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "created", "md5")


def is_remote(path: str) -> bool:
    """Whether `path` is an address rather than a file name."""
    return "://" in path


class Fetched:
    """A remote file as a Source: blocks are fetched when they are first read."""

    page_bytes = BLOCK_BYTES
    """How much a reader of headers should read at once."""
    window_bytes = 1 << 17
    """How much the pickle machine should hold: twice the longest argument it keeps by value."""

    def __init__(self, files: Any, path: str, size: int) -> None:
        self.size = size
        self.fetched = 0
        """Bytes that were asked for so far."""
        self.requests = 0
        self._files = files
        self._path = path
        self._blocks: dict[int, bytes] = {}
        self._deadline = time.monotonic() + SECONDS

    def read(self, offset: int, length: int) -> bytes:
        """As Source.read. Raises OverBudget past a limit, Changed where the store gives other lengths than it told."""
        stop = min(offset + length, self.size)
        if length <= 0 or offset >= stop:
            return b""
        first, last = offset // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        self._want([(first, last)])
        data = b"".join(self._blocks[number] for number in range(first, last + 1))
        return data[offset - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def prefetch(self, places: Sequence[tuple[int, int]]) -> None:
        """Fetch (offset, length) places in few requests."""
        wanted = sorted({number for at, length in places for number in self._numbers(at, length)})
        for start in range(0, len(wanted), BATCH):
            self._want([(number, number) for number in wanted[start : start + BATCH]])

    def _numbers(self, offset: int, length: int) -> range:
        stop = min(offset + length, self.size)
        return range(offset // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1) if stop > offset else range(0)

    def _want(self, runs: Sequence[tuple[int, int]]) -> None:
        """Fetch what is missing of runs of blocks (first, last), neighbours in one range."""
        ranges = list(_joined(number for a, b in runs for number in range(a, b + 1) if number not in self._blocks))
        if not ranges:
            return
        starts = [first * BLOCK_BYTES for first, _ in ranges]
        ends = [min((last + 1) * BLOCK_BYTES, self.size) for _, last in ranges]
        self.fetched += sum(ends) - sum(starts)
        self.requests += len(ranges)
        if self.fetched > FETCH_BYTES:
            raise OverBudget(f"needs more than {FETCH_BYTES} bytes of a remote file; download it and scan it here")
        if self.requests > REQUESTS or time.monotonic() > self._deadline:
            raise OverBudget(f"needs more than {REQUESTS} requests or {SECONDS:g} seconds of a remote store")
        parts = self._files.cat_ranges([self._path] * len(ranges), starts, ends, on_error="raise")
        for (first, last), start, end, part in zip(ranges, starts, ends, parts, strict=True):
            if not isinstance(part, bytes) or len(part) != end - start:
                raise Changed
            for number in range(first, last + 1):
                self._blocks[number] = part[(number - first) * BLOCK_BYTES : (number - first + 1) * BLOCK_BYTES]


def _joined(numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs (first, last)."""
    first = last = -1
    for number in numbers:
        if number == last + 1 and first >= 0:
            last = number
            continue
        if first >= 0:
            yield first, last
        first = last = number
    if first >= 0:
        yield first, last


def vet_remote(address: str, policy: ScanPolicy | None = None) -> Report:
    """The verdict on one remote file, or on every file below a prefix. Never raises for what it finds.

    Raises Misuse for an address we do not read or a trust line that is none, Unavailable without the packages for it.
    """
    policy = policy or ScanPolicy()
    for line in policy.trust:
        parse_trust_line(line)
    started = time.process_time()
    files, path = _opened(address)
    reports, reasons = [], []
    for number, (name, item) in enumerate(_listed(files, path)):
        if number >= policy.files:
            what = f"more than {policy.files} files; not read further"
            reasons.append(Reason(verdict=Verdict.ERROR, rule="budget", what=what, technique="E2"))
            break
        reports.append(_vet_one(files, item, name or address, policy, in_folder=bool(name)))
    if not reports:
        what = f"{printable(address, 4096)}: nothing there"
        reasons.append(Reason(verdict=Verdict.ERROR, rule="file", what=what))
    return Report(
        path=printable(address, 4096),
        verdict=worst([report.verdict for report in reports] + [reason.verdict for reason in reasons]),
        tier=policy.tier,
        policy=policy.fingerprint,
        version=VERSION,
        files=tuple(reports),
        reasons=tuple(reasons),
        seconds=round(time.process_time() - started, 3),
    )


def _opened(address: str) -> tuple[Any, str]:
    """(file system, path in it)"""
    protocol = address.partition("://")[0]
    if protocol not in PROTOCOLS or "::" in address:
        raise Misuse(f"{address[:200]}: expected an address of {', '.join(PROTOCOLS)}, found {protocol[:40]!r}")
    try:
        fsspec = importlib.import_module("fsspec.core")
        options = {"use_listings_cache": False} if protocol in ("http", "https") else {}
        files, path = fsspec.url_to_fs(address, **options)
    except ImportError as error:
        raise Unavailable(
            f"{address[:200]}: reading {protocol} needs a package that is not installed: {error}",
            next_step="pip install fsspec, and s3fs, gcsfs, adlfs or aiohttp for the protocol",
        ) from error
    except Exception as error:
        raise Unavailable(f"{address[:200]}: cannot be opened: {_sentence(error)}") from error
    return files, path


def _listed(files: Any, path: str) -> Iterator[tuple[str, str]]:
    """(name below `path`, or "" for `path` itself; path)"""
    names: list[str] = []
    # Where listing fails, the store says why again when the file is read.
    with contextlib.suppress(Exception):
        if files.protocol not in ("http", ("http", "https")) and files.isdir(path):
            names = sorted(files.find(path))
    prefix = path.rstrip("/") + "/"
    yield from ((name.removeprefix(prefix), name) for name in names)
    if not names:
        yield "", path


def _vet_one(files: Any, path: str, name: str, policy: ScanPolicy, *, in_folder: bool) -> FileReport:
    shown = printable(name, 4096)
    try:
        before = _info(files, path)
        size = before["size"]
        if type(size) is not int or size < 0:
            return _unread(shown, f"{shown}: the store does not say how large it is", in_folder)
        if before.get("partial") is False and size > FETCH_BYTES:
            return _unread(
                shown, f"{shown}: the server gives no ranges of it, and {size} bytes are too many", in_folder
            )
        source = Fetched(files, path, size)
        _prefetch_headers(source)
        notes, (form, loader) = judge_source(source, policy, name, in_folder=in_folder)
        after = _info(files, path)
    except Changed:
        return _unread(shown, f"{shown}: the store gave other lengths than it told; it may be changing", in_folder)
    except OverBudget as error:
        return _unread(shown, f"{shown}: {error}", in_folder)
    except Exception as error:  # every store has exceptions of its own
        return _unread(shown, f"{shown}: cannot be read: {_sentence(error)}", in_folder)
    if any(before.get(key) != after.get(key) for key in IDENTITY):
        return _unread(shown, f"{shown}: changed while it was read", in_folder)
    return FileReport(
        path=shown,
        verdict=notes.verdict,
        format=form,
        loader=loader,
        size=size,
        reasons=tuple(sorted(notes.reasons, key=lambda reason: -reason.verdict.rank)),
        globals=tuple(sorted(printable(item) for item in notes.globals)),
        second_opinion="; ".join(sorted(notes.opinions)) or "not needed",
    )


def _info(files: Any, path: str) -> dict[str, Any]:
    if hasattr(files, "invalidate_cache"):
        files.invalidate_cache()
    found = files.info(path)
    if found.get("type") == "directory":
        raise IsADirectoryError("a folder")
    return dict(found)


def _prefetch_headers(source: Fetched) -> None:
    """The headers of a zip's members lie all over it: ask for them at once, not one after the other."""
    if source.read(0, 4) != b"PK\3\4":
        return
    try:
        _, _, start, length = find_directory(source, source.size)
        if length <= FETCH_BYTES // 4:
            source.prefetch(header_places(source, start, length))
    except BadZip:
        return  # the judge says what is wrong with it


def _sentence(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return printable(f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": "), 300)


def _unread(shown: str, what: str, in_folder: bool) -> FileReport:
    reason = Reason(verdict=Verdict.ERROR, rule="file", what=what, technique=technique_for(shown, in_folder=in_folder))
    return FileReport(path=shown, verdict=Verdict.ERROR, format="none", loader="none", size=None, reasons=(reason,))
