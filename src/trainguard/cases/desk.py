"""One person's desk: everything a case verb does, each call leaving the same trace whatever it finds.

    desk = Desk(home, identity)
    code = desk.open(incidents, second=card, reason="…", until=…)
    desk.show(code)

A call locks the vault, reads the rooms, decides, writes one unit of entries and files to log and disk (records, and
cover for the rest), and only then gives out what it read: what could not be logged is not shown. Somebody who is no
member, one whose membership ran out or who left, and one who asks for a case that does not exist take the same path
to the same sentence. A refused act of a member is a record too.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard import veil
from trainguard.cases import canary, sealed
from trainguard.cases.identity import NAME, Card, Identity
from trainguard.cases.people import named, subjects_of
from trainguard.cases.records import (
    TWO_PERSON,
    Add,
    Content,
    Epoch,
    Exported,
    Grant,
    Hypothesis,
    IncidentRef,
    Move,
    Mute,
    Note,
    Open,
    Posture,
    Read,
    Reason,
    Record,
    Refused,
    Remove,
    Role,
    Settle,
    Severity,
    Side,
    Sign,
    Stage,
    Subject,
    Turn,
    Weigh,
    Worth,
    check_cites,
    check_reason,
    distinct,
    pack,
    reference,
    sign_record,
    unpack,
)
from trainguard.cases.room import Memory, Room, Seen, read_rooms, vault_of
from trainguard.cases.scan import Marked
from trainguard.cases.sealed import Delivery, Header
from trainguard.cases.state import MEMBERS, SECOND, Act, Invalid, Member, State
from trainguard.digest import canonical_json, sha256_hex
from trainguard.errors import Misuse, TrainguardError, Unavailable, VerificationError
from trainguard.home import Home
from trainguard.incident.correlate import Incident
from trainguard.log import Log
from trainguard.log.disk import locked
from trainguard.log.tiles import TILE_WIDTH

INCIDENTS = 50
"""Incidents of one case, at most."""
FIRST_WORDS = ("amber", "birch", "cedar", "clear", "copper", "dry", "early", "fair", "flint", "grey", "hazel", "high",
               "iron", "late", "linen", "long", "maple", "north", "olive", "plain", "quiet", "river", "slate", "south",
               "still", "stone", "tall", "tin", "wide", "willow", "winter", "wool")  # fmt: skip
SECOND_WORDS = ("anchor", "bay", "bell", "bridge", "brook", "candle", "canyon", "cliff", "cove", "crane", "dune",
                "field", "ford", "garden", "gate", "grove", "harbor", "heath", "hill", "ladder", "lake", "lantern",
                "ledge", "meadow", "mill", "orchard", "pier", "ridge", "spring", "stair", "well", "yard")  # fmt: skip
"""Neutral code names: what a case is called says nothing about it."""


class NoSuchCase(Misuse):
    """The one answer for every case that is not open to the caller, existing or not."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name[:60]!r}: no case of that name is open to you", next_step="trainguard case list shows those that are"
        )


class RefusedAct(TrainguardError):
    """A member may not do that; it was written down."""

    exit_status = 1


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One case in a list."""

    code: str
    stage: Stage
    severity: Severity
    posture: Posture
    role: Role
    until: int
    waits: tuple[int, ...]
    """Acts that wait for a second signature of somebody."""
    broken: str = ""
    """Why it cannot be shown."""


@dataclass(frozen=True, slots=True)
class View:
    """A case as one member may see it at one moment."""

    state: State
    me: str
    now_ns: int
    seen: tuple[Seen, ...]
    incidents: tuple[dict[str, Any], ...]
    """As taken in, JSON."""
    notes: tuple[tuple[Seen, str], ...]
    """Record and text, the reader's own copy."""
    strange: tuple[str, ...]
    keys: Mapping[int, bytes]
    """Number of a record → the room's key it was written under; for export.py."""


@dataclass(slots=True)
class _Draft:
    kind: str
    said: msgspec.Struct
    content: bytes | None = None


@dataclass(slots=True)
class _Call:
    """One verb on its way."""

    rooms: list[Room]
    index: Marked
    now_ns: int
    mutes: list[bytes] = field(default_factory=list)
    """Entries of mutes that take effect with this call."""
    drafts: list[tuple[Room, list[_Draft]]] = field(default_factory=list)
    fresh: dict[str, tuple[list[Seen], bytes, int]] = field(default_factory=dict)
    """Room → records written, its key after them, and the first record under that."""
    done: bool = False


class Desk:
    """What one identity can do with the cases of one state folder."""

    def __init__(
        self,
        home: Home,
        identity: Identity | None,
        *,
        clock: Callable[[], int] = time.time_ns,
        also: Sequence[str] = (),
        approvers: Sequence[Card] = (),
    ) -> None:
        """also: accounts that the caller acts under, as the kernel says (people.process_accounts). approvers: cards of
        those who may open cases, grant, and mute; anybody may where none are named, and nobody may mute."""
        self._home, self._identity, self._clock = home, identity, clock
        self._also, self._approvers = tuple(also), {card.key for card in approvers}

    # -- looking -----------------------------------------------------------------------------------------------------

    def cases(self) -> list[Line]:
        """Every case open to the caller. Each of them gets a record of it."""
        with self._call() as call:
            rooms = self._open_to_me(call)
            for room in rooms:
                if room.broken is None and call.now_ns >= room.state.last_ns:
                    self._draft(call, room, _Draft("read", Read(what="list")))
            self._commit(call)
            return [self._line(room, call.now_ns) for room in rooms]

    def show(self, name: str, *, what: str = "show") -> View:
        """All of one case, as far as the caller may see it. Logged before it is given out."""
        with self._call() as call:
            room = self._room(call, name)
            self._draft(call, room, _Draft("read", Read(what=what[:200])))
            self._commit(call)
            return self._view(room, call.now_ns)

    def trace(self, name: str, text: str) -> list[canary.Match]:
        """Whose copy of which marked note `text` carries, likeliest first. Only for notes the caller wrote."""
        with self._call() as call:
            room = self._room(call, name)
            self._draft(call, room, _Draft("read", Read(what="trace")))
            self._commit(call)
            names = {key: member.card.name for key, member in room.state.members.items()}
            found = []
            for seen in room.seen:
                if seen.record.kind == "note" and seen.author == self._me.key:
                    found += canary.trace(self._content(room, seen), self._me.sealing, text, seen.record.n, names)
            return sorted(found, key=lambda one: (-one.fits, one.note, one.name))

    def cover(self) -> None:
        """Leave the trace of a call and do nothing: for a schedule, so that calls cannot be counted."""
        with self._call() as call:
            self._commit(call)

    # -- acting ------------------------------------------------------------------------------------------------------

    def open(
        self,
        incidents: Sequence[Incident],
        *,
        second: Card,
        reason: str,
        until: int,
        members: Sequence[Grant] = (),
        posture: Posture = "covert",
        subjects: Sequence[Subject] | None = None,
        lifts: Sequence[str] = (),
        code: str | None = None,
    ) -> str:
        """Propose a case on `incidents`; it is one when the owner of `second` has signed. Returns its code name."""
        reason, me = check_reason(reason), self._me
        if not incidents or len(incidents) > INCIDENTS:
            raise Misuse(f"case: expected 1 to {INCIDENTS} incidents, found {len(incidents)}")
        found = subjects_of(self._home, incidents) if subjects is None else tuple(subjects)
        grants = [
            Grant(card=me.card, role="lead", reason=reason, until=until, lifts=tuple(lifts)),
            Grant(card=second, role="lead", reason=reason, until=until, lifts=tuple(lifts)),
            *members,
        ]
        if code is not None and not NAME.fullmatch(code):
            raise Misuse(f"case: expected a code name of letters, digits, space and ._@+-, found {code[:60]!r}")
        with self._call() as call:
            self._may_open(grants, found, call.now_ns)
            taken = [msgspec.to_builtins(incident) for incident in incidents]
            said = Open(
                code=code or self._code(call, found),
                reason=reason,
                posture=posture,
                proposer=grants[0],
                second=grants[1],
                members=tuple(grants[2:]),
                incidents=tuple(reference(one) for one in taken),
                subjects=found,
            )
            room = Room(secrets.token_hex(16), State(""), key=os.urandom(32))
            room.state.room = room.id
            self._draft(call, room, _Draft("open", said, pack(taken)))
            self._commit(call)
            return said.code

    def sign(self, name: str, act: int) -> str:
        """Give the second signature to an act; returns its kind. It takes effect at once."""
        with self._call() as call:
            room = self._room(call, name)
            waiting = room.state.pending.get(act)
            if waiting is None:
                raise self._refused(call, room, f"sign {act}", f"no act {act} waits for a signature")
            self._must_approve(call, room, f"sign {act}", waiting.kind)
            if waiting.author == self._me.key:
                who = room.state.called(waiting.author)
                raise self._refused(
                    call, room, f"sign {act}", f"{who} proposed act {act}: a second person must sign it"
                )
            if waiting.kind == "open":
                self._recheck(call, room)
            try:
                second = self._muted(call, waiting) if isinstance(waiting.said, Mute) else ""
                self._draft(call, room, _Draft("sign", Sign(act=act, hash=waiting.hash, mute=second)))
            except Invalid as refused:
                raise self._refused(call, room, f"sign {act}", str(refused)) from refused
            self._commit(call)
            self._after(room, waiting)
            return waiting.kind

    def grant(self, name: str, card: Card, *, role: Role, reason: str, until: int, lifts: Sequence[str] = ()) -> int:
        """Propose a member; returns the number of the act, which a second lead signs."""
        said = Grant(card=card, role=role, reason=check_reason(reason), until=until, lifts=tuple(lifts))
        return self._act(name, "grant", said, f"grant to {card.name} (key {card.key[:16]})")

    def remove(self, name: str, who: str, *, reason: str) -> int:
        """Propose to remove the member called `who` (name, or beginning of the key)."""
        reason = check_reason(reason)
        with self._call() as call:
            room = self._room(call, name)
            key = self._member(call, room, who)
            number = self._proposed(call, room, "remove", Remove(key=key, reason=reason), f"remove {who}")
            self._commit(call)
            return number

    def leave(self, name: str, *, reason: str) -> None:
        """Leave a case for good; the next call of any other member gives the room a new key."""
        self._act(name, "leave", Reason(reason=check_reason(reason)), "leave")

    def add(self, name: str, incidents: Sequence[Incident], *, subjects: Sequence[Subject] | None = None) -> None:
        """Take further incidents in. Members whom they name are members no longer."""
        found = subjects_of(self._home, incidents) if subjects is None else tuple(subjects)
        taken = [msgspec.to_builtins(incident) for incident in incidents]
        said = Add(incidents=tuple(reference(one) for one in taken), subjects=found)
        self._act(name, "add", said, "add", pack(taken))

    def note(self, name: str, template: str) -> int:
        """Write a note. Alternatives in it, `{Monday|Tuesday}`, make every member's copy another one (canary.py)."""
        with self._call() as call:
            room = self._room(call, name)
            cards = {key: room.state.members[key].card for key in room.state.insiders(call.now_ns)}
            content = canary.make(template, cards, self._me.card)
            number = self._proposed(call, room, "note", Note(readers=tuple(cards)), "note", pack(content))
            self._commit(call)
            return number

    def suppose(self, name: str, text: str) -> int:
        """Write a hypothesis down, with who and when; returns its number."""
        return self._act(name, "hypothesis", Hypothesis(text=check_reason(text)), "hypothesis")

    def weigh(self, name: str, number: int, side: Side, text: str, *, cites: Sequence[str] = ()) -> int:
        """Say what speaks for or against a hypothesis, and what that rests on."""
        said = Weigh(hypothesis=number, side=side, text=check_reason(text), cites=check_cites(cites))
        return self._act(name, "weigh", said, f"weigh {number}")

    def settle(self, name: str, number: int, worth: Worth, *, reason: str) -> int:
        """Say how a hypothesis stands now. It is supported only beside another one."""
        said = Settle(hypothesis=number, worth=worth, reason=check_reason(reason))
        return self._act(name, "settle", said, f"settle {number}")

    def move(self, name: str, stage: Stage, *, severity: Severity | None, reason: str) -> int:
        """Where the case stands. Closing it waits for a second lead."""
        reason = check_reason(reason)
        with self._call() as call:
            room = self._room(call, name)
            said = Move(stage=stage, severity=severity or room.state.severity, reason=reason)
            number = self._proposed(call, room, "close" if stage == "closed" else "move", said, f"move to {stage}")
            self._commit(call)
            return number

    def turn(self, name: str, posture: Posture, *, reason: str) -> int:
        """Propose covert or overt."""
        return self._act(name, "turn", Turn(posture=posture, reason=check_reason(reason)), f"turn {posture}")

    def mute(self, name: str, scope: veil.Scope, value: str, *, until: int | None, reason: str) -> int:
        """Propose that ordinary lists say MAINTENANCE of a run or a file until then; never that it is well.

        until: seconds since the epoch; None proposes to end it.
        """
        if len(self._approvers) < 2:
            raise Misuse(
                "mute: this machine names no two approvers, so nothing is muted here",
                next_step=f"put their cards into {veil.approvers_folder()}, on every machine that shows verdicts",
            )
        since = self._clock() // SECOND
        if until is not None and until <= since:
            raise Misuse("mute: expected an end in the future")
        until = until if until is not None else since
        signature = veil.sign_mute(scope, value, since, until, self._me.signing)
        said = Mute(
            scope=scope, value=value, since=since, until=until, reason=check_reason(reason), signature=signature
        )
        return self._act(name, "mute", said, f"mute {scope} {value}")

    def _muted(self, call: _Call, act: Act) -> str:
        """Second signature of a mute, and its entry for the log. Raises Invalid where the first is not one."""
        said: Mute = act.said
        mine = veil.sign_mute(said.scope, said.value, said.since, said.until, self._me.signing)
        muted = veil.Muted(
            scope=said.scope,
            value=said.value,
            since=said.since,
            until=said.until,
            keys=(act.author, self._me.key),
            signatures=(said.signature, mine),
        )
        call.mutes.append(veil.seal_mute(muted, call.index))
        return mine

    def hold(self, name: str, *, reason: str, release: bool = False) -> int:
        """Put the case in legal hold at once, or propose to release it."""
        return self._act(name, "release" if release else "hold", Reason(reason=check_reason(reason)), "hold")

    def propose_export(self, name: str, *, reason: str) -> int:
        """Propose to export; when signed, `exported` may be called once."""
        return self._act(name, "export", Reason(reason=check_reason(reason)), "export")

    def propose_purge(self, name: str, *, reason: str) -> int:
        """Propose to delete the contents of a closed case."""
        return self._act(name, "purge", Reason(reason=check_reason(reason)), "purge")

    def exported(self, name: str, act: int, make: Callable[[View], bytes]) -> bytes:
        """The bytes that `make` builds, once two people agreed (act), and after their digest was logged."""
        with self._call() as call:
            room = self._room(call, name)
            if act not in room.state.signed:
                raise self._refused(
                    call, room, f"export {act}", f"act {act} is no export that two people signed and nobody made"
                )
            data = make(self._view(room, call.now_ns))
            said = Exported(act=act, sha256=sha256_hex(data), bytes=len(data))
            self._draft(call, room, _Draft("exported", said))
            self._commit(call)
            return data

    # -- one call ----------------------------------------------------------------------------------------------------

    @property
    def _me(self) -> Identity:
        if self._identity is None:
            raise Unavailable("there is no identity here", next_step="trainguard case identity --name NAME")
        return self._identity

    @contextmanager
    def _call(self) -> Iterator[_Call]:
        """The frame of every verb: lock, read, and one unit written whatever happens inside."""
        if not self._home.log.is_dir():
            raise Misuse(f"{self._home.root}: no log here", next_step="record a run first: trainguard run -- CMD")
        vault = vault_of(self._home)
        try:
            vault.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"{vault}: cannot be made: {error.strerror}") from error
        with self._locked(vault):
            call = _Call(*read_rooms(self._home, self._identity), self._clock())
            try:
                yield call
            except TrainguardError:
                if not call.done:
                    call.drafts.clear()
                    call.mutes.clear()
                    self._commit(call)
                raise

    @contextmanager
    def _locked(self, vault: Any) -> Iterator[None]:
        try:
            frame = locked(vault / "lock")
            frame.__enter__()
        except OSError as error:
            raise Unavailable(f"{vault}: cannot be locked: {error.strerror}") from error
        try:
            yield
        finally:
            frame.__exit__(None, None, None)

    def _mine(self, room: Room, now_ns: int) -> Member | None:
        """The caller as a member of the room, if they are one now; by their card and by the accounts they act under."""
        if self._identity is None or room.ended:
            return None
        member = room.state.active(self._identity.key, now_ns)
        if member is None or room.state.named(member.card, member.lifts, also=self._also):
            return None
        return member

    def _open_to_me(self, call: _Call) -> list[Room]:
        """Rooms the caller is in; of those that cannot be read to a member, too. A room that this site's approvers did
        not open is none: anybody can make one and seal it to a card."""
        found = [room for room in call.rooms if not room.seen or self._mine(room, call.now_ns) is not None]
        return [room for room in found if not room.ended and (not self._approvers or self._approved(room))]

    def _approved(self, room: Room) -> bool:
        said = room.seen[0].record.said if room.seen else None
        return isinstance(said, Open) and {said.proposer.card.key, said.second.card.key} <= self._approvers

    def _room(self, call: _Call, name: str) -> Room:
        """The one room called `name` that is open to the caller. Raises NoSuchCase, or what broke it."""
        mine = self._open_to_me(call)
        matches = [room for room in mine if room.name == name or (len(name) >= 8 and room.id.startswith(name))]
        if not matches:
            raise NoSuchCase(name)
        if len(matches) > 1:
            ids = ", ".join(room.id[:16] for room in matches[:5])
            raise Misuse(
                f"case {name}: {len(matches)} cases open to you are called so", next_step=f"name one by: {ids}"
            )
        room = matches[0]
        if room.broken is not None:
            raise type(room.broken)(str(room.broken), next_step=room.broken.next_step)
        behind = _behind(room, call.now_ns)
        if behind:
            raise Unavailable(f"case {name}: {behind}", next_step="set the clock right and ask again")
        return room

    def _act(self, name: str, kind: str, said: msgspec.Struct, what: str, content: bytes | None = None) -> int:
        """One act in one room: tried, refused on the record where it may not be, else written."""
        with self._call() as call:
            room = self._room(call, name)
            number = self._proposed(call, room, kind, said, what, content)
            self._commit(call)
            return number

    def _proposed(
        self, call: _Call, room: Room, kind: str, said: msgspec.Struct, what: str, content: bytes | None = None
    ) -> int:
        self._must_approve(call, room, what, kind)
        if isinstance(said, Grant) and said.until * SECOND <= call.now_ns:
            raise Misuse("case: expected a membership that ends in the future")
        try:
            self._draft(call, room, _Draft(kind, said, content))
        except Invalid as refused:
            raise self._refused(call, room, what, str(refused)) from refused
        # A new key for the room would come before it, and take this number.
        return room.state.next_n + (1 if self._rotates(call, room) else 0)

    def _must_approve(self, call: _Call, room: Room, what: str, kind: str) -> None:
        if kind in TWO_PERSON and self._approvers and self._me.key not in self._approvers:
            raise self._refused(call, room, what, f"{self._me.card.name} is none of this site's approvers")

    def _refused(self, call: _Call, room: Room, what: str, why: str) -> RefusedAct:
        """Write down that a member tried; returns what to raise."""
        call.drafts.clear()
        call.mutes.clear()
        self._draft(call, room, _Draft("refused", Refused(what=what[:200], why=why[:500])))
        self._commit(call)
        return RefusedAct(f"case {room.name}: {why}; the attempt is in its record")

    def _member(self, call: _Call, room: Room, who: str) -> str:
        keys = room.state.insiders(call.now_ns)
        found = [
            key for key in keys if room.state.members[key].card.name == who or (len(who) >= 8 and key.startswith(who))
        ]
        if len(found) != 1:
            raise Misuse(f"case {room.name}: {who[:60]!r}: expected one member of that name, found {len(found)}")
        return found[0]

    # -- opening -----------------------------------------------------------------------------------------------------

    def _may_open(self, grants: Sequence[Grant], subjects: Sequence[Subject], now_ns: int) -> None:
        """Raises where the case could not be: nothing of it exists yet, so nothing is recorded but cover."""
        if not distinct([grant.card for grant in grants]):
            raise RefusedAct("case: a second person must sign: two of the cards have the same key")
        if len(grants) > MEMBERS:
            raise Misuse(f"case: expected at most {MEMBERS} members, found {len(grants)}")
        if any(grant.until * SECOND <= now_ns for grant in grants):
            raise Misuse("case: expected memberships that end in the future")
        if self._approvers and not {grants[0].card.key, grants[1].card.key} <= self._approvers:
            raise RefusedAct("case: both who open a case must be among this site's approvers")
        for at, grant in enumerate(grants):
            also = self._also if not at else ()
            hits = [one for one in named(grant.card, subjects, also=also) if one.firm or one.name not in grant.lifts]
            if hits:
                raise RefusedAct(
                    f"case: {grant.card.name} cannot be in this case ({hits[0].value}: {hits[0].why})",
                    next_step="choose somebody else"
                    if hits[0].firm
                    else f"if two people agree that this is no reason: --lift {hits[0].name}",
                )

    def _recheck(self, call: _Call, room: Room) -> None:
        """The second person's own look: the subjects of the incidents, drawn anew, must all be in the act."""
        waiting = room.state.pending[0]
        taken = self._content(room, room.seen[0])
        try:
            anew = subjects_of(self._home, [msgspec.convert(one, Incident) for one in taken])
        except (msgspec.ValidationError, TrainguardError, TypeError) as error:
            raise self._refused(call, room, "sign 0", f"the incidents cannot be read again: {error}") from error
        stated = {one.name for one in waiting.said.subjects}
        missing = [one for one in anew if one.name not in stated]
        if missing:
            raise self._refused(call, room, "sign 0", f"the act leaves out {missing[0].value} ({missing[0].why})")

    def _code(self, call: _Call, subjects: Sequence[Subject]) -> str:
        taken = {room.name for room in call.rooms} | {one.value.casefold() for one in subjects}
        while True:
            code = f"{secrets.choice(FIRST_WORDS)}-{secrets.choice(SECOND_WORDS)}-{secrets.randbelow(90) + 10}"
            if code not in taken:
                return code

    def _after(self, room: Room, act: Act) -> None:
        """What a signed act does outside the room's record."""
        if act.kind == "purge":
            for seen in room.seen:
                if seen.record.content is not None:
                    (vault_of(self._home) / seen.record.content.file).unlink(missing_ok=True)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _draft(self, call: _Call, room: Room, *drafts: _Draft) -> None:
        """Queue records of a room. Raises Invalid for one that the caller could not write there."""
        waiting = [one for other, ones in call.drafts if other is room for one in ones]
        self._tried(room, [*waiting, *drafts], call.now_ns)
        call.drafts = [(other, ones) for other, ones in call.drafts if other is not room]
        call.drafts.append((room, [*waiting, *drafts]))

    def _tried(self, room: Room, drafts: Sequence[_Draft], now_ns: int) -> State:
        """The state after these drafts. Raises Invalid."""
        state = copy.deepcopy(room.state)
        for draft in drafts:
            body = msgspec.to_builtins(draft.said)
            record = Record(
                case=room.id, n=state.next_n, previous="", at=str(now_ns), kind=draft.kind, body=body, content=None
            )
            state.apply(record, self._me.key, "")
        return state

    def _rotates(self, call: _Call, room: Room) -> bool:
        """Whether those who will be members are not those who hold the room's key. Who leaves makes no new one."""
        drafts = [one for other, ones in call.drafts if other is room for one in ones]
        if not room.seen or any(draft.kind == "leave" for draft in drafts):
            return False
        after = self._tried(room, drafts, call.now_ns)
        return set(after.insiders(call.now_ns)) != set(room.state.holders)

    def _commit(self, call: _Call) -> None:
        """Files first, then entries, in one durable append; then memory. Raises Unavailable, with nothing shown."""
        vault = vault_of(self._home)
        files = 0
        entries: list[bytes] = []
        call.done = True
        for room, drafts in call.drafts:
            given, records, count = self._written(call, room, drafts)
            entries += [*given, *records]
            files += count
        for _ in range(-files % sealed.UNIT_FILES or (sealed.UNIT_FILES if not files else 0)):
            sealed.store_cover(vault)
        with Log.open(self._home.log, self._home.keys / "log.key") as log:
            appended = sealed.filled([*entries, *call.mutes])
            first = log.append(appended)[0]
            if first // TILE_WIDTH != (first + len(appended)) // TILE_WIDTH:
                log.publish()  # or every call would read all entries that nobody published
        self._adopt(call, first, entries)

    def _written(self, call: _Call, room: Room, drafts: Sequence[_Draft]) -> tuple[list[bytes], list[bytes], int]:
        """Deliveries and record entries of one room's drafts, and how many files were stored for them."""
        vault, files = vault_of(self._home), 0
        given: list[bytes] = []
        records: list[bytes] = []
        key, first, n, previous = room.key, room.first, room.state.next_n, room.last_entry
        if not room.seen:
            said = drafts[0].said
            cards = [said.proposer.card, said.second.card] if isinstance(said, Open) else []
            given = [self._delivery(room, key, 0, card) for card in cards]
        queue = list(drafts)
        if self._rotates(call, room):
            after = self._tried(room, drafts, call.now_ns)
            holders = after.insiders(call.now_ns)
            queue.insert(0, _Draft("epoch", Epoch(previous=key.hex(), first=first, holders=tuple(holders))))
            key, first = os.urandom(32), n
            given = [self._delivery(room, key, n, after.members[one].card) for one in holders]
            out = [one for one in room.state.holders if one not in holders]
            given += [self._delivery(room, b"", n, room.state.members[one].card) for one in out]
        fresh: list[Seen] = []
        for draft in queue:
            content = None
            if draft.content is not None:
                data, file_key = sealed.seal_file(draft.content)
                content = Content(file=sealed.store(vault, data), key=file_key.hex(), sha256=sha256_hex(draft.content))
                files += 1
            record = Record(
                case=room.id,
                n=n,
                previous=previous,
                at=str(call.now_ns),
                kind=draft.kind,
                body=msgspec.to_builtins(draft.said),
                content=content,
            )
            envelope = sign_record(record, self._me.signing)
            data, file_key = sealed.seal_file(envelope)
            header = Header(room=room.id, n=n, previous=previous, file=sealed.store(vault, data), key=file_key.hex())
            files += 1
            entry = sealed.seal_header(header, key)
            previous = sealed.hash_of(entry)
            fresh.append(Seen(record, self._me.key, envelope, -1, previous))
            records.append(entry)
            n += 1
        call.fresh[room.id] = (fresh, key, first)
        return given, records, files

    def _delivery(self, room: Room, key: bytes, first: int, card: Card) -> bytes:
        signed = sealed.delivered(room.id, key.hex(), first, card.sealing)
        signature = base64.b64encode(self._me.signing.sign(signed, ec.ECDSA(hashes.SHA256()))).decode()
        what = Delivery(room=room.id, key=key.hex(), first=first, author=self._me.key, signature=signature)
        return sealed.deliver(what, card.mailbox)

    def _adopt(self, call: _Call, first: int, entries: Sequence[bytes]) -> None:
        """Bring the rooms in memory up to what was written, and remember it."""
        leaves = {sealed.hash_of(entry): first + at for at, entry in enumerate(entries)}
        memory = Memory(self._identity) if self._identity is not None else None
        for room, _ in call.drafts:
            fresh, room.key, room.first = call.fresh[room.id]
            for seen in fresh:
                room.state.apply(seen.record, seen.author, sha256_hex(seen.envelope))
                room.keys[seen.record.n] = room.key
                room.seen.append(dataclasses.replace(seen, leaf=leaves[seen.entry]))
            if memory is not None:
                memory.keep(room)

    # -- what is given out -------------------------------------------------------------------------------------------

    def _line(self, room: Room, now_ns: int) -> Line:
        state = room.state
        member = state.members.get(self._me.key)
        return Line(
            code=room.name,
            stage=state.stage,
            severity=state.severity,
            posture=state.posture,
            role=member.role if member is not None else "reader",
            until=member.until if member is not None else 0,
            waits=tuple(state.pending),
            broken=str(room.broken) if room.broken is not None else _behind(room, now_ns),
        )

    def _view(self, room: Room, now_ns: int) -> View:
        incidents: list[dict[str, Any]] = []
        notes: list[tuple[Seen, str]] = []
        for seen in room.seen:
            if seen.record.content is None or room.state.purged:
                continue
            value = self._content(room, seen)
            if seen.record.kind in ("open", "add"):
                incidents += [one for one in _listed(value) if _stated(one, seen.record.said.incidents)]
            elif seen.record.kind == "note":
                notes.append((seen, canary.mine(value, self._me) or "(written before you joined)"))
        return View(
            state=room.state,
            me=self._me.key,
            now_ns=now_ns,
            seen=tuple(room.seen),
            incidents=tuple(incidents),
            notes=tuple(notes),
            strange=tuple(room.strange),
            keys=dict(room.keys),
        )

    def _content(self, room: Room, seen: Seen) -> Any:
        """What a record's content opens to. Raises VerificationError where it is gone or altered."""
        content = seen.record.content
        where = f"case {room.name}: content of record {seen.record.n}"
        if content is None:
            raise VerificationError(f"{where}: there is none")
        data = sealed.fetch(vault_of(self._home), content.file, where=where)
        opened = sealed.open_file(data, bytes.fromhex(content.key), where=where)
        if sha256_hex(opened) != content.sha256:
            raise VerificationError(f"{where}: is not what was signed")
        return unpack(opened, where=where)


def _behind(room: Room, now_ns: int) -> str:
    """What is wrong with the clock; empty where nothing is."""
    if now_ns >= room.state.last_ns:
        return ""
    seconds = (room.state.last_ns - now_ns) / SECOND
    return f"this machine's clock is {seconds:,.0f} s before the case's last record; nothing is shown"


def _listed(value: Any) -> list[dict[str, Any]]:
    """The incidents in a content; what a member put there that is none is left out."""
    found = value if isinstance(value, list) else []
    texts = ("id", "run", "severity")
    return [one for one in found if isinstance(one, dict) and all(isinstance(one.get(name), str) for name in texts)]


def _stated(incident: Any, stated: Sequence[IncidentRef]) -> bool:
    return any(ref.sha256 == sha256_hex(canonical_json(incident)) for ref in stated)
