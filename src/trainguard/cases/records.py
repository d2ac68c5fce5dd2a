"""What can be written in a case: one signed record an act, the kinds in a literal table (spec/case.md, 3).

A record is a DSSE statement `case-record/v1`, signed by its author; `payload_of` opens one before its author is known,
`verify_record` checks that a stated card signed it. Bodies are strict: an unknown kind or field is refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.cases.identity import Card
from trainguard.digest import canonical_json, sha256_hex
from trainguard.envelope import (
    ENVELOPE_LIMIT_BYTES,
    PREDICATE_BASE,
    sign_statement,
    statement,
    verify_statement,
)
from trainguard.errors import MalformedEvidence, Misuse

PREDICATE = "case-record/v1"
CONTENT_LIMIT_BYTES = 64 << 20
NO_RECORD = "0" * 64
TEXT_LIMIT = 2000
"""Characters of a reason."""

Role = Literal["lead", "investigator", "reader"]
Posture = Literal["covert", "overt"]
Stage = Literal["proposed", "open", "contained", "eradicated", "recovered", "closed"]
Severity = Literal["critical", "high", "medium", "low"]
Side = Literal["for", "against"]
Worth = Literal["open", "supported", "refuted", "dropped"]
"""What is thought of a hypothesis; nothing here is ever proved by a vote."""
CITE = re.compile(r"inc-[0-9a-f]{10}|leaf:[0-9]{1,12}|record:[0-9]{1,9}")
"""What a line of reasoning can rest on: an incident, an entry of the log, a record of the case."""
CITES = 16

MOVES: dict[Stage, tuple[Stage, ...]] = {
    "proposed": ("open",),
    "open": ("contained",),
    "contained": ("eradicated", "open"),
    "eradicated": ("recovered", "open"),
    "recovered": ("open", "closed"),
    "closed": ("open",),
}
"""Stage → where it may go. `proposed → open` is the second signature; closing takes two people as well."""


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every kind shares: strictness."""


class Subject(_Body, frozen=True, kw_only=True):
    """Somebody, as the evidence names them: never a person, always what they acted as."""

    kind: Literal["account", "author", "key"]
    value: str
    """Account name or `uid N`; mail address or name of a git author; id of a key."""
    why: str
    firm: bool
    """False where an attacker could have written it (git authors, an account used from another's session), or where it
    may be a victim (who owns the run): two people may lift such an exclusion, never a firm one."""

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.value}"


class IncidentRef(_Body, frozen=True, kw_only=True):
    """One incident as it was taken in."""

    id: str
    run: str
    severity: str
    sha256: str
    """Of its JSON, the bytes taken in."""


class Grant(_Body, frozen=True, kw_only=True):
    """Membership for one person."""

    card: Card
    role: Role
    reason: str
    until: int
    """Seconds since the epoch."""
    lifts: tuple[str, ...] = ()
    """Subjects (`kind:value`) that do not exclude this person, by decision of the two who sign."""


class Open(_Body, frozen=True, kw_only=True):
    code: str
    reason: str
    posture: Posture
    proposer: Grant
    second: Grant
    members: tuple[Grant, ...] = ()
    incidents: tuple[IncidentRef, ...]
    subjects: tuple[Subject, ...] = ()


class Add(_Body, frozen=True, kw_only=True):
    incidents: tuple[IncidentRef, ...]
    subjects: tuple[Subject, ...] = ()


class Remove(_Body, frozen=True, kw_only=True):
    key: str
    reason: str


class Sign(_Body, frozen=True, kw_only=True):
    act: int
    hash: str
    """SHA-256 of the act's envelope: a signature is over what was read."""
    mute: str = ""
    """For a mute: the second signature over it (veil.py)."""


class Refused(_Body, frozen=True, kw_only=True):
    what: str
    why: str


class Read(_Body, frozen=True, kw_only=True):
    what: str


class Note(_Body, frozen=True, kw_only=True):
    """A text for each reader; its content holds one sealed copy a member (canary.py)."""

    readers: tuple[str, ...]


class Hypothesis(_Body, frozen=True, kw_only=True):
    """What somebody holds possible; its record's number is its name."""

    text: str


class Weigh(_Body, frozen=True, kw_only=True):
    """What speaks for or against a hypothesis."""

    hypothesis: int
    side: Side
    text: str
    cites: tuple[str, ...] = ()


class Settle(_Body, frozen=True, kw_only=True):
    """How a hypothesis stands now, and why."""

    hypothesis: int
    worth: Worth
    reason: str


class Move(_Body, frozen=True, kw_only=True):
    stage: Stage
    severity: Severity
    reason: str


class Reason(_Body, frozen=True, kw_only=True):
    reason: str


class Turn(_Body, frozen=True, kw_only=True):
    posture: Posture
    reason: str


class Mute(_Body, frozen=True, kw_only=True):
    scope: Literal["run", "path"]
    value: str
    since: int
    until: int
    reason: str
    signature: str
    """Proposer's signature over the mute itself, base64 (veil.py)."""


class Exported(_Body, frozen=True, kw_only=True):
    act: int
    sha256: str
    bytes: int


class Epoch(_Body, frozen=True, kw_only=True):
    """The room has a new key. Holders of it can open what was written before; holders of the old one nothing after."""

    previous: str
    """Key before, hex."""
    first: int
    """Number of the first record under that one."""
    holders: tuple[str, ...]


BODIES: dict[str, type[_Body]] = {
    "open": Open,
    "sign": Sign,
    "grant": Grant,
    "remove": Remove,
    "leave": Reason,
    "add": Add,
    "read": Read,
    "note": Note,
    "hypothesis": Hypothesis,
    "weigh": Weigh,
    "settle": Settle,
    "move": Move,
    "close": Move,
    "turn": Turn,
    "hold": Reason,
    "release": Reason,
    "mute": Mute,
    "export": Reason,
    "exported": Exported,
    "purge": Reason,
    "refused": Refused,
    "epoch": Epoch,
}
TWO_PERSON = frozenset({"open", "grant", "remove", "turn", "close", "release", "mute", "export", "purge"})
"""Kinds that have no effect until a second lead signs them."""
NEEDS: dict[str, Role] = {
    **dict.fromkeys(("read", "leave", "refused", "epoch"), "reader"),
    **dict.fromkeys(("note", "add", "move", "hold", "hypothesis", "weigh", "settle"), "investigator"),
    **dict.fromkeys((*TWO_PERSON, "sign", "exported"), "lead"),
}
"""Kind → the least role that may write it."""
ROLES: tuple[Role, ...] = ("reader", "investigator", "lead")


class Content(_Body, frozen=True, kw_only=True):
    """A file that belongs to a record and can be deleted apart from it."""

    file: str
    key: str
    sha256: str
    """Of what it opens to."""


class Record(_Body, frozen=True, kw_only=True):
    """One record as it was signed."""

    case: str
    n: int
    previous: str
    """SHA-256 of the entry of record n - 1."""
    at: str
    """Clock of the writing host, nanoseconds since the epoch, decimal."""
    kind: str
    body: dict[str, Any]
    content: Content | None = None

    @property
    def said(self) -> Any:
        """The body as its kind's type. Raises MalformedEvidence."""
        kind = BODIES.get(self.kind)
        if kind is None:
            raise MalformedEvidence(f"record {self.n}: no kind of that name: {self.kind[:40]!r}")
        try:
            return msgspec.convert(self.body, kind)
        except msgspec.ValidationError as error:
            raise MalformedEvidence(f"record {self.n}: not a {self.kind}: {error}") from error

    @property
    def time_ns(self) -> int:
        return int(self.at) if self.at.isdigit() and len(self.at) < 25 else 0


def sign_record(record: Record, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The envelope of a record. Raises Misuse where it would not fit."""
    subject = [{"name": f"cases/{record.case}/{record.n}", "digest": {"sha256": record.previous}}]
    envelope = sign_statement(statement(PREDICATE, msgspec.to_builtins(record), subject), key)
    if len(envelope) > ENVELOPE_LIMIT_BYTES:
        raise Misuse(f"case: a {record.kind} of {len(envelope)} bytes, limit {ENVELOPE_LIMIT_BYTES}")
    return envelope


def parse_record(envelope: bytes, *, where: str) -> tuple[Record, str]:
    """The record in `envelope` and the id of the key that claims to have signed it, not yet believed."""
    value = payload_of(envelope, where)
    if value.get("predicateType") != PREDICATE_BASE + PREDICATE:
        raise MalformedEvidence(f"{where}: expected a {PREDICATE}, found a statement of another type")
    try:
        record = msgspec.convert(value.get("predicate"), Record)
    except msgspec.ValidationError as error:
        raise MalformedEvidence(f"{where}: not a record: {error}") from error
    keyid = json.loads(envelope)["signatures"][0].get("keyid")
    if not record.time_ns or not isinstance(keyid, str):
        raise MalformedEvidence(f"{where}: expected a time and a key id, found {record.at[:30]!r}")
    return record, keyid


def verify_record(envelope: bytes, card: Card, *, where: str) -> None:
    """Raises VerificationError unless `card` signed it."""
    verify_statement(envelope, [card.public], where=where)


def payload_of(envelope: bytes, where: str) -> dict[str, Any]:
    """The statement in a DSSE envelope, whoever signed it. Raises MalformedEvidence."""
    if len(envelope) > ENVELOPE_LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: {len(envelope)} bytes, limit {ENVELOPE_LIMIT_BYTES}")
    try:
        outer = json.loads(envelope)
        value = json.loads(base64.b64decode(outer["payload"], validate=True))
        (_only,) = outer["signatures"]
    except (ValueError, TypeError, KeyError, binascii.Error, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not a DSSE envelope with one signature: {error}") from error
    if not isinstance(value, dict) or not isinstance(_only, dict):
        raise MalformedEvidence(f"{where}: expected a signed statement")
    return value


def pack(value: Any) -> bytes:
    """Content as it is stored: canonical JSON, compressed."""
    return zlib.compress(canonical_json(msgspec.to_builtins(value)), 6)


def unpack(data: bytes, *, where: str) -> Any:
    """The inverse of `pack`. Raises MalformedEvidence for what is none, or unfolds to more than 64 MiB."""
    machine = zlib.decompressobj()
    try:
        raw = machine.decompress(data, CONTENT_LIMIT_BYTES)
        if machine.unconsumed_tail:
            raise MalformedEvidence(f"{where}: unfolds to more than {CONTENT_LIMIT_BYTES} bytes")
        return json.loads(raw)
    except (zlib.error, ValueError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not the content of a record: {error}") from error


def reference(incident: dict[str, Any]) -> IncidentRef:
    """What a record says of an incident taken in (its JSON form)."""
    return IncidentRef(
        id=incident["id"],
        run=incident["run"],
        severity=incident["severity"],
        sha256=sha256_hex(canonical_json(incident)),
    )


def check_cites(cites: Sequence[str]) -> tuple[str, ...]:
    """What a line of reasoning rests on, each once. Raises Misuse for what is none of CITE's forms."""
    wrong = next((cite for cite in cites if CITE.fullmatch(cite) is None), None)
    if wrong is not None or len(cites) > CITES:
        found = f"found {wrong[:60]!r}" if wrong is not None else f"found {len(cites)}"
        raise Misuse(f"case: expected at most {CITES} of inc-…, leaf:N or record:N to cite, {found}")
    return tuple(dict.fromkeys(cites))


def check_reason(text: str) -> str:
    """A reason somebody gave: said, printable and short. Raises Misuse."""
    text = " ".join(text.split())
    if not text:
        raise Misuse("case: expected a reason, found none", next_step="say why with --reason")
    if len(text) > TEXT_LIMIT or not text.isprintable():
        raise Misuse(f"case: expected a reason of at most {TEXT_LIMIT} printable characters")
    return text


def distinct(cards: Sequence[Card]) -> bool:
    """Whether no two are one person: neither the key that signs nor the one that opens is shared."""
    return len({card.key for card in cards}) == len({card.sealing for card in cards}) == len(cards)
