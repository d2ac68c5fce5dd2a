"""Who may sign, and when: the trust file of `trainguard verify --signers` (spec/seal.md, "Trust file").

    signers = load_signers(Path("signers.toml"))
    signer = signers.find(bundle.hint)                  # None: a key nobody named
    verdict = judge(signer, When(existed_by=…, said=…))  # None, or what is wrong with it

A key is good from `not_before` until `not_after`, and until `revoked`. What counts is when the seal was made, not when
it is read; so the judgement takes what is known of that: a time by which it certainly existed (a witness's cosignature,
or now), what the log says (the sealing host's clock), and a time before which it cannot have been logged. A seal is
refused where any of them shows it was made outside the key's time, and left undecided where only the word of whoever
held the key says that it was made inside: a stolen key says whatever it is made to.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.log.note import check_name, decode_base64, parse_note
from trainguard.seal.bundle import fingerprint

SCHEMA = "trainguard/signers/v1"
LIMIT_BYTES = 1 << 20
SIGNERS_LIMIT = 1000
COSIGNATURE = b"\x04"
"""Signature type of C2SP tlog-cosignature v1: Ed25519 with a time."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_SIGNER_KEYS = {"name", "key", "not_before", "not_after", "revoked", "reason"}
_FIRST_SECOND, _LAST_SECOND = 0, 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """A key that may seal, and its time. Times are seconds since the epoch."""

    name: str
    key: ec.EllipticCurvePublicKey
    fingerprint: str
    """SHA-256 of its PEM, hex: what a bundle's hint says."""
    not_before: float | None = None
    """First moment at which it was valid."""
    not_after: float | None = None
    """Last moment at which it was valid."""
    revoked: float | None = None
    """Since when nothing it signs is to be believed."""
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """Whose cosignature on a tree head says when that head had been seen (C2SP tlog-cosignature v1)."""

    name: str
    public_key: bytes
    """32 bytes, Ed25519."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signers:
    """A trust file."""

    where: str
    signers: tuple[Signer, ...]
    witnesses: tuple[Witness, ...] = ()

    def find(self, hint: str) -> Signer | None:
        """The signer whose key has that fingerprint."""
        return next((signer for signer in self.signers if signer.fingerprint == hint), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """What is known of the moment a seal was made, in seconds since the epoch."""

    existed_by: float
    """It was there then: the earliest trusted cosignature over it, or the moment of asking."""
    witnessed: bool = False
    """Whether a witness says so, and not merely our own clock of now."""
    said: float | None = None
    """What its entry in our log says: the sealing host's clock. None where we have no log with it."""
    not_earlier: float | None = None
    """The newest time that entries before it in that log say: it was logged after them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """Why a signer's seal is not to be believed."""

    outcome: Literal["violated", "not_checked"]
    message: str
    expected: str
    found: str


# -- judging ----------------------------------------------------------------------------------------------------------


def judge(signer: Signer, when: When) -> Doubt | None:
    """None where the seal was made while `signer` was good; else the first doubt, revocation before time."""
    return _revoked(signer, when) or _expired(signer, when) or _too_early(signer, when)


def _revoked(signer: Signer, when: When) -> Doubt | None:
    at = signer.revoked
    if at is None or when.existed_by < at:
        return None
    why = f" ({signer.reason})" if signer.reason else ""
    expected = f"sealed before {shown(at)}, by a witness's word"
    if _after(when, at, inclusive=True):
        message = f"sealed after the key {signer.name!r} was revoked{why}"
        return Doubt(outcome="violated", message=message, expected=expected, found=_found(when))
    message = f"the key {signer.name!r} is revoked{why}, and no witness says that it sealed this before"
    return Doubt(outcome="not_checked", message=message, expected=expected, found=_found(when))


def _expired(signer: Signer, when: When) -> Doubt | None:
    at = signer.not_after
    if at is None or when.existed_by <= at:
        return None
    expected = f"sealed by {shown(at)}"
    if _after(when, at, inclusive=False):
        message = f"sealed after the key {signer.name!r} had expired"
        return Doubt(outcome="violated", message=message, expected=expected, found=_found(when))
    if when.said is not None:
        return None
    message = f"the key {signer.name!r} has expired, and when it sealed this is not known"
    return Doubt(outcome="not_checked", message=message, expected=expected, found=_found(when))


def _too_early(signer: Signer, when: When) -> Doubt | None:
    at = signer.not_before
    if at is None or (when.existed_by >= at and (when.said is None or when.said >= at)):
        return None
    message = f"sealed before the key {signer.name!r} was valid"
    return Doubt(outcome="violated", message=message, expected=f"sealed from {shown(at)} on", found=_found(when))


def _after(when: When, at: float, *, inclusive: bool) -> bool:
    """Whether any time that is known lies behind `at`."""
    times = [time for time in (when.said, when.not_earlier) if time is not None]
    return any(time > at or (inclusive and time == at) for time in times)


def _found(when: When) -> str:
    if when.witnessed:
        return f"seen by a witness at {shown(when.existed_by)}"
    if when.said is not None:
        return f"sealed at {shown(when.said)} by its log entry"
    return f"no time but that of asking, {shown(when.existed_by)}"


def shown(seconds: float) -> str:
    """`2026-11-23T01:02:03Z`."""
    clipped = min(max(seconds, 0), 253_402_300_799)
    return datetime.fromtimestamp(clipped, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def witnessed_at(note: str, witnesses: Iterable[Witness]) -> int | None:
    """The earliest time any of `witnesses` cosigned the tree head `note`; None where none did.

    A line: key id, 8 bytes of seconds since the epoch, 64 bytes of Ed25519 over `cosignature/v1`, time and head.
    """
    known = {(witness.name, _key_id(witness)): witness for witness in witnesses}
    parsed = parse_note(note.encode(), where="tree head")
    times = [
        time
        for line in parsed.signatures
        if (witness := known.get((line.name, line.key_id))) is not None
        and (time := _cosigned(witness, line.value, parsed.text)) is not None
    ]
    return min(times, default=None)


def _cosigned(witness: Witness, value: bytes, text: str) -> int | None:
    if len(value) != 72:
        return None
    time = int.from_bytes(value[:8], "big")
    if not _FIRST_SECOND < time < _LAST_SECOND:
        return None
    try:
        message = f"cosignature/v1\ntime {time}\n{text}".encode()
        Ed25519PublicKey.from_public_bytes(witness.public_key).verify(value[8:], message)
    except InvalidSignature:
        return None
    return time


def _key_id(witness: Witness) -> int:
    data = witness.name.encode() + b"\n" + COSIGNATURE + witness.public_key
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big")


# -- reading ----------------------------------------------------------------------------------------------------------


def load_signers(path: Path) -> Signers:
    """The trust file at `path`. Raises Unavailable where it cannot be read, MalformedEvidence where it is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise Unavailable(f"{path}: trust file cannot be opened: {why}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unavailable(f"{path}: expected a trust file, found something that is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path}: trust file cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return parse_signers(data, where=str(path))


def parse_signers(data: bytes, *, where: str) -> Signers:
    """The trust file in TOML bytes; raises MalformedEvidence naming `where` for anything the format forbids."""
    if len(data) > LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: over {LIMIT_BYTES} bytes, the limit of a trust file")
    try:
        value = tomllib.loads(data.decode("utf-8"))
        _only(value, {"schema", "signer", "witness"}, "trust file")
        if value.get("schema") != SCHEMA:
            _refuse(f'expected schema = "{SCHEMA}", found {str(value.get("schema"))[:80]!r}')
        signers = tuple(_signer(item) for item in _tables(value, "signer"))
        witnesses = tuple(_witness(item) for item in _tables(value, "witness"))
        if not signers:
            _refuse("no [[signer]]")
        _unique([signer.name for signer in signers], "name")
        _unique([signer.fingerprint for signer in signers], "key")
        _unique([witness.name for witness in witnesses], "witness")
    except (ValueError, TypeError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not a trust file: {str(error)[:300]}") from error
    return Signers(where=where, signers=signers, witnesses=witnesses)


def _tables(value: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    tables = value.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(item, dict) for item in tables):
        _refuse(f"expected [[{name}]] tables")
    if len(tables) > SIGNERS_LIMIT:
        _refuse(f"{len(tables)} [[{name}]] tables, limit {SIGNERS_LIMIT}")
    return tables


def _signer(value: dict[str, Any]) -> Signer:
    name = value.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(f"signer name {str(name)[:80]!r}: expected letters, digits or . _ @ -, at most 100")
    _only(value, _SIGNER_KEYS, f"signer {name!r}")
    reason = value.get("reason")
    if reason is not None and (not isinstance(reason, str) or len(reason) > 200 or not reason.isprintable()):
        _refuse(f"signer {name!r}: expected a reason of at most 200 printable characters")
    if reason is not None and "revoked" not in value:
        _refuse(f"signer {name!r}: a reason without revoked")
    key = _public_key(value.get("key"), name)
    first, last = _time(value, "not_before", name), _time(value, "not_after", name)
    if first is not None and last is not None and first > last:
        _refuse(f"signer {name!r}: not_after lies before not_before")
    return Signer(
        name=name,
        key=key,
        fingerprint=fingerprint(key),
        not_before=first,
        not_after=last,
        revoked=_time(value, "revoked", name),
        reason=reason,
    )


def _public_key(text: Any, name: str) -> ec.EllipticCurvePublicKey:
    if not isinstance(text, str) or not text.isascii():
        _refuse(f"signer {name!r}: expected key to be a public key in PEM")
    try:
        key = serialization.load_pem_public_key(text.strip().encode() + b"\n")
    except ValueError as error:
        raise ValueError(f"signer {name!r}: expected key to be a public key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        _refuse(f"signer {name!r}: expected an ECDSA P-256 key, found another kind")
    return key


def _time(value: Mapping[str, Any], field: str, name: str) -> float | None:
    time = value.get(field)
    if time is None:
        return None
    if not isinstance(time, datetime) or time.tzinfo is None:
        _refuse(f"signer {name!r}: expected {field} as a time with its zone, such as 2026-11-23T00:00:00Z")
    return time.timestamp()


def _witness(value: dict[str, Any]) -> Witness:
    """`vkey = "<name>+<8 hex>+<base64(0x04 || public key)>"`."""
    _only(value, {"vkey"}, "witness")
    text = value.get("vkey")
    parts = text.split("+", 2) if isinstance(text, str) and len(text) < 400 else []
    if len(parts) != 3:
        _refuse(f"witness: expected vkey '<name>+<8 hex>+<base64>', found {str(text)[:80]!r}")
    try:
        check_name(parts[0], where="witness")
        data = decode_base64(parts[2], where="witness")
    except MalformedEvidence as error:
        raise ValueError(str(error)) from error
    if data[:1] != COSIGNATURE or len(data) != 33:
        _refuse(f"witness {parts[0]!r}: expected a cosignature key (type 04), found type {data[:1].hex() or 'none'}")
    witness = Witness(name=parts[0], public_key=data[1:])
    if f"{_key_id(witness):08x}" != parts[1]:
        _refuse(f"witness {parts[0]!r}: expected key id {_key_id(witness):08x}, found {parts[1][:20]!r}")
    return witness


def _only(value: Mapping[str, Any], allowed: set[str], what: str) -> None:
    if extra := sorted(set(value) - allowed):
        _refuse(f"{what}: {extra[0][:80]!r} is none of {', '.join(sorted(allowed))}")


def _unique(values: list[str], what: str) -> None:
    if len(set(values)) != len(values):
        twice = next(value for value in values if values.count(value) > 1)
        _refuse(f"{what} {twice[:80]!r} stands twice")


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
