"""The record of a run: written by the supervisor's side, read by the judges (spec/segment.md).

    RunWriter   spool lines (evidence.py) → segments → signed leaves in the log
    RunReader   log head → leaves → signatures → segment digests → spool lines; yields only what is proved

A segment leaf is a DSSE statement `segment/v1` whose subject is the SHA-256 of a stretch of whole spool lines, with
its position, so segments can be neither left out, doubled nor reordered. The first leaf of a run is `run/v1`; the
last segment says `final`. Nothing is acknowledged before the spool is on disk and the leaf is in the log.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard import opaque
from trainguard.digest import sha256_hex
from trainguard.envelope import PREDICATE_BASE, load_public_key, sign_statement, statement, verify_statement
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.evidence import Evidence, chain_start, decode_lines, encode_line
from trainguard.home import Home
from trainguard.log import LogReader
from trainguard.waiver import Waiver, to_waiver

SEGMENT_LIMIT_BYTES = 64 << 20
"""A reader holds one segment in memory at a time."""


class Appender(Protocol):
    """The one thing a writer needs of the log: entries that are durable when it returns."""

    def append(self, entries: Sequence[bytes]) -> list[int]: ...


class RunWriter:
    """Appends records to one run's spool and seals them into the log. Thread-safe.

    A full or failing disk loses records, never raises into the supervisor's loop: `lost` counts them, and the
    first record that can be written again is a `gap` that says how many.
    """

    def __init__(
        self,
        home: Home,
        run: str,
        log: Appender,
        key: ec.EllipticCurvePrivateKey,
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """clock: nanoseconds since the epoch, for the times of records and segments."""
        folder = home.run(run)
        try:
            folder.mkdir(parents=True)
            self._file = os.open(
                folder / "spool", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
        except FileExistsError as error:
            raise Misuse(f"run {run!r} exists already in {home.root}", next_step="choose another --name") from error
        except OSError as error:
            raise Unavailable(f"{folder}: run cannot be recorded: {error.strerror}") from error
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.run = run
        self.lost = 0
        """Records that could not be written since the last one that could."""
        self._log = log
        self._key = key
        self._clock = clock
        self._lock = threading.RLock()
        self._chain = chain_start(run)
        self._n = 0
        self._size = 0
        self._sealed_n = 0
        self._sealed_size = 0
        self._sealed_chain = self._chain
        self._segment = 0
        self._pending = bytearray()

    def begin(self, body: dict[str, Any]) -> int:
        """Log the `run/v1` statement; returns its leaf."""
        subject = [{"name": f"runs/{self.run}", "digest": {"sha256": self._chain.hex()}}]
        entry = sign_statement(statement("run/v1", {"run": self.run, **body}, subject), self._key)
        return self._log.append([entry])[0]

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> Evidence | None:
        """Write one record; `fields` are those of Evidence. Returns it, or None if the disk would not take it."""
        with self._lock:
            if self.lost and kind != "gap":
                self.add("gap", {"lost": self.lost, "reason": "the spool could not be written"})
            record = Evidence(n=self._n, at=self._clock(), source=source, kind=kind, body=body, **fields)
            try:
                line, chain = encode_line(record, self._chain)
                self._write(line)
            except (OSError, MalformedEvidence):
                self.lost += kind != "gap"
                return None
            if kind == "gap":
                self.lost = 0
            self._chain, self._n, self._size = chain, self._n + 1, self._size + len(line)
            self._pending += line
            return record

    def _write(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise

    def seal(self, *, final: bool = False) -> int | None:
        """Make the records since the last seal durable and log their segment; returns the leaf, or None.

        None means there was nothing to seal, or that disk or log would not take it: the records stay pending and
        the next call tries again.
        """
        with self._lock:
            if not self._pending and not final:
                return None
            try:
                os.fdatasync(self._file)
                leaf = self._log.append([self._segment_entry(final=final)])[0]
            except (OSError, Unavailable):
                return None
            self._segment += 1
            self._sealed_n, self._sealed_size, self._sealed_chain = self._n, self._size, self._chain
            self._pending.clear()
            return leaf

    def _segment_entry(self, *, final: bool) -> bytes:
        body = {
            "run": self.run,
            "segment": self._segment,
            "first": self._sealed_n,
            "count": self._n - self._sealed_n,
            "offset": self._sealed_size,
            "bytes": self._size - self._sealed_size,
            "chain_before": self._sealed_chain.hex(),
            "chain_after": self._chain.hex(),
            "sealed_at": self._clock(),
            "final": final,
        }
        # Nanoseconds do not fit a JSON number exactly (RFC 8785 limits them to 2**53): text keeps every digit.
        body["sealed_at"] = str(body["sealed_at"])
        subject = [
            {"name": f"runs/{self.run}/spool#{self._segment}", "digest": {"sha256": sha256_hex(bytes(self._pending))}}
        ]
        return sign_statement(statement("segment/v1", body, subject), self._key)

    def close(self) -> None:
        """Release the spool; a reader sees the run as ended only after a final seal."""
        os.close(self._file)


class SegmentLeaf(msgspec.Struct, frozen=True, kw_only=True):
    """One `segment/v1` statement as it stands in the log."""

    leaf: int
    run: str
    segment: int
    first: int
    count: int
    offset: int
    bytes: int
    chain_before: str
    chain_after: str
    sha256: str
    final: bool


class RunReader:
    """The proved records of one run. Every byte it yields is under a signed leaf of a verified log."""

    def __init__(self, home: Home, run: str, *, leaves: LogLeaves | None = None) -> None:
        self.run = run
        self._folder = home.run(run)
        source = leaves if leaves is not None else LogLeaves(home)
        self.begin: dict[str, Any] | None = source.runs.get(run)
        """The body of the run's `run/v1` statement, None when the log has none."""
        self.segments: tuple[SegmentLeaf, ...] = tuple(source.segments.get(run, ()))
        self.head = source.head
        """The verified tree head all of this rests on."""

    @property
    def ended(self) -> bool:
        """Whether the record was closed in an orderly way."""
        return bool(self.segments) and self.segments[-1].final

    @property
    def running(self) -> bool:
        """Whether a supervisor still holds the spool."""
        return is_running(self._folder)

    def records(self, *, since: int = 0) -> Iterator[Evidence]:
        """The records in order. Raises VerificationError at the first segment that is not what the log says.

        since: leave out this many segments, which the caller has read to their end under an earlier head.
        """
        expected_segment, first, offset, chain = 0, 0, 0, chain_start(self.run)
        if since:
            known = self.segments[since - 1]
            expected_segment, first, offset = since, known.first + known.count, known.offset + known.bytes
            chain = bytes.fromhex(known.chain_after)
        try:
            spool = (self._folder / "spool").open("rb")
        except OSError as error:
            raise VerificationError(
                f"run {self.run}: the log holds {len(self.segments)} sealed segments, its spool cannot be read: "
                f"{error.strerror}"
            ) from error
        with spool:
            spool.seek(offset)
            for leaf in self.segments[since:]:
                where = f"run {self.run}: segment {leaf.segment} (leaf {leaf.leaf})"
                if (leaf.segment, leaf.first, leaf.offset) != (expected_segment, first, offset):
                    raise VerificationError(
                        f"{where}: expected segment {expected_segment} from record {first} at byte {offset}, "
                        f"found record {leaf.first} at byte {leaf.offset}"
                    )
                if not 0 <= leaf.bytes <= SEGMENT_LIMIT_BYTES or leaf.chain_before != chain.hex():
                    raise VerificationError(f"{where}: does not follow from the segment before it")
                data = spool.read(leaf.bytes)
                if len(data) != leaf.bytes:
                    raise TruncatedRecord(
                        f"{where}: the spool ends after {offset + len(data)} bytes, the log has {offset + leaf.bytes}"
                    )
                if sha256_hex(data) != leaf.sha256:
                    raise VerificationError(f"{where}: the spool's bytes are not the ones that were sealed")
                yield from decode_lines(data, chain, first=first, leaf=leaf.leaf)
                expected_segment, first, offset = expected_segment + 1, first + leaf.count, offset + leaf.bytes
                chain = bytes.fromhex(leaf.chain_after)

    @property
    def unsealed_bytes(self) -> int:
        """Bytes in the spool past the last sealed segment: written, but not proved."""
        sealed = sum(leaf.bytes for leaf in self.segments)
        try:
            return max(0, (self._folder / "spool").stat().st_size - sealed)
        except OSError:
            return 0


def is_running(folder: Path) -> bool:
    """Whether a supervisor still holds the spool of the run whose folder this is."""
    try:
        descriptor = os.open(folder / "spool", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class TruncatedRecord(VerificationError):
    """Sealed records are missing from the end of the spool."""


class LogLeaves:
    """All run and segment statements of the log, read once: head and entries verified, signatures checked."""

    def __init__(self, home: Home, *, since: LogLeaves | None = None) -> None:
        """since: what was read before, to be gone on with. Raises VerificationError where the log does not hold that
        any more, entry for entry."""
        if not home.log.is_dir():
            raise Misuse(f"{home.root}: no log here", next_step="record a run first: trainguard run -- CMD")
        reader = LogReader(home.log, home.keys / "log.vkey")
        key = load_public_key(home.keys / "attestation.pub")
        self.head = reader.head()
        self.runs: dict[str, dict[str, Any]] = {}
        self.segments: dict[str, list[SegmentLeaf]] = {}
        self.audits: dict[str, list[dict[str, Any]]] = {}
        """Run → bodies of its `audit/v1` statements, each with its leaf and the digest of its report."""
        self.data: list[dict[str, Any]] = []
        """Bodies of its `data/v1` statements in order, each with its leaf and the SHA-256 of its entry."""
        self.waivers: list[Waiver] = []
        """Runs that were let off (waiver.py)."""
        self.sealed: dict[bytes, list[bytes]] = {}
        """Entries that say nothing to whoever has no key, by their tags (opaque.py)."""
        self.unreadable: list[int] = []
        """Leaves that are not statements of ours by our key; other kinds of entry may share the log."""
        read = self._go_on(since, reader, home) if since is not None else 0
        for index, entry in enumerate(reader.entries(read, self.head.size), read):
            if opaque.is_sealed(entry):
                self.sealed.setdefault(opaque.tag_of(entry), []).append(entry)
                continue
            try:
                self._take(index, verify_statement(entry, [key], where=f"leaf {index}"), entry)
            except VerificationError:
                self.unreadable.append(index)

    def _go_on(self, known: LogLeaves, reader: LogReader, home: Home) -> int:
        """Take over what was read before; returns how many entries that was."""
        size = known.head.size
        if size > self.head.size or reader.root_at(size) != known.head.root:
            raise VerificationError(f"{home.log}: does not hold the {size} entries any more that were read before")
        self.runs, self.data, self.waivers = dict(known.runs), list(known.data), list(known.waivers)
        self.segments = {run: list(leaves) for run, leaves in known.segments.items()}
        self.audits = {run: list(bodies) for run, bodies in known.audits.items()}
        self.sealed = {tag: list(entries) for tag, entries in known.sealed.items()}
        self.unreadable = list(known.unreadable)
        return size

    def _take(self, index: int, value: dict[str, Any], entry: bytes) -> None:
        kind = str(value["predicateType"]).removeprefix(PREDICATE_BASE)
        body = value["predicate"]
        if kind == "run/v1" and isinstance(body.get("run"), str):
            self.runs.setdefault(body["run"], {**body, "leaf": index})
        elif kind == "audit/v1" and isinstance(body.get("run"), str):
            report = value["subject"][0]["digest"]["sha256"]
            self.audits.setdefault(body["run"], []).append({**body, "leaf": index, "report": report})
        elif kind == "data/v1":
            self.data.append({**body, "leaf": index, "entry": sha256_hex(entry)})
        elif kind == "waiver/v1":
            waiver = to_waiver(body)
            if waiver is not None:
                self.waivers.append(waiver)
        elif kind == "segment/v1":
            try:
                fields = {**body, "leaf": index, "sha256": value["subject"][0]["digest"]["sha256"]}
                leaf = msgspec.convert(fields, SegmentLeaf)
            except (msgspec.ValidationError, KeyError, IndexError, TypeError) as error:
                raise MalformedEvidence(f"leaf {index}: not a segment statement: {error}") from error
            self.segments.setdefault(leaf.run, []).append(leaf)
