"""Waivers: runs that somebody let off, by name, until a day, with two people's signatures (spec/case.md, 7).

    data = propose("speed-*", since=…, until=…, reason="…", name="mara", key=key)       # a file to hand on
    data = approve(data, name="joel", key=other)                                        # by a second person
    waiver = read_waiver(predicate, leaf=812); waiver.covers("speed-3", began)

A waiver lets nothing through: it only says that somebody agreed, and that the run is therefore at best UNKNOWN. A proof
of tampering in a waived run stays TAINTED. One whose signatures do not hold counts all the same, and says so, because
an exemption that nobody granted is no better than one that two people did.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
from collections.abc import Collection
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import canonical_json
from trainguard.envelope import key_id
from trainguard.errors import MalformedEvidence, Misuse, VerificationError

SCHEMA = "trainguard/waiver/v1"
PREDICATE = "waiver/v1"
LIMIT_BYTES = 16 << 10
TEXT_LIMIT = 500
LONGEST_SECONDS = 366 * 86400
_ECDSA = ec.ECDSA(hashes.SHA256())


class Approval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One person's signature over the terms."""

    name: str
    key: str
    """SubjectPublicKeyInfo, DER, base64."""
    signature: str


class Waiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Terms and who agreed to them."""

    schema: str = SCHEMA
    runs: str
    """Run names, with `*` and `?`."""
    since: int
    """Runs that began from here on, seconds since the epoch."""
    until: int
    """And before this."""
    reason: str
    approvals: tuple[Approval, ...] = ()

    @property
    def terms(self) -> bytes:
        """What is signed."""
        return b"trainguard/waiver/v1\0" + canonical_json([self.runs, self.since, self.until, self.reason])

    def covers(self, run: str, began: int) -> bool:
        """Whether a run of that name that began then was let off."""
        return self.since <= began < self.until and fnmatch.fnmatchcase(run, self.runs)

    def approved(self, approvers: Collection[str] = ()) -> tuple[str, ...]:
        """Names of the two who agreed. approvers: ids of the keys that count; any where none are named.

        Raises VerificationError where fewer than two different keys signed, or a signature does not hold.
        """
        keys = {}
        for one in self.approvals:
            key = _key(one.key)
            try:
                key.verify(base64.b64decode(one.signature, validate=True), self.terms, _ECDSA)
            except (InvalidSignature, ValueError, binascii.Error):
                raise VerificationError(f"waiver of {self.runs}: the signature of {one.name!r} does not hold") from None
            if approvers and key_id(key) not in approvers:
                raise VerificationError(f"waiver of {self.runs}: {one.name!r} is none of this site's approvers")
            keys[key_id(key)] = one.name
        if len(keys) < 2:
            raise VerificationError(f"waiver of {self.runs}: expected two people, found {len(keys)}")
        return tuple(keys.values())


def propose(runs: str, *, since: int, until: int, reason: str, name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A waiver with its first signature, to hand on. Raises Misuse for terms that cannot be meant."""
    reason = " ".join(reason.split())
    if not runs or len(runs) > 100 or not runs.isprintable() or not runs.strip("*?"):
        raise Misuse(f"waiver: expected the name of runs, with * and ? at most in part, found {runs[:60]!r}")
    if not 0 < until - since <= LONGEST_SECONDS:
        raise Misuse("waiver: expected an end in the future, at most a year away")
    if not reason or len(reason) > TEXT_LIMIT or not reason.isprintable():
        raise Misuse(f"waiver: expected a reason of at most {TEXT_LIMIT} printable characters")
    return _signed(Waiver(runs=runs, since=since, until=until, reason=reason), name, key)


def approve(data: bytes, *, name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The waiver in `data` with a second signature. Raises Misuse where the same person signed already."""
    waiver = parse_waiver(data)
    mine = key_id(key.public_key())
    if any(key_id(_key(one.key)) == mine for one in waiver.approvals):
        raise Misuse(f"waiver of {waiver.runs}: {name} signed it already: a second person must")
    if len(waiver.approvals) != 1:
        raise Misuse(f"waiver of {waiver.runs}: expected one signature before this one, found {len(waiver.approvals)}")
    return _signed(waiver, name, key)


def parse_waiver(data: bytes, *, where: str = "waiver") -> Waiver:
    """The waiver in JSON bytes. Raises MalformedEvidence; whether it was approved is `Waiver.approved`."""
    if len(data) > LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: more than {LIMIT_BYTES} bytes, the limit")
    try:
        waiver = msgspec.json.decode(data, type=Waiver)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not a waiver: {error}") from error
    if waiver.schema != SCHEMA or len(waiver.approvals) > 2:
        raise MalformedEvidence(f"{where}: expected {SCHEMA} with at most two approvals")
    return waiver


def to_waiver(predicate: Any) -> Waiver | None:
    """The waiver that a `waiver/v1` statement holds; None for one that is none."""
    try:
        return msgspec.convert(predicate, Waiver)
    except msgspec.ValidationError:
        return None


def _signed(waiver: Waiver, name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    approval = Approval(
        name=name,
        key=base64.b64encode(der).decode(),
        signature=base64.b64encode(key.sign(waiver.terms, _ECDSA)).decode(),
    )
    return msgspec.json.encode(msgspec.structs.replace(waiver, approvals=(*waiver.approvals, approval)))


def _key(text: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_der_public_key(base64.b64decode(text, validate=True))
    except (ValueError, TypeError, binascii.Error) as error:
        raise MalformedEvidence(f"waiver: expected an ECDSA P-256 key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise MalformedEvidence("waiver: expected an ECDSA P-256 key, found another kind")
    return key
