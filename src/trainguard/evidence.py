"""Evidence: the one thing that leaves a training process (spec/evidence.md).

A record is one line of a run's spool. The process writes `kind`, `seq`, `step` and `body`; everything that says
*who* wrote it (pid, uid, process number, time) is added by the supervisor from what the kernel attests
(SO_PEERCRED), never from what the process claims.

Line layout:  `<chain, 64 hex> <JSON object>\\n`
    chain_i = SHA-256(chain_{i-1} bytes || JSON bytes),  chain_{-1} = SHA-256("trainguard/spool/v1\\n" || run id)
so a spool cannot be reordered, cut in the middle or edited without every later chain value changing. Segments of
lines are hashed into the log; see spec/segment.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

from trainguard.errors import MalformedEvidence

LINE_LIMIT_BYTES = 1 << 20
"""A record is at most 1 MiB: five times what one socket message can carry."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One record of a run."""

    n: int
    """Position in the spool, from 0, without gaps."""
    at: int
    """Supervisor's clock when the record arrived, nanoseconds since the epoch."""
    source: str
    """`process` (sent by a guarded process) or `supervisor` (observed by the supervisor itself)."""
    kind: str
    """What kind of record this is; the kinds and their bodies are listed in spec/evidence.md."""
    body: dict[str, Any] = {}
    process: int | None = None
    """The supervisor's own number for the process, from 0; pids recur, these do not."""
    pid: int | None = None
    uid: int | None = None
    rank: int | None = None
    seq: int | None = None
    """The process's own frame number, from 0; a missing one is a finding."""
    step: int | None = None
    """Optimizer step in that process, from 1."""
    leaf: int | None = None
    """Log leaf of the segment that holds this record; set by the reader, never stored."""
    hash: str | None = None
    """SHA-256 of the JSON bytes of the record; set by the reader, never stored."""


STEPS_LIMIT = 1 << 14
"""Steps that one record may stand for."""


def unfold(record: Evidence) -> Iterator[Evidence]:
    """The records of kind `step` that one of kind `steps` stands for; any other record as it is.

    Steps that the budget left unchecked travel together (spec/evidence.md, "steps"). Whoever follows a run step by step
    reads its records through this. `wall_ns` and `own_ns` of steps that share a row are their mean. Raises
    MalformedEvidence, before anything was yielded, for a body that is not as specified.
    """
    if record.kind != "steps":
        yield record
        return
    rows, level = record.body.get("rows"), record.body.get("level")
    if not isinstance(rows, list) or not isinstance(level, int):
        raise MalformedEvidence("steps: expected rows and a level")
    for row in rows:
        fits = isinstance(row, list) and len(row) in (6, 7) and all(type(each) is int and each >= 0 for each in row[:6])
        if not fits or row[3] < 1 or (len(row) == 7 and (row[3] != 1 or not isinstance(row[6], dict))):
            raise MalformedEvidence(f"steps: not a row: {str(row)[:120]}")
    if sum(row[3] for row in rows) > STEPS_LIMIT:
        raise MalformedEvidence(f"steps: one record for more than {STEPS_LIMIT} steps")
    for number, opt, index, count, wall_ns, own_ns, *values in rows:
        fixed = {"opt": opt, "wall_ns": wall_ns // count, "own_ns": own_ns // count, "checked": False, "level": level}
        for turn in range(count):
            body = {**(values[0] if values else {}), **fixed, "index": index + turn}
            yield msgspec.structs.replace(record, kind="step", step=number + turn, body=body)


_decoder = msgspec.json.Decoder(Evidence)


def chain_start(run: str) -> bytes:
    """The chain value before the first record of `run`: 32 bytes."""
    return hashlib.sha256(b"trainguard/spool/v1\n" + run.encode()).digest()


def encode_line(evidence: Evidence, previous: bytes) -> tuple[bytes, bytes]:
    """One spool line for `evidence` after chain value `previous` (32 bytes), and the new chain value."""
    fields = {
        key: value
        for key, value in msgspec.structs.asdict(evidence).items()
        if value is not None and key not in ("leaf", "hash")
    }
    payload = msgspec.json.encode(fields)
    if len(payload) > LINE_LIMIT_BYTES:
        raise MalformedEvidence(f"record {evidence.n}: {len(payload)} bytes, limit {LINE_LIMIT_BYTES}")
    chain = hashlib.sha256(previous + payload).digest()
    return chain.hex().encode() + b" " + payload + b"\n", chain


def decode_lines(data: bytes, previous: bytes, *, first: int, leaf: int | None = None) -> Iterator[Evidence]:
    """The records in `data`, whole spool lines that follow chain value `previous`; the inverse of encode_line.

    first: position of the first record. Raises MalformedEvidence at the first line that is cut, too long, out of
    order, or whose chain value is not that of its content.
    """
    for offset, line in enumerate(data.splitlines(keepends=True)):
        n = first + offset
        if not line.endswith(b"\n") or len(line) > LINE_LIMIT_BYTES + 66 or line[64:65] != b" ":
            raise MalformedEvidence(f"spool record {n}: expected '<64 hex> <JSON>\\n', found {line[:80]!r}")
        payload = line[65:-1]
        chain = hashlib.sha256(previous + payload).digest()
        if chain.hex().encode() != line[:64]:
            raise MalformedEvidence(f"spool record {n}: chain value does not follow from the record before it")
        try:
            record = _decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise MalformedEvidence(f"spool record {n}: not a record: {error}") from error
        if record.n != n:
            raise MalformedEvidence(f"spool record {n}: expected position {n}, found {record.n}")
        yield msgspec.structs.replace(record, leaf=leaf, hash=hashlib.sha256(payload).hexdigest())
        previous = chain
