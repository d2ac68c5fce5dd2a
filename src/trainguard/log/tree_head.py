"""Tree heads: the root of the log at a size, signed (C2SP tlog-checkpoint over C2SP signed-note).

    <origin>
    <tree size, decimal>
    <base64 of the root hash>
    [<extension lines, ignored>]

    — <origin> <base64(key id || Ed25519 signature)>

The file the specification calls `checkpoint` holds one; in trainguard that word is kept for saved weights.
The signing key's name must be the origin, which is how a log is named by its vkey alone.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.log.merkle import HASH_BYTES, SIZE_LIMIT
from trainguard.log.note import Signer, Verifier, decode_base64, sign_note, verify_note


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeHead:
    """A tree head whose signature was verified, or that was just signed."""

    origin: str
    """Name of the log."""
    size: int
    """Number of entries."""
    root: bytes
    """RFC 6962 Merkle tree hash of them, 32 bytes."""
    note: str
    """The signed note, verbatim."""


def encode_body(origin: str, size: int, root: bytes) -> str:
    """The text that is signed."""
    return f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"


def parse_body(text: str, *, where: str) -> tuple[str, int, bytes]:
    """Origin, size and root in a tree head's text; raises MalformedEvidence otherwise."""
    lines = text.split("\n")
    if len(lines) < 4 or lines.pop() != "" or not all(lines):
        raise MalformedEvidence(f"{where}: expected lines for origin, tree size and root hash, found {text[:80]!r}")
    root = decode_base64(lines[2], where=f"{where}: root hash")
    if len(root) != HASH_BYTES:
        raise MalformedEvidence(f"{where}: expected a root hash of {HASH_BYTES} bytes, found {len(root)}")
    return lines[0], parse_decimal(lines[1], where=f"{where}: tree size"), root


def parse_decimal(text: str, *, where: str) -> int:
    """A number below 2**63 in its one decimal form: ASCII digits, no sign, no leading zero."""
    if not text.isascii() or not text.isdigit() or len(text) > 19 or str(int(text)) != text or int(text) >= SIZE_LIMIT:
        raise MalformedEvidence(f"{where}: expected a decimal number below 2**63, found {text[:80]!r}")
    return int(text)


def sign_tree_head(size: int, root: bytes, signer: Signer) -> TreeHead:
    """The head of the log named like `signer`. The caller answers for never signing two roots for one size."""
    note = sign_note(encode_body(signer.name, size, root), signer)
    return TreeHead(origin=signer.name, size=size, root=root, note=note)


def verify_tree_head(data: bytes, verifier: Verifier, *, where: str) -> TreeHead:
    """The head in `data` if `verifier`'s key signed it and it names that log."""
    origin, size, root = parse_body(verify_note(data, verifier, where=where), where=where)
    if origin != verifier.name:
        raise VerificationError(f"{where}: expected origin {verifier.name!r}, found {origin[:80]!r}")
    return TreeHead(origin=origin, size=size, root=root, note=data.decode())
