"""What a case is after some of its records: a fold, one record at a time, that knows no clock, disk or key.

    state = State(room)
    state.apply(record, author, envelope_sha256)     # raises Invalid: such a record changes nothing

Rules: only who is a member when a record is written may write it, and only what their role may; a two-person act takes
effect when a second lead, who is not its author, signs its hash; a subject of the evidence is no member, whatever was
granted; the clock never goes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainguard.cases.identity import NAME, Card, check_card
from trainguard.cases.people import named
from trainguard.cases.records import (
    CITE,
    CITES,
    MOVES,
    NEEDS,
    ROLES,
    TWO_PERSON,
    Add,
    Epoch,
    Exported,
    Grant,
    Hypothesis,
    IncidentRef,
    Move,
    Mute,
    Open,
    Posture,
    Record,
    Remove,
    Role,
    Settle,
    Severity,
    Sign,
    Stage,
    Subject,
    Weigh,
    Worth,
    distinct,
)
from trainguard.errors import TrainguardError

SECOND = 1_000_000_000
MEMBERS = 10
"""More would not fit into one call's entries, and the log would show it."""


class Invalid(TrainguardError):
    """A record that its author could not write there."""

    exit_status = 1


@dataclass(slots=True)
class Member:
    """One person in the room."""

    card: Card
    role: Role
    until: int
    reason: str
    granted_by: tuple[str, ...]
    """Names of the two who signed."""
    lifts: tuple[str, ...] = ()
    gone: str = ""
    """How they left, empty while they are in."""


@dataclass(slots=True)
class Act:
    """A two-person act that waits for its second signature."""

    n: int
    kind: str
    said: Any
    author: str
    hash: str


@dataclass(slots=True)
class Thought:
    """A hypothesis with all that was said of it."""

    n: int
    text: str
    author: str
    at_ns: int
    worth: Worth = "open"
    reason: str = ""
    """Why it stands as it does."""
    weighed: list[tuple[Weigh, str, int]] = field(default_factory=list)
    """With the key of who said it, and when."""


@dataclass(slots=True)
class State:
    """One case. `members` are all there ever were, by key."""

    room: str
    code: str = ""
    reason: str = ""
    posture: Posture = "covert"
    stage: Stage = "proposed"
    severity: Severity = "medium"
    held: bool = False
    purged: bool = False
    members: dict[str, Member] = field(default_factory=dict)
    incidents: list[IncidentRef] = field(default_factory=list)
    subjects: list[Subject] = field(default_factory=list)
    pending: dict[int, Act] = field(default_factory=dict)
    signed: dict[int, Act] = field(default_factory=dict)
    """Acts of kind export that two signed and nobody used yet."""
    thoughts: dict[int, Thought] = field(default_factory=dict)
    """Hypotheses, by the number of their record."""
    mutes: list[tuple[Mute, str, str]] = field(default_factory=list)
    """With the keys of the two."""
    holders: tuple[str, ...] = ()
    """Keys of those who were given the room's present key."""
    last_ns: int = 0
    next_n: int = 0

    # -- who is in ---------------------------------------------------------------------------------------------------

    def named(self, card: Card, lifts: Iterable[str] = (), *, also: Iterable[str] = ()) -> list[Subject]:
        """The subjects that keep this card out."""
        lifted = set(lifts)
        return [one for one in named(card, self.subjects, also=also) if one.firm or one.name not in lifted]

    def active(self, key: str, at_ns: int) -> Member | None:
        """The member with that key, if they are one at that time."""
        member = self.members.get(key)
        if member is None or member.gone or self.named(member.card, member.lifts):
            return None
        late = max(at_ns, self.last_ns) >= member.until * SECOND
        return None if late and not (self.held and member.role == "lead") else member

    def insiders(self, at_ns: int) -> list[str]:
        """Keys of all who are members at that time."""
        return [key for key in self.members if self.active(key, at_ns) is not None]

    def leads(self, at_ns: int) -> list[str]:
        return [key for key in self.insiders(at_ns) if self.members[key].role == "lead"]

    def called(self, key: str) -> str:
        member = self.members.get(key)
        return member.card.name if member is not None else f"key {key[:16]}"

    # -- records -----------------------------------------------------------------------------------------------------

    def apply(self, record: Record, author: str, envelope: str) -> None:
        """Take one record of the room. envelope: SHA-256 of the bytes that `author` signed. Raises Invalid."""
        if record.case != self.room or record.n != self.next_n:
            raise Invalid(f"record {record.n}: expected record {self.next_n} of this case")
        if record.time_ns < self.last_ns:
            raise Invalid(f"record {record.n}: its clock is before that of the record before it")
        said = record.said
        if not self.next_n:
            self._open(record, said, author, envelope)
        else:
            self._later(record, said, author, envelope)
        self.last_ns, self.next_n = record.time_ns, record.n + 1

    def _open(self, record: Record, said: Any, author: str, envelope: str) -> None:
        if not isinstance(said, Open) or author != said.proposer.card.key:
            raise Invalid("record 0: expected the opening of a case, signed by who proposes it")
        grants = (said.proposer, said.second, *said.members)
        if not NAME.fullmatch(said.code):
            raise Invalid("record 0: expected a code name of letters, digits, space and ._@+-")
        for grant in grants:
            check_card(grant.card, "record 0")
        if not distinct([grant.card for grant in grants]) or len(grants) > MEMBERS:
            raise Invalid(f"record 0: expected at most {MEMBERS} people, each once")
        if said.proposer.role != "lead" or said.second.role != "lead":
            raise Invalid("record 0: expected both who open it to be leads")
        self.code, self.reason, self.posture = said.code, said.reason, said.posture
        self.incidents, self.subjects = list(said.incidents), list(said.subjects)
        self.severity = _worst(said.incidents)
        for grant in (said.proposer, said.second):
            self._admit(grant, ())
        self.holders = (said.proposer.card.key, said.second.card.key)
        self.pending[0] = Act(0, "open", said, author, envelope)

    def _later(self, record: Record, said: Any, author: str, envelope: str) -> None:
        member = self.active(author, record.time_ns)
        if member is None:
            raise Invalid(f"record {record.n}: its author is no member")
        if ROLES.index(member.role) < ROLES.index(NEEDS[record.kind]):
            raise Invalid(f"{_a(record.kind)} needs {_a(NEEDS[record.kind])}, {member.card.name} is {_a(member.role)}")
        if self.stage == "proposed" and record.kind not in ("sign", "read", "refused", "epoch", "leave"):
            raise Invalid("the case waits for its second signature")
        if record.kind in TWO_PERSON:
            self._check(record.kind, said, record.time_ns)
            self.pending[record.n] = Act(record.n, record.kind, said, author, envelope)
        elif isinstance(said, Sign):
            self._sign(said, author, record.time_ns)
        elif record.kind == "leave":
            member.gone = "left"
        elif isinstance(said, Add):
            self._add(said)
        elif isinstance(said, Move):
            self._move(said)
        elif isinstance(said, (Hypothesis, Weigh, Settle)):
            self._think(record, said, author)
        elif record.kind == "hold":
            self.held = True
        elif isinstance(said, Exported):
            if self.signed.pop(said.act, None) is None:
                raise Invalid(f"record {record.n}: no export of two people to make")
        elif isinstance(said, Epoch):
            self.holders = said.holders

    def _check(self, kind: str, said: Any, at_ns: int) -> None:
        """What can be told of a two-person act before anybody signs it, and again when it takes effect."""
        if isinstance(said, Grant):
            check_card(said.card, "grant")
            hits = self.named(said.card, said.lifts)
            if hits:
                raise Invalid(f"{said.card.name} is named by the evidence as {hits[0].value}: {hits[0].why}")
            if self.active(said.card.key, at_ns) is None and len(self.insiders(at_ns)) >= MEMBERS:
                raise Invalid(f"a case has at most {MEMBERS} members")
            others = [m.card for key, m in self.members.items() if key != said.card.key]
            if any(card.sealing == said.card.sealing for card in others):
                raise Invalid(f"{said.card.name} has the sealing key of another member")
        if isinstance(said, Remove) and self.active(said.key, at_ns) is None:
            raise Invalid("who is to be removed is no member")
        if (
            kind == "close"
            and isinstance(said, Move)
            and (said.stage != "closed" or said.stage not in MOVES[self.stage])
        ):
            raise Invalid(f"from {self.stage} a case goes to {' or '.join(MOVES[self.stage])}, not to {said.stage}")
        if kind == "release" and not self.held:
            raise Invalid("the case is not in legal hold")
        if kind == "purge" and self.held:
            raise Invalid("the case is in legal hold: nothing of it can be deleted")
        if kind == "purge" and self.stage != "closed":
            raise Invalid(f"only a closed case can be purged; this one is {self.stage}")

    def _sign(self, said: Sign, author: str, at_ns: int) -> None:
        act = self.pending.get(said.act)
        if act is None or act.hash != said.hash:
            raise Invalid(f"no act {said.act} with that content waits for a signature")
        if act.author == author:
            raise Invalid(f"act {said.act} was proposed by {self.called(author)}: a second person must sign it")
        if self.active(act.author, at_ns) is None:
            raise Invalid(f"who proposed act {said.act} is no member any more")
        if act.kind != "open":
            self._check(act.kind, act.said, at_ns)
        del self.pending[said.act]
        self._effect(act, (self.called(act.author), self.called(author)), author)

    def _effect(self, act: Act, both: tuple[str, str], second: str) -> None:
        said = act.said
        if isinstance(said, Open):
            self.stage = "open"
            for grant in (said.proposer, said.second, *said.members):
                self._admit(grant, both)
        elif isinstance(said, Grant):
            self._admit(said, both)
        elif isinstance(said, Remove):
            self.members[said.key].gone = "removed"
        elif isinstance(said, Mute):
            self.mutes.append((said, act.author, second))
        elif isinstance(said, Move):
            self.stage, self.severity = said.stage, said.severity
        elif act.kind == "turn":
            self.posture = said.posture
        elif act.kind == "release":
            self.held = False
        elif act.kind == "export":
            self.signed[act.n] = act
        elif act.kind == "purge":
            self.purged = True

    def _admit(self, grant: Grant, both: tuple[str, ...]) -> None:
        self.members[grant.card.key] = Member(
            grant.card, grant.role, grant.until, grant.reason, both, lifts=grant.lifts
        )

    def _add(self, said: Add) -> None:
        have = {ref.id for ref in self.incidents}
        self.incidents.extend(ref for ref in said.incidents if ref.id not in have)
        known = {subject.name for subject in self.subjects if subject.firm}
        self.subjects = [
            *(one for one in self.subjects if one.firm or one.name not in {s.name for s in said.subjects if s.firm}),
            *(one for one in said.subjects if one.name not in known),
        ]

    def _think(self, record: Record, said: Hypothesis | Weigh | Settle, author: str) -> None:
        """Hypotheses are added to, never altered: who thought what, and when, stays."""
        if isinstance(said, Hypothesis):
            self.thoughts[record.n] = Thought(record.n, said.text, author, record.time_ns)
            return
        thought = self.thoughts.get(said.hypothesis)
        if thought is None:
            known = ", ".join(map(str, self.thoughts)) or "none yet"
            raise Invalid(f"no hypothesis {said.hypothesis} in this case (there is: {known})")
        if isinstance(said, Weigh):
            if len(said.cites) > CITES or not all(CITE.fullmatch(cite) for cite in said.cites):
                raise Invalid(f"record {record.n}: expected at most {CITES} of inc-…, leaf:N or record:N to cite")
            thought.weighed.append((said, author, record.time_ns))
            return
        if said.worth == "supported" and len(self.thoughts) < 2:
            raise Invalid("a hypothesis is supported only beside another one: write down what else it could be")
        if said.worth == "supported" and not any(one.side == "for" for one, _, _ in thought.weighed):
            raise Invalid(f"nothing in this case speaks for hypothesis {said.hypothesis} yet")
        thought.worth, thought.reason = said.worth, said.reason

    def _move(self, said: Move) -> None:
        if said.stage == "closed" and self.stage != "closed":
            raise Invalid("closing a case takes two people", next_step="trainguard case close")
        if said.stage != self.stage and said.stage not in MOVES[self.stage]:
            raise Invalid(f"from {self.stage} a case goes to {' or '.join(MOVES[self.stage])}, not to {said.stage}")
        self.stage, self.severity = said.stage, said.severity


def _worst(incidents: Iterable[IncidentRef]) -> Severity:
    order: tuple[Severity, ...] = ("critical", "high", "medium", "low")
    found = {ref.severity for ref in incidents}
    return next((word for word in order if word in found), "medium")


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
