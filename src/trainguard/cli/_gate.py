"""Vets what the job is about to read, in a thread of `trainguard run`: out of the job's reach.

A process of the job hands over the descriptor of a file that begins like a model file (watch/loads.py). Its content is
scanned here, and compared with its seal if our log has one for that place. By policy `stop` the process waits for the
answer; by `log` it has gone on, and what is found is a record like any other.

    request  {"path", "place", "step", "own": bool, "wait": bool} and one descriptor     answer  {"refuse": bool, "why"}

Everything a request says is a claim; what is judged is the descriptor. A file is judged once, whoever opens it.
"""

from __future__ import annotations

import bz2
import contextlib
import json
import lzma
import os
import selectors
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trainguard.envelope import load_public_key
from trainguard.errors import TrainguardError, Unavailable
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.measure.caches import compiler_caches
from trainguard.policy import Policy
from trainguard.scan import FileReport, Report, ScanPolicy, Verdict, vet_file
from trainguard.scan.formats.zips import BadZip, find_directory
from trainguard.scan.source import FileSource
from trainguard.scan.trust import parse_trust_line
from trainguard.seal.ledger import Ledger, read_ledger
from trainguard.seal.report import SealReport
from trainguard.seal.verify import verify_seal
from trainguard.watch.loads import begins_like_model

MESSAGE_BYTES = 16384
WORKERS = 2
BACKLOG = 512
READ_SECONDS = 5.0
"""A process that connects says what it wants within this time."""
QUIET_RECORDS = 2000
"""Records of files with nothing to say about; past it they are only counted."""
CREDIT_SECONDS = 20.0
SHARE = 0.05
"""By `log`, vetting may use CREDIT_SECONDS of CPU time and this share of the time since; past it files are counted."""
LEDGER_SECONDS = 5.0
SEARCHED_BYTES = 16 << 20
MODEL_NAMES = (b"data.pkl", b"constants.pkl", b".npy", b"metadata.json", b"schema.json")
"""A zip that holds one of these is read as torch, numpy, Keras or skops read it; every other zip is somebody's data."""


@dataclass(frozen=True, slots=True)
class _Request:
    path: str
    place: str | None
    step: int | None
    own: bool
    wait: bool
    pid: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found about one file."""

    findings: tuple[Finding, ...]
    report: FileReport | None
    why: str | None
    """One sentence why `stop` refuses it; None where it may be read."""
    sealed: dict[str, Any] | None = None
    """Run, step and lock of the seal in our log that it was found equal to."""


class Gate:
    """Listens from `start` to `close`. add(kind, body, **fields) takes its records; ours(path): this run saved it."""

    def __init__(
        self, home: Home, run: str, policy: Policy, add: Callable[..., Any], ours: Callable[[str], bool]
    ) -> None:
        for line in policy.load_trust:
            parse_trust_line(line)
        self.stops = policy.load == "stop"
        self._home = home
        self._run = run
        self._add = add
        self._ours = ours
        self._scan = msgspec.convert({"tier": policy.load_tier, "trust": policy.load_trust}, ScanPolicy)
        self._caches = tuple(str(folder) + os.sep for folder in compiler_caches(os.environ))
        self._folder = tempfile.mkdtemp(prefix="trainguard-")
        self.path = str(Path(self._folder) / "g")
        self._listener = _listener(self.path)
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="gate")
        self._thread = threading.Thread(target=self._listen, name="gate", daemon=True)
        self._lock = threading.Lock()
        self._judged: dict[tuple[int, ...], Answer] = {}
        self._began = time.monotonic()
        self._spent = 0.0
        self._quiet = 0
        self._left_out = 0
        self._ledger: Ledger | None = None
        self._ledger_at = 0.0

    @property
    def settings(self) -> dict[str, str]:
        """What the job's processes are told."""
        return {"mode": "stop" if self.stops else "log", "path": self.path}

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def close(self) -> None:
        """Finish what was asked before, then stop listening."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        self._pool.shutdown(wait=True)
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._left_out or self._quiet > QUIET_RECORDS:
            self._add("opened", {"left_out": self._left_out, "quiet": max(0, self._quiet - QUIET_RECORDS)})

    # -- requests -------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while selector.select(0 if self._closing.is_set() else 0.2) or not self._closing.is_set():
                with contextlib.suppress(OSError):
                    link, _ = self._listener.accept()
                    self._pool.submit(self._serve, link)

    def _serve(self, link: socket.socket) -> None:
        """One process, one file."""
        descriptors: list[int] = []
        try:
            link.settimeout(READ_SECONDS)
            pid, _, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            data, descriptors, _, _ = socket.recv_fds(link, MESSAGE_BYTES, 1)
            request = _parse(data, pid)
            if request is None or len(descriptors) != 1:
                return
            answer = self._answer(descriptors[0], request)
            if request.wait:
                refuse = self.stops and answer.why is not None
                link.send(json.dumps({"refuse": refuse, "why": (answer.why or "")[:4000]}).encode())
        except OSError:
            return  # the process is gone
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            link.close()

    def _answer(self, descriptor: int, request: _Request) -> Answer:
        """What is known of this file, or is found out now; recorded once, and again each time it is refused."""
        passed = Answer((), None, None)
        try:
            status = os.fstat(descriptor)
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if not stat.S_ISREG(status.st_mode) or request.path.startswith(self._caches):
                return passed
            own = request.own or self._ours(request.path)
            known = self._judged.get(identity)
            if known is None and ((own and not self.stops) or not is_candidate(descriptor, status.st_size)):
                return passed
            if known is None and self._is_over_budget():
                self._left_out += 1
                return passed
            answer = known or self._timed(descriptor, request, own)
        except OSError as error:
            answer, known = Answer((), None, f"{request.path}: cannot be read: {error.strerror}"), None
        except TrainguardError as error:
            answer, known = Answer((), None, f"{request.path}: could not be judged: {error}"), None
        self._judged[identity] = answer
        if known is None or (self.stops and answer.why is not None):
            self._record(answer, request, _owner(descriptor, request.path))
        return answer

    def _is_over_budget(self) -> bool:
        return not self.stops and self._spent > CREDIT_SECONDS + SHARE * (time.monotonic() - self._began)

    def _timed(self, descriptor: int, request: _Request, own: bool) -> Answer:
        began = time.thread_time()
        try:
            return self._judge(descriptor, request, own)
        finally:
            self._spent += time.thread_time() - began

    def _judge(self, descriptor: int, request: _Request, own: bool) -> Answer:
        """Scan the content; verify it if our log has a seal of that place."""
        report = vet_file(descriptor, self._scan, name=request.path)
        whole = Report(
            path=request.path, verdict=report.verdict, tier=self._scan.tier, policy="", version="", files=(report,)
        )
        found = [finding for finding in whole.to_findings(run=self._run) if finding.outcome == "violated"]
        sealed = None
        if not own and self._is_sealed(descriptor, request.path):
            seal = verify_seal(Path(request.path), home=self._home)
            found += seal.findings
            sealed = sealed_as(seal)
        return Answer(tuple(found), report, _why(report, found, own), sealed)

    def _is_sealed(self, descriptor: int, path: str) -> bool:
        """Whether our log has a seal of the place this descriptor is opened from."""
        ledger = self._newest_ledger()
        if ledger is None or ledger.newest(place=os.path.realpath(path)) is None:
            return False
        try:
            return os.path.samestat(os.fstat(descriptor), Path(path).stat())
        except OSError:
            return False

    def _newest_ledger(self) -> Ledger | None:
        """The seals in our log, read again when what we know is older than LEDGER_SECONDS."""
        with self._lock:
            now = time.monotonic()
            if self._ledger is None or now - self._ledger_at > LEDGER_SECONDS:
                key = self._home.keys / "attestation.pub"
                self._ledger = read_ledger(self._home, load_public_key(key)) if key.exists() else None
                self._ledger_at = now
            return self._ledger

    def _record(self, answer: Answer, request: _Request, owner: list[int] | None) -> None:
        report = answer.report
        if not answer.findings and answer.why is None:
            self._quiet += 1
            if self._quiet > QUIET_RECORDS:
                return
        body = {
            "path": request.path,
            "findings": msgspec.to_builtins(answer.findings),
            "verdict": report.verdict.value if report is not None else "error",
            "format": report.format if report is not None else None,
            "sha256": report.sha256 if report is not None else None,
            "place": request.place,
            "owner": owner,
            "why": answer.why,
            "refused": self.stops and answer.why is not None,
        }
        if answer.sealed is not None:
            body["sealed"] = answer.sealed
        self._add("opened", body, step=request.step, pid=request.pid)


def sealed_as(report: SealReport) -> dict[str, Any] | None:
    """What the record `opened` says of a seal that held; None where it did not."""
    if report.status != "upheld" or report.findings:
        return None
    return {"run": report.run, "step": report.step, "lock": report.lock}


def _owner(descriptor: int, path: str) -> list[int] | None:
    """Uid and mode of the file that is read, then those of the folder it lies in; None where that is another file."""
    try:
        status, named, folder = os.fstat(descriptor), os.stat(path), Path(path).parent.stat()  # noqa: PTH116
    except (OSError, ValueError):
        return None
    if not os.path.samestat(status, named):
        return None
    return [status.st_uid, status.st_mode & 0o7777, folder.st_uid, folder.st_mode & 0o7777]


def _listener(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Unavailable(f"{path}: socket for vetting loads cannot be made: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def _parse(data: bytes, pid: int) -> _Request | None:
    try:
        value = json.loads(data)
        path, place, step = value["path"], value.get("place"), value.get("step")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    fits = isinstance(path, str) and (place is None or isinstance(place, str)) and (step is None or type(step) is int)
    if not fits or "\0" in path:
        return None
    return _Request(path[:4096], place, step, value.get("own") is True, value.get("wait") is True, pid)


def _why(report: FileReport, found: list[Finding], own: bool) -> str | None:
    """One sentence why `stop` does not let the job read it; None where it may."""
    if found:
        return found[0].message
    if report.verdict is Verdict.SAFE or own:
        return None
    reason = next((reason for reason in report.reasons if reason.verdict is report.verdict), None)
    what = reason.what if reason is not None else report.verdict.value
    lines = report.trust_lines
    hint = f"; if you know it, put into the policy: load_trust = {list(lines)}" if lines else ""
    return f"{report.path}: {what}{hint}"


# -- candidates -------------------------------------------------------------------------------------------------------


def is_candidate(descriptor: int, size: int) -> bool:
    """Whether a loader of models reads such a file: not every zip or compressed stream is one."""
    head = os.pread(descriptor, 512, 0)
    if head[:4] == b"PK\x03\x04":
        return _is_model_zip(descriptor, size)
    inner = _unfolded(head, descriptor)
    return inner is None or begins_like_model(inner, 1 << 40)


def _is_model_zip(descriptor: int, size: int) -> bool:
    """Whether its directory names a member that model loaders look for; where it has none, whether its bytes do."""
    source = FileSource(descriptor, size)
    try:
        _, _, start, length = find_directory(source, size)
        spans = [(start, min(length, 4 * SEARCHED_BYTES))]
    except BadZip:
        spans = [(0, min(size, SEARCHED_BYTES)), (max(0, size - SEARCHED_BYTES), min(size, SEARCHED_BYTES))]
    return any(name in os.pread(descriptor, length, start).lower() for start, length in spans for name in MODEL_NAMES)


def _unfolded(head: bytes, descriptor: int) -> bytes | None:
    """The first bytes a compressed stream unfolds to; None for what is not compressed, or in no way we unfold here."""
    makers: tuple[tuple[bytes, Callable[[], Any]], ...] = (
        (b"\x1f\x8b\x08", lambda: zlib.decompressobj(31)),
        (b"BZh", bz2.BZ2Decompressor),
        (b"\xfd7zXZ\0", lzma.LZMADecompressor),
        (b"\x5d\0\0", lzma.LZMADecompressor),
        *((start, zlib.decompressobj) for start in (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")),
    )
    make = next((make for start, make in makers if head.startswith(start)), None)
    if make is None:
        return None
    try:
        return bytes(make().decompress(os.pread(descriptor, 1 << 16, 0), 512))
    except (zlib.error, OSError, lzma.LZMAError, EOFError, ValueError):
        return b""
