"""Mutes: what ordinary lists do not show while a case is covert, and what they say instead (spec/case.md, 6).

    veil = read_veil(lambda: leaves.sealed)
    veil.hides("run", "job-7"), veil.hides("path", "/shared/train.py")

A mute is an opaque entry of the log, found only by who asks for that very run or file. It counts when two different
approvers signed it and it has not run out. Approvers are named on the machine that shows things, outside the state
folder (TRAINGUARD_APPROVERS, else /etc/trainguard/approvers): where none are named nothing is ever hidden, so writing
to the log cannot hide anything. What is hidden is never green: it reads UNKNOWN, with MAINTENANCE for a reason.

This keeps ordinary lists quiet. It does not keep a secret from somebody who can read the records and judge them anew.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard import opaque
from trainguard.envelope import key_id, verify_statement
from trainguard.errors import MalformedEvidence, Misuse, TrainguardError, Unavailable, VerificationError

Scope = Literal["run", "path"]
MAINTENANCE = "under maintenance check"
"""All that is said of what is hidden: words that are true of every check and tell nothing of this one."""
VALUE_LIMIT = 300
CARD_LIMIT_BYTES = 16 << 10
RENEWALS = 1000
_ECDSA = ec.ECDSA(hashes.SHA256())


class Muted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One mute as it stands in the log, with the signatures of two approvers."""

    scope: Scope
    value: str
    since: int
    """When it was proposed, seconds since the epoch; of several for the same thing the last one decides."""
    until: int
    """End; where it is not after `since`, it ends one that was there."""
    keys: tuple[str, str]
    signatures: tuple[str, str]
    """Over `statement_of`, base64, in the order of the keys."""


def statement_of(scope: str, value: str, since: int, until: int) -> bytes:
    """What the two sign."""
    return b"trainguard/veil/v1\0%s\0%s\0%d\0%d" % (scope.encode(), value.encode(), since, until)


def sign_mute(scope: str, value: str, since: int, until: int, key: ec.EllipticCurvePrivateKey) -> str:
    """One person's signature. Raises Misuse for what cannot be muted."""
    if scope not in ("run", "path") or not 0 < len(value) <= VALUE_LIMIT or not value.isprintable():
        raise Misuse(f"mute: expected a run or a path of at most {VALUE_LIMIT} printable characters")
    return base64.b64encode(key.sign(statement_of(scope, value, since, until), _ECDSA)).decode()


def key_of(scope: str, value: str) -> bytes:
    """What marks and seals mutes of this run or file: drawn from its name, so that who asks for it finds them."""
    return hmac.digest(b"trainguard/veil/v1", f"{scope}\0{value}".encode(), "sha256")


def seal_mute(muted: Muted, index: Container[bytes]) -> bytes:
    """The entry of a mute. index: the tags of the log's sealed entries."""
    key = key_of(muted.scope, muted.value)
    number = next(n for n in range(RENEWALS) if opaque.mark(key, n) not in index)
    data = msgspec.json.encode(muted)
    if len(data) > opaque.PLAIN_BYTES - 2:
        raise Misuse(f"mute: {len(data)} bytes, limit {opaque.PLAIN_BYTES - 2}")
    return opaque.seal((len(data).to_bytes(2, "big") + data).ljust(opaque.PLAIN_BYTES, b"\0"), key, number)


@dataclass(frozen=True, slots=True)
class Veil:
    """What is hidden now, by whom it may be hidden."""

    index: Mapping[bytes, Sequence[bytes]]
    approvers: Mapping[str, ec.EllipticCurvePublicKey]
    clock: Callable[[], float] = time.time

    def hides(self, scope: Scope, value: str) -> bool:
        """Whether a mute that holds covers this run or file."""
        if len(self.approvers) < 2:
            return False
        key, last = key_of(scope, value), (0, 0)
        for n in range(RENEWALS):
            entries = self.index.get(opaque.mark(key, n))
            if not entries:
                break
            last = max(last, *(self._span(entry, key, scope, value) for entry in entries))
        return last[1] > self.clock()

    def hides_path(self, place: str | None) -> bool:
        """The same for `file:line` or a file, as findings write it."""
        if not place:
            return False
        name, _, line = place.rpartition(":")
        return self.hides("path", name if name and line.isdigit() else place)

    def _span(self, entry: bytes, key: bytes, scope: str, value: str) -> tuple[int, int]:
        """Since when and until when the entry says so; zeros for one that two approvers did not sign."""
        try:
            plain = opaque.unseal(entry, key, where="mute")
            muted = msgspec.json.decode(plain[2 : 2 + int.from_bytes(plain[:2], "big")], type=Muted)
        except (VerificationError, msgspec.DecodeError, UnicodeDecodeError):
            return 0, 0
        if (muted.scope, muted.value) != (scope, value) or len(set(muted.keys)) != 2:
            return 0, 0
        said = statement_of(scope, value, muted.since, muted.until)
        pairs = zip(muted.keys, muted.signatures, strict=True)
        holds = all(_signed(self.approvers.get(one), signature, said) for one, signature in pairs)
        return (muted.since, muted.until) if holds else (0, 0)


NO_VEIL = Veil({}, {})


def read_veil(index: Callable[[], Mapping[bytes, Sequence[bytes]]]) -> Veil:
    """The veil of a log by this machine's approvers. index: gives its sealed entries by tag; asked only with approvers.

    Where cards or log cannot be read nothing is hidden: showing too much is the safe side.
    """
    try:
        approvers = approver_keys()
        return Veil(index(), approvers) if len(approvers) > 1 else NO_VEIL
    except TrainguardError:
        return NO_VEIL


def approvers_folder() -> Path:
    """TRAINGUARD_APPROVERS if set, else /etc/trainguard/approvers: never in the state folder."""
    return Path(os.environ.get("TRAINGUARD_APPROVERS") or "/etc/trainguard/approvers")


def approver_keys(folder: Path | None = None) -> dict[str, ec.EllipticCurvePublicKey]:
    """Keys on the cards (`*.card`) of this machine's approvers, by id; none where the folder is not there.

    Raises Unavailable or VerificationError for a card that cannot be read or does not hold.
    """
    folder = folder if folder is not None else approvers_folder()
    if not folder.is_dir():
        return {}
    return dict(_card_key(path) for path in sorted(folder.iterdir()) if path.suffix == ".card")


def _card_key(path: Path) -> tuple[str, ec.EllipticCurvePublicKey]:
    try:
        with path.open("rb") as file:
            data = file.read(CARD_LIMIT_BYTES)
    except OSError as error:
        raise Unavailable(f"{path}: card cannot be read: {error.strerror}") from error
    try:
        predicate = json.loads(base64.b64decode(json.loads(data)["payload"], validate=True))["predicate"]
        key = serialization.load_der_public_key(base64.b64decode(predicate["signing"], validate=True))
    except (ValueError, TypeError, KeyError, binascii.Error, RecursionError) as error:
        raise MalformedEvidence(f"{path}: not a card: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise MalformedEvidence(f"{path}: expected a card with an ECDSA P-256 key, found another kind")
    verify_statement(data, [key], where=str(path))
    return key_id(key), key


def _signed(key: ec.EllipticCurvePublicKey | None, signature: str, data: bytes) -> bool:
    try:
        if key is not None:
            key.verify(base64.b64decode(signature, validate=True), data, _ECDSA)
    except (InvalidSignature, ValueError, binascii.Error, TrainguardError):
        return False
    return key is not None
