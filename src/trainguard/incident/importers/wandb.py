"""Weights & Biases: an offline run folder (its `run-*.wandb` file), or exported JSON, read without wandb.

The `.wandb` file is a log of protobuf records in blocks of 32 KiB: a header of 7 bytes, then pieces of

    CRC-32 (4 bytes) | length (2) | type (1: whole, 2: first, 3: middle, 4: last) | data

Artifacts that the run logged and used are taken over. Exported JSON is one object or a list of them, each

    {"run": "id", "name": "…", "used": ["entity/project/data:v0"], "logged": ["entity/project/model:v3"]}

as `Run.used_artifacts()` and `Run.logged_artifacts()` of its public API name them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainguard.errors import MalformedEvidence
from trainguard.incident.claims import Claims
from trainguard.incident.importers.gather import Gathered, parse_json, read_bounded, texts

MAGIC = b":W&B"
HEADER_BYTES = 7
BLOCK_BYTES = 32 << 10
RECORD_LIMIT_BYTES = 64 << 20
FILE_LIMIT_BYTES = 2 << 30
RECORDS_LIMIT = 20_000_000
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
RUN, ARTIFACT, USE_ARTIFACT = 17, 8, 25
"""Field numbers of a record: which of its kinds it is."""


def read(path: Path) -> Claims:
    """The claims of an offline run's folder or file, or of exported JSON. Raises Unavailable or MalformedEvidence."""
    made = Gathered(f"wandb at {path.name}", str(path))
    if path.is_dir():
        files = [file for file in sorted(path.rglob("run-*.wandb"))[:10_000] if file.is_file()]
        if not files:
            raise MalformedEvidence(f"{path}: expected an offline run of wandb, found no run-….wandb in it")
        for file in files:
            _run_file(made, file)
    elif path.suffix == ".wandb":
        _run_file(made, path)
    else:
        _exported(made, path)
    return made.claims


def _exported(made: Gathered, path: Path) -> None:
    value = parse_json(read_bounded(path), str(path))
    for number, one in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(one, dict) or not isinstance(one.get("run"), str):
            raise MalformedEvidence(f"{path}: entry {number}: expected an object with a run, found none")
        label = one["name"] if isinstance(one.get("name"), str) else one["run"]
        _joined(made, one["run"], label, texts(one.get("used")), texts(one.get("logged")))


def _run_file(made: Gathered, path: Path) -> None:
    run, label, used, logged = "", "", [], []
    for record in records(read_bounded(path, FILE_LIMIT_BYTES), str(path)):
        for number, value in _messages(record, str(path)):
            told = dict(_messages(value, str(path))) if number in (RUN, ARTIFACT, USE_ARTIFACT) else {}
            if number == RUN:
                run, label = _text(told.get(1)) or run, _text(told.get(8)) or label
            elif number == ARTIFACT:
                logged.append(f"{_text(told.get(5))}@{_text(told.get(6))}")
            elif number == USE_ARTIFACT:
                used.append(_text(told.get(3)) or _text(told.get(1)))
    if not run:
        raise MalformedEvidence(f"{path}: expected a record of a run, found none")
    _joined(made, run, label or run, used, logged)


def _joined(made: Gathered, run: str, label: str, used: list[str], logged: list[str]) -> None:
    key = made.node("artifact", f"wandb/run/{run}", f"W&B run {label}")
    outputs = [made.node("artifact", f"wandb/{name}", f"W&B artifact {name}") for name in logged if name]
    for target in outputs:
        made.edge(key, target)
    for name in used:
        if name:
            made.edge(made.node("artifact", f"wandb/{name}", f"W&B artifact {name}"), key)


def records(data: bytes, where: str) -> Iterator[bytes]:
    """The records of a `.wandb` file. A last one that is cut off is left out: the run may still be going on."""
    if data[:4] != MAGIC or len(data) < HEADER_BYTES:
        raise MalformedEvidence(f"{where}: expected a wandb run file, found {data[:8]!r}")
    at, parts, count = HEADER_BYTES, b"", 0
    while at < len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < 7:
            at += left
            continue
        if len(data) - at < 7:
            return
        check, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        if length > left - 7 or kind not in (WHOLE, FIRST, MIDDLE, LAST):
            raise MalformedEvidence(f"{where}: byte {at}: expected a piece of a record within its block, found {kind}")
        if len(piece) < length:
            return
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != check:
            raise MalformedEvidence(f"{where}: byte {at}: the piece's checksum is not that of its content")
        if (kind in (WHOLE, FIRST)) != (not parts) and (kind in (MIDDLE, LAST)) != bool(parts):
            raise MalformedEvidence(f"{where}: byte {at}: a record begins or goes on where it cannot")
        at, parts, count = at + 7 + length, parts + piece, count + 1
        if count > RECORDS_LIMIT or len(parts) > RECORD_LIMIT_BYTES:
            raise MalformedEvidence(f"{where}: expected records of at most {RECORD_LIMIT_BYTES} bytes, found more")
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""


def _messages(data: bytes, where: str) -> Iterator[tuple[int, bytes]]:
    """(number, content) of every field of a protobuf message that has bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, where)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at, where)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varint(data, at, where)
            if size > len(data) - at:
                raise MalformedEvidence(f"{where}: a field runs past its record's end")
            yield key >> 3, data[at : at + size]
            at += size
        else:
            raise MalformedEvidence(f"{where}: expected a field of a known kind, found {kind}")
    if at > len(data):
        raise MalformedEvidence(f"{where}: a field runs past its record's end")


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise MalformedEvidence(f"{where}: a number runs past its record's end")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace")[:500] if isinstance(value, bytes) else ""
