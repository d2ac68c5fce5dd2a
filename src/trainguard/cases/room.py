"""Reading rooms out of the log: find what is sealed to a key, open it, check it, fold it.

   for room in read_rooms(home, identity): room.state, room.seen, room.broken

1. Every entry that is read is checked against the signed tree head (LogReader).
2. Entries of the sealed shape that open with the identity's key are deliveries: a room's key from one record on. Which
   these are is remembered, with the root of the log they were found in (scan.py).
3. From a delivery the room's records are found by their tags, backwards by the keys that `epoch` records hand on.
4. Each record must follow from the one before, be signed by who was a member then, and be one they could write.
5. A key counts only if a member of that moment signed its delivery; entries by others are named as strange and ignored.
   So does the word that the room ends here: who was removed cannot read the record that says so.
6. A record whose bytes are gone or altered breaks the room: it shows nothing until they are restored.
7. The room must not be shorter than this identity has seen it (`Memory`).
"""

from __future__ import annotations

import base64
import binascii
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard import opaque
from trainguard.cases import sealed
from trainguard.cases.identity import Card, Identity
from trainguard.cases.records import NO_RECORD, Epoch, Open, Record, parse_record, verify_record
from trainguard.cases.scan import Marked, Scan
from trainguard.cases.sealed import Delivery
from trainguard.cases.state import Invalid, State
from trainguard.digest import sha256_hex, write_durably
from trainguard.errors import MalformedEvidence, TrainguardError, VerificationError
from trainguard.home import Home
from trainguard.log import LogReader

RECORDS = 100_000
"""Records one room is read for, at most."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One record that holds."""

    record: Record
    author: str
    """Id of the key that signed it."""
    envelope: bytes
    leaf: int
    entry: str
    """SHA-256 of its log entry."""


@dataclass(slots=True)
class Room:
    """A case as one member's key opens it."""

    id: str
    state: State
    key: bytes = b""
    """The room's present key."""
    first: int = 0
    """Number of the first record under it."""
    seen: list[Seen] = field(default_factory=list)
    keys: dict[int, bytes] = field(default_factory=dict)
    """Number of a record → the key it was written under."""
    strange: list[str] = field(default_factory=list)
    """Entries that bear the room's mark and could not be written by who wrote them."""
    broken: VerificationError | None = None
    ended: bool = False
    """Whether a member said that it ends here for this reader."""

    @property
    def name(self) -> str:
        return self.state.code or self.id[:16]

    @property
    def last_entry(self) -> str:
        return self.seen[-1].entry if self.seen else NO_RECORD


class Memory:
    """How far this identity has seen each room: one file beside it, so that a shortened log shows."""

    def __init__(self, identity: Identity) -> None:
        self._path = identity.path.with_name(identity.path.name + ".seen") if identity.path is not None else None
        self._held = self._read()

    def _read(self) -> dict[str, tuple[int, str]]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, tuple[int, str]])
        except (OSError, msgspec.DecodeError) as error:
            raise MalformedEvidence(f"{self._path}: what was seen before cannot be read: {error}") from error

    def check(self, room: Room) -> None:
        """Raises VerificationError where the room is not at least what was seen."""
        count, entry = self._held.get(room.id, (0, NO_RECORD))
        if count and (len(room.seen) < count or room.seen[count - 1].entry != entry):
            raise VerificationError(
                f"case {room.name}: you have seen {count} records, the log holds {len(room.seen)} that continue them",
                next_step="the log was cut or rewritten: trainguard log verify, with a head kept elsewhere",
            )

    def keep(self, room: Room) -> None:
        """Remember how far it goes now."""
        if self._path is not None:
            self._held[room.id] = (len(room.seen), room.last_entry)
            write_durably(self._path, msgspec.json.encode(self._held), mode=0o600)


def read_rooms(home: Home, identity: Identity | None) -> tuple[list[Room], Marked]:
    """Every room that was ever sealed to this identity, broken ones included; none without an identity. And the index.

    The work is that of trying each sealed entry that came since this identity last called, whatever comes of it, and of
    reading its own rooms: a stranger's call costs the same whether there is a case or not.
    """
    vkey = home.keys / "log.vkey"
    reader = LogReader(home.log, vkey)
    reader.head()
    if identity is None:
        return [], Marked()
    known = Scan.load(identity, vkey.read_bytes())
    known.extend(reader, identity)
    known.keep(identity)
    given: dict[str, list[Delivery]] = {}
    for leaf in known.given:
        found = sealed.open_delivery(reader.entry(leaf), identity.sealing)
        if found is not None:
            given.setdefault(found.room, []).append(found)
    memory, index = Memory(identity), Marked(reader, known.marks)
    loader = _Loader(vault_of(home), index, identity.card)
    rooms = [loader.load(room, deliveries) for room, deliveries in given.items()]
    for room in rooms:
        try:
            memory.check(room)
        except VerificationError as error:
            room.broken = room.broken or error
    return [room for room in rooms if room.seen or room.broken is not None], index


def vault_of(home: Home) -> Path:
    """Where sealed files lie: `vault/` of the state folder."""
    return home.root / "vault"


@dataclass(frozen=True, slots=True)
class _Loader:
    vault: Path
    index: Marked
    card: Card

    def load(self, room_id: str, deliveries: list[Delivery]) -> Room:
        room = Room(room_id, State(room_id))
        try:
            self._fold(room, deliveries)
        except VerificationError as error:
            room.broken = error
            newest = max(delivery.first for delivery in deliveries)
            last = [delivery for delivery in deliveries if not delivery.key and delivery.first == newest]
            room.ended = any(self._is_delivered(room, delivery) for delivery in last)
        return room

    def _fold(self, room: Room, deliveries: list[Delivery]) -> None:
        earlier = self._earlier(room.id, deliveries)
        while room.state.next_n < RECORDS:
            n = room.state.next_n
            keys: list[tuple[int, bytes, Delivery | None]] = [
                (d.first, bytes.fromhex(d.key), d) for d in deliveries if d.first <= n and _hex32(d.key)
            ]
            keys += [(first, key, None) for first, key in earlier.items() if first <= n]
            for first, key, delivery in sorted(keys, key=lambda one: -one[0]):
                if first < room.first:
                    continue
                if self._take(room, first, key, delivery):
                    break
            else:
                break
        n = room.state.next_n
        room.ended = any(d.first == n and not d.key and self._is_delivered(room, d) for d in deliveries)

    def _take(self, room: Room, first: int, key: bytes, delivery: Delivery | None) -> bool:
        """Whether a record under this key continues the room."""
        n = room.state.next_n
        for leaf, entry in self.index.get(opaque.mark(key, n), ()):
            try:
                if delivery is not None and first == n and n and not self._is_delivered(room, delivery):
                    raise Invalid("a key for this case was handed out by who is no member")  # noqa: TRY301
                seen = self._read(room, key, leaf, entry)
                self._apply(room, seen)
            except (Invalid, MalformedEvidence) as error:
                room.strange.append(f"leaf {leaf}: {error}")
                continue
            room.key, room.first = key, first
            room.seen.append(seen)
            room.keys[n] = key
            return True
        return False

    def _read(self, room: Room, key: bytes, leaf: int, entry: bytes) -> Seen:
        where = f"case {room.name}: record {room.state.next_n} (leaf {leaf})"
        header = sealed.open_header(entry, key, where=where)
        if (header.room, header.n, header.previous) != (room.id, room.state.next_n, room.last_entry):
            raise Invalid(f"{where}: does not follow from the record before it")
        data = sealed.fetch(self.vault, header.file, where=where)
        envelope = sealed.open_file(data, bytes.fromhex(header.key), where=where)
        record, author = parse_record(envelope, where=where)
        if record.previous != header.previous:
            raise Invalid(f"{where}: was signed for another place")
        return Seen(record, author, envelope, leaf, sealed.hash_of(entry))

    def _apply(self, room: Room, seen: Seen) -> None:
        """Check the signature by the card that the room has for its author, then fold it in, or change nothing."""
        card = self._card_of(room, seen)
        if card is None:
            raise Invalid(f"record {seen.record.n}: its author is no member")
        verify_record(seen.envelope, card, where=f"case {room.name}: record {seen.record.n}")
        trial = copy.deepcopy(room.state)
        trial.apply(seen.record, seen.author, sha256_hex(seen.envelope))
        room.state = trial

    def _card_of(self, room: Room, seen: Seen) -> Card | None:
        if not seen.record.n:
            said = seen.record.said
            return said.proposer.card if isinstance(said, Open) and said.proposer.card.key == seen.author else None
        member = room.state.members.get(seen.author)
        return member.card if member is not None else None

    def _is_delivered(self, room: Room, delivery: Delivery) -> bool:
        """Whether who was a member gave it to this reader."""
        member = room.state.active(delivery.author, room.state.last_ns)
        signed = sealed.delivered(delivery.room, delivery.key, delivery.first, self.card.sealing)
        return member is not None and _signed(member.card, delivery.signature, signed)

    def _earlier(self, room: str, deliveries: list[Delivery]) -> dict[int, bytes]:
        """Keys before those delivered, as the first record under each hands them on. Not yet believed."""
        found: dict[int, bytes] = {}
        for delivery in deliveries:
            if _hex32(delivery.key):
                found.update(self._chain(room, delivery.first, bytes.fromhex(delivery.key)))
        return found

    def _chain(self, room: str, first: int, key: bytes) -> Iterator[tuple[int, bytes]]:
        while first > 0:
            said = self._epoch(room, first, key)
            if said is None or not 0 <= said.first < first or not _hex32(said.previous):
                return
            first, key = said.first, bytes.fromhex(said.previous)
            yield first, key

    def _epoch(self, room: str, n: int, key: bytes) -> Epoch | None:
        for leaf, entry in self.index.get(opaque.mark(key, n), ()):
            try:
                where = f"case {room[:16]}: record {n} (leaf {leaf})"
                header = sealed.open_header(entry, key, where=where)
                data = sealed.fetch(self.vault, header.file, where=where)
                record, _ = parse_record(sealed.open_file(data, bytes.fromhex(header.key), where=where), where=where)
                if isinstance(record.said, Epoch):
                    return record.said
            except (TrainguardError, ValueError):
                continue
        return None


def _hex32(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _signed(card: Card, signature: str, data: bytes) -> bool:
    try:
        card.public.verify(base64.b64decode(signature, validate=True), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True
