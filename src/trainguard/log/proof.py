"""Offline proofs that an entry is in a log: `.tlog-proof` files (C2SP tlog-proof v1).

    c2sp.org/tlog-proof@v1
    [extra <base64, not authenticated>]
    index <decimal>
    <base64 hash>…                    from the leaf's sibling up to the root's child
    <blank line>
    <signed tree head, verbatim>

    proof = parse_proof(path.read_bytes())
    head = verify_proof(proof, entry, load_verifier("log.vkey"))

Cosignatures of witnesses travel in the tree head; checking them against a policy is not implemented.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from trainguard.errors import MalformedEvidence
from trainguard.log.merkle import HASH_BYTES, PATH_LIMIT, leaf_hash, verify_inclusion
from trainguard.log.note import NOTE_LIMIT_BYTES, Verifier, decode_base64
from trainguard.log.tree_head import TreeHead, parse_decimal, verify_tree_head

HEADER = "c2sp.org/tlog-proof@v1"
EXTRA_LIMIT_BYTES = 64 << 10
PROOF_LIMIT_BYTES = NOTE_LIMIT_BYTES + 2 * EXTRA_LIMIT_BYTES
SUFFIX = ".tlog-proof"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """That one entry is in the log with this tree head. Nothing in it has been verified."""

    index: int
    """Index of the entry."""
    path: tuple[bytes, ...]
    """Inclusion proof of RFC 6962 section 2.1.1, leaf to root."""
    note: str
    """The signed tree head, verbatim."""
    extra: bytes | None = None
    """Application data. Never authenticated: do not believe it."""


def encode_proof(proof: Proof) -> str:
    """The text of a `.tlog-proof` file; `parse_proof` is the inverse."""
    extra = [] if proof.extra is None else [f"extra {base64.b64encode(proof.extra).decode()}"]
    hashes = [base64.b64encode(value).decode() for value in proof.path]
    return "\n".join([HEADER, *extra, f"index {proof.index}", *hashes, "", proof.note])


def parse_proof(data: bytes, *, where: str = "proof") -> Proof:
    """The proof in `data`; raises MalformedEvidence naming `where` for anything the format forbids."""
    if len(data) > PROOF_LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: {len(data)} bytes, limit {PROOF_LIMIT_BYTES}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedEvidence(f"{where}: not UTF-8 at byte {error.start}") from error
    top, blank, note = text.partition("\n\n")
    lines = top.split("\n")
    if not blank or lines.pop(0) != HEADER:
        raise MalformedEvidence(f"{where}: expected {HEADER!r}, lines and a blank line, found {text[:80]!r}")
    extra = None
    if lines and lines[0].startswith("extra "):
        extra = decode_base64(lines.pop(0).removeprefix("extra "), where=f"{where}: extra")
    if not lines or not lines[0].startswith("index "):
        raise MalformedEvidence(f"{where}: expected a line 'index <number>', found {''.join(lines[:1])[:80]!r}")
    index = parse_decimal(lines.pop(0).removeprefix("index "), where=f"{where}: index")
    if len(lines) > PATH_LIMIT:
        raise MalformedEvidence(f"{where}: {len(lines)} hashes, limit {PATH_LIMIT}")
    path = tuple(decode_base64(line, where=f"{where}: hash {number}") for number, line in enumerate(lines))
    if any(len(value) != HASH_BYTES for value in path):
        raise MalformedEvidence(f"{where}: expected hashes of {HASH_BYTES} bytes")
    return Proof(index=index, path=path, note=note, extra=extra)


def verify_proof(proof: Proof, entry: bytes, verifier: Verifier, *, where: str = "proof") -> TreeHead:
    """The tree head, if `verifier`'s log signed it and `entry` is at the proof's index in it.

    Raises VerificationError or MalformedEvidence otherwise. Needs nothing but its arguments.
    """
    head = verify_tree_head(proof.note.encode(), verifier, where=f"{where}: tree head")
    verify_inclusion(leaf_hash(entry), proof.index, head.size, proof.path, head.root, where=where)
    return head
