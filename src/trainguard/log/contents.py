"""What an entry says, for listings: the statement in it, whose it is, and whether a known key signed it.

Entries are opaque to the log. Ours are DSSE envelopes of in-toto statements (spec/run.md, spec/segment.md); any other
bytes may share a log and are listed by size and digest.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import sha256_hex
from trainguard.envelope import PAYLOAD_TYPE, PREDICATE_BASE, verify_statement
from trainguard.errors import VerificationError

SUMMARY_FIELDS = ("command", "segment", "first", "count", "step", "outcome", "verdict", "bytes", "name")
"""Fields of a predicate worth a place in one line, in this order."""
VALUE_LIMIT = 60


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the log, described."""

    index: int
    bytes: int
    """Its size."""
    sha256: str
    """Of its bytes, hex."""
    statement: str | None = None
    """Predicate type, ours without its prefix (`run/v1`); None where it is no statement."""
    run: str | None = None
    """Run the statement is about, by its own account."""
    summary: str | None = None
    """A few fields of the predicate."""
    signed: bool | None = None
    """True: a known key signed the statement. False: none did. None: no statement, or no key to check with."""


def describe(index: int, entry: bytes, keys: Sequence[ec.EllipticCurvePublicKey] = ()) -> Entry:
    """Describe `entry`; never raises, whatever it holds. keys: attestation keys that count as known."""
    plain = Entry(index=index, bytes=len(entry), sha256=sha256_hex(entry))
    statement = _statement(entry)
    if statement is None:
        return plain
    predicate = statement.get("predicate")
    fields = predicate if isinstance(predicate, dict) else {}
    run = fields.get("run")
    return msgspec.structs.replace(
        plain,
        statement=str(statement.get("predicateType"))[:200].removeprefix(PREDICATE_BASE),
        run=run[:100] if isinstance(run, str) else None,
        summary=_summary(fields),
        signed=_signed(entry, keys),
    )


def _statement(entry: bytes) -> dict[str, Any] | None:
    """The in-toto statement in a DSSE envelope, unverified; None for anything else."""
    if not entry.startswith(b"{"):
        return None
    try:
        outer = json.loads(entry)
        if not isinstance(outer, dict) or outer.get("payloadType") != PAYLOAD_TYPE:
            return None
        value = json.loads(base64.b64decode(outer.get("payload", ""), validate=True))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _summary(fields: dict[str, Any]) -> str | None:
    parts = []
    for name in SUMMARY_FIELDS:
        value = fields.get(name)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = " ".join(value)
        if isinstance(value, str | int | float):
            parts.append(f"{name} {str(value)[:VALUE_LIMIT]}")
    return ", ".join(parts) or None


def _signed(entry: bytes, keys: Sequence[ec.EllipticCurvePublicKey]) -> bool | None:
    if not keys:
        return None
    try:
        verify_statement(entry, keys)
    except VerificationError:
        return False
    return True
