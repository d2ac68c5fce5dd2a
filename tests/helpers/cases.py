"""A site with people who have keys, and incidents that name accounts: all made up, nothing is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainguard.cases.desk import Desk
from trainguard.cases.identity import Card, Identity, create_identity
from trainguard.cases.records import Grant, Role
from trainguard.envelope import load_or_create_key
from trainguard.finding import Finding, Subject
from trainguard.home import Home
from trainguard.incident.attribute import Attribution, Candidate
from trainguard.incident.correlate import Incident
from trainguard.log import Log, LogReader

START_NS = 1_800_000_000 * 10**9
DAY = 86400


@dataclass
class Site:
    """One state folder, a clock that the test turns, and people."""

    root: Path
    now_ns: int = START_NS
    people: dict[str, Identity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home.prepare()
        load_or_create_key(self.home.keys / "attestation.pem")
        with Log.open(self.home.log, self.home.keys / "log.key") as log:
            log.append([b"something else"])

    @property
    def home(self) -> Home:
        return Home(self.root / "state")

    def person(self, name: str, *, accounts: tuple[str, ...] = (), authors: tuple[str, ...] = ()) -> Identity:
        """Their identity, made when first asked for."""
        if name not in self.people:
            path = self.root / "people" / name / "identity.json"
            self.people[name] = create_identity(path, name=name, accounts=accounts or (name,), authors=authors)
        return self.people[name]

    def desk(self, name: str | None, **more: object) -> Desk:
        """What they can do; None: somebody without an identity."""
        identity = self.person(name) if name is not None else None
        return Desk(self.home, identity, clock=self.clock, **more)  # type: ignore[arg-type]

    def clock(self) -> int:
        """A second later at every look, so that records are in order."""
        self.now_ns += 10**9
        return self.now_ns

    def later(self, days: float) -> None:
        self.now_ns += int(days * DAY * 10**9)

    def card(self, name: str) -> Card:
        return self.person(name).card

    def until(self, days: float = 30) -> int:
        return self.now_ns // 10**9 + int(days * DAY)

    def grant(self, name: str, role: Role = "investigator", days: float = 30) -> Grant:
        return Grant(card=self.card(name), role=role, reason="looks for the cause", until=self.until(days))

    def opened(self, *members: Grant, incidents: tuple[Incident, ...] = (), **more: object) -> str:
        """The code of a case that lead-a and lead-b opened."""
        code = self.desk("lead-a").open(
            incidents or (incident(),),
            second=self.card("lead-b"),
            reason="weights changed overnight",
            until=self.until(),
            members=members,
            **more,  # type: ignore[arg-type]
        )
        assert self.desk("lead-b").sign(code, 0) == "open"
        return code

    def entries(self) -> list[bytes]:
        reader = LogReader(self.home.log, self.home.keys / "log.vkey")
        return list(reader.entries(0, reader.head().size))

    def files(self) -> list[Path]:
        return sorted(path for path in (self.home.root / "vault").iterdir() if path.name != "lock")

    def everything(self) -> bytes:
        """Every byte of the state folder, as one who may read all of it would search it."""
        return b"\n".join(p.read_bytes() for p in sorted(self.home.root.rglob("*")) if p.is_file())


def incident(
    account: str = "insider",
    uid: int = 54242,
    *,
    run: str = "job-7",
    name: str = "inc-0123456789",
    path: str | None = None,
) -> Incident:
    """One that names an account, as the correlator would write it."""
    finding = Finding(
        check="saves",
        outcome="violated",
        techniques=("E3",),
        subject=Subject(run=run, step=12, path=path),
        message="the file is not what was in memory",
    )
    candidate = Candidate(
        level="A3",
        what=f"account {account} (uid {uid})",
        uid=uid,
        score=0.7,
        confidence=0.7,
        supports=("it owns the file",),
    )
    return Incident(
        id=name,
        run=run,
        kind="E",
        severity="critical",
        first_step=12,
        last_step=12,
        ranks=(0,),
        findings=(finding,),
        techniques=("E3",),
        attribution=Attribution(
            candidates=(candidate,), sentence=f"On host node-1, account {account}: a file was changed."
        ),
    )
