"""What a run was, read, wrote and found, gathered once for everything that leaves the house in another format."""

from __future__ import annotations

from typing import Any

import msgspec

from trainguard.archive import LogLeaves, RunReader
from trainguard.errors import MalformedEvidence, Misuse, VerificationError
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.seal.ledger import SealLeaf

READS_LIMIT = 10_000


class Read(msgspec.Struct, frozen=True, kw_only=True):
    """One content that a process of the run read."""

    path: str
    sha256: str
    size: int = 0
    step: int | None = None
    """Optimizer step in which it was first read; None before the first."""
    leaf: int | None = None


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as its proved record says."""

    run: str
    host: str | None = None
    command: tuple[str, ...] = ()
    began_ns: int = 0
    ended_ns: int = 0
    """Arrival of the last record."""
    ended: bool = False
    """Whether its record was closed in an orderly way."""
    status: int | None = None
    steps: int = 0
    lock: str | None = None
    leaf: int | None = None
    """Of its `run/v1` statement."""
    reads: tuple[Read, ...] = ()
    reads_left_out: int = 0
    seals: tuple[SealLeaf, ...] = ()
    times: dict[str, int] = {}
    """SHA-256 of a record that a finding cites → when it arrived, nanoseconds."""


def run_facts(
    home: Home, run: str, *, leaves: LogLeaves, seals: tuple[SealLeaf, ...] = (), findings: tuple[Finding, ...] = ()
) -> RunFacts:
    """Everything of `run` that its record proves, up to where it breaks. Raises Misuse for a run that is not known."""
    reader = RunReader(home, run, leaves=leaves)
    if reader.begin is None:
        raise Misuse(f"run {run}: the log holds no statement of it", next_step="trainguard runs")
    wanted = {citation.hash for finding in findings for citation in finding.evidence}
    taken = _Taken()
    try:
        for record in reader.records():
            taken.see(record, wanted)
    except VerificationError:
        pass  # the verdict has it as a finding
    start = taken.start
    command = start.get("command")
    host, lock = start.get("host"), start.get("lock")
    return RunFacts(
        run=run,
        host=host if isinstance(host, str) else None,
        command=tuple(word for word in command if isinstance(word, str)) if isinstance(command, list) else (),
        began_ns=taken.began,
        ended_ns=taken.last,
        ended=reader.ended,
        status=taken.status,
        steps=taken.steps,
        lock=lock if isinstance(lock, str) else None,
        leaf=reader.begin.get("leaf"),
        reads=tuple(taken.reads.values()),
        reads_left_out=taken.left_out,
        seals=tuple(seal for seal in seals if seal.run == run),
        times=taken.times,
    )


class _Taken:
    """What was seen so far."""

    def __init__(self) -> None:
        self.start: dict[str, Any] = {}
        self.began = 0
        self.last = 0
        self.steps = 0
        self.status: int | None = None
        self.reads: dict[tuple[str, str], Read] = {}
        self.left_out = 0
        self.times: dict[str, int] = {}

    def see(self, record: Evidence, wanted: set[str]) -> None:
        self.last = max(self.last, record.at)
        if record.hash in wanted and record.hash is not None:
            self.times[record.hash] = record.at
        if record.kind == "start":
            self.start, self.began = record.body, record.at
        elif record.kind == "end":
            status = record.body.get("status")
            self.status = status if isinstance(status, int) else None
        elif record.kind == "open":
            self._open(record)
        elif record.kind in ("step", "steps"):
            try:
                self.steps = max([self.steps, *(each.step or 0 for each in unfold(record))])
            except MalformedEvidence:
                return

    def _open(self, record: Evidence) -> None:
        files = record.body.get("files")
        for line in files if isinstance(files, list) else ():
            if not isinstance(line, dict) or line.get("mode") == "w":
                continue
            path, digest, size, step = (line.get(name) for name in ("path", "sha256", "size", "first"))
            if not (isinstance(path, str) and isinstance(digest, str)) or (path, digest) in self.reads:
                continue
            if len(self.reads) >= READS_LIMIT:
                self.left_out += 1
                continue
            self.reads[path, digest] = Read(
                path=path[:4096],
                sha256=digest[:64],
                size=size if isinstance(size, int) else 0,
                step=step if isinstance(step, int) else None,
                leaf=record.leaf,
            )
