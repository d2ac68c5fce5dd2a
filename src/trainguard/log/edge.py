"""The edge: the tree's frontier at some commit and where the journal goes on, so that a reopen replays little.

    | "TGE1" | payload length u32 | crc32(payload) u32 |
    payload  | segment u64 | offset u64 | note length u32 | signed tree head | frontier hashes, 32 bytes each |

All numbers big-endian. It is a cache: its frontier must hash to the root of the signed head in it. It also remembers:
a journal that ends before a size signed here was cut. An empty file, which a power cut can leave, counts as none.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.log.merkle import HASH_BYTES, Frontier, fold_peaks
from trainguard.log.note import NOTE_LIMIT_BYTES, Verifier
from trainguard.log.tree import read_file
from trainguard.log.tree_head import TreeHead, verify_tree_head

_MAGIC = b"TGE1"
_HEADER = struct.Struct(">4sII")
_PAYLOAD = struct.Struct(">QQI")
_LIMIT_BYTES = NOTE_LIMIT_BYTES + (8 << 10)
NAME = "edge"


@dataclass(frozen=True, slots=True)
class Edge:
    """A verified edge."""

    segment: int
    """First index of the journal segment that goes on after it."""
    offset: int
    """Where in that segment."""
    head: TreeHead
    frontier: Frontier


def encode_edge(edge: Edge) -> bytes:
    """The file's bytes; `parse_edge` is the inverse."""
    note = edge.head.note.encode()
    payload = _PAYLOAD.pack(edge.segment, edge.offset, len(note)) + note + b"".join(edge.frontier.peaks)
    return _HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload


def parse_edge(data: bytes, verifier: Verifier, *, where: str) -> Edge:
    """The edge in `data`, its signature and root checked. Raises MalformedEvidence or VerificationError."""
    if len(data) < _HEADER.size + _PAYLOAD.size:
        raise MalformedEvidence(f"{where}: {len(data)} bytes are too few")
    magic, length, checksum = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if magic != _MAGIC or length != len(payload) or zlib.crc32(payload) != checksum:
        raise MalformedEvidence(f"{where}: damaged: {len(payload)} bytes do not have their checksum")
    segment, offset, note_bytes = _PAYLOAD.unpack_from(payload)
    at = _PAYLOAD.size + note_bytes
    head = verify_tree_head(payload[_PAYLOAD.size : at], verifier, where=where)
    if len(payload) - at != HASH_BYTES * head.size.bit_count():
        raise MalformedEvidence(f"{where}: expected {head.size.bit_count()} hashes for size {head.size}")
    hashes = [payload[start : start + HASH_BYTES] for start in range(at, len(payload), HASH_BYTES)]
    if fold_peaks(hashes) != head.root:
        raise VerificationError(f"{where}: its hashes do not have the root of its signed tree head")
    return Edge(segment, offset, head, Frontier(head.size, hashes))


def read_edge(log: Path, verifier: Verifier) -> Edge | None:
    """The edge of a log, or None where there is none. Raises as parse_edge does."""
    path = log / NAME
    try:
        data = read_file(path, _LIMIT_BYTES)
    except FileNotFoundError:
        return None
    return parse_edge(data, verifier, where=str(path)) if data else None


def find_edge(log: Path, verifier: Verifier) -> Edge | None:
    """The edge of a log, or None where there is none that holds: it is a cache, and the audit names a damaged one."""
    try:
        return read_edge(log, verifier)
    except VerificationError:
        return None
