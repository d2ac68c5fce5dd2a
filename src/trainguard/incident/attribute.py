"""Who and what: from a finding to the host, process and account the record shows, with what speaks against it.

    for candidate in attribute(finding, facts): …

The ladder (threat model, section 8.2): A0 effect only, A1 host, A2 process and its ancestry, A3 account or session.
The software stops at A3; A4 (corroborated from elsewhere) and A5 (admitted, or proved outside the digital) are entered
by people. An account is not a person: it may be shared, stolen, or used to frame its owner. So an account under which
something was done and the login session from which it was done are separate candidates, and where they contradict
each other the session is the stronger one: su and sudo change a process's account, its audit login is set once.

Confidence is what is left of 1 after every alternative has taken its share, never a feeling: see SHARES.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from trainguard.evidence import Evidence
from trainguard.finding import Citation, Finding

Level = Literal["A0", "A1", "A2", "A3"]
NO_LOGIN = 4294967295
"""What the kernel gives as audit uid or session where there was no login: (uint32) -1."""

SHARES: dict[str, float] = {
    "shared account": 0.10,
    "stolen credentials": 0.05,
    "an honest bug": 0.10,
    "hardware": 0.05,
    "others could write it": 0.30,
    "written through a shared folder": 0.15,
    "root could have set it": 0.05,
    "the process may have been steered by what it read": 0.10,
    "session and account contradict each other": 0.40,
    "no login is recorded": 0.15,
    "any process or account of that host": 0.50,
}
"""Alternative → share of the confidence it takes; what is left is multiplied, so doubts never add up to certainty."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to "from where?", with its evidence."""

    level: Level
    what: str
    """`account victim-b (uid 1001)`, `login session 7 of account insider (uid 1002)`, `process 412`, `host node-3`."""
    uid: int | None = None
    confidence: float
    supports: tuple[str, ...]
    against: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    evidence: tuple[Citation, ...] = ()


class Attribution(msgspec.Struct, frozen=True, kw_only=True):
    """Candidates, likeliest first, and who is excluded."""

    candidates: tuple[Candidate, ...]
    excluded: tuple[str, ...] = ()
    """Accounts that the evidence names but speaks against, with the reason."""
    sentence: str
    """What may be said in public words."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the record of a run says beside its findings."""

    host: str | None = None
    uid: int | None = None
    """Account that started the run."""
    loginuid: int | None = None
    session: int | None = None
    by_hash: Mapping[str, Evidence] = {}
    """Records that findings cite, by hash."""


def facts_of(records: Iterable[Evidence], findings: Iterable[Finding]) -> Facts:
    """The facts in a run's records that its findings rest on."""
    wanted = {citation.hash for finding in findings for citation in finding.evidence}
    start: Mapping[str, Any] = {}
    kept: dict[str, Evidence] = {}
    for record in records:
        if record.kind == "start" and not start:
            start = record.body
        if record.hash in wanted and record.hash is not None:
            kept[record.hash] = record
    account = start.get("account")
    account = account if isinstance(account, dict) else {}
    host = start.get("host")
    return Facts(
        host=host if isinstance(host, str) else None,
        uid=_whole(account.get("uid")),
        loginuid=_login(account.get("loginuid")),
        session=_login(account.get("session")),
        by_hash=kept,
    )


def attribute(finding: Finding, facts: Facts, *, look: bool = True) -> Attribution:
    """Candidates for one finding. look: also read the files it names as they lie now (owner, mode, times)."""
    found: list[Candidate] = []
    for citation in finding.evidence:
        record = facts.by_hash.get(citation.hash)
        sender = record.body.get("sender") if record is not None and record.kind == "signalled" else None
        if isinstance(sender, dict):
            found.extend(_from_process(sender, facts, (citation,)))
    if not found and look and finding.subject.path is not None:
        found.extend(_from_file(finding, facts))
    if facts.host is not None:
        found.append(_host(finding, facts))
    ranked = tuple(sorted(found, key=lambda one: (-_rung(one.level), -one.confidence)))
    ranked = tuple(sorted(ranked, key=lambda one: -one.confidence)) if ranked else (_effect_only(finding),)
    return Attribution(
        candidates=ranked, excluded=tuple(_excluded(ranked)), sentence=_sentence(finding, ranked[0], facts)
    )


# -- a process that the kernel named ---------------------------------------------------------------------------------


def _from_process(sender: Mapping[str, Any], facts: Facts, cites: tuple[Citation, ...]) -> Iterator[Candidate]:
    """A process, the account it ran under, and the login it came from."""
    pid, uid = _whole(sender.get("pid")), _whole(sender.get("uid"))
    login, session = _login(sender.get("loginuid")), _login(sender.get("session"))
    words = " ".join(str(word) for word in sender.get("cmdline") or ())[:200]
    ancestry = [str(step[2]) for step in sender.get("ancestry") or () if isinstance(step, list) and len(step) > 2]
    seen = [f"the kernel named process {pid} ({words or sender.get('comm')}) as the sender"]
    if ancestry:
        seen.append(f"it descends from {' < '.join(ancestry[:6])}")
    yield _candidate(
        "A2",
        f"process {pid} ({words or sender.get('comm')})",
        uid,
        seen,
        (),
        ("the process may have been steered by what it read",),
        cites,
    )
    if uid is None:
        return
    split = login is not None and login != uid and uid != 0
    if login is not None and split:
        against = (f"the process ran under account {_name(uid)}, not under the account that logged in",)
        told = [*seen, f"its audit login is {_name(login)}, session {session}: set at login, kept through su and sudo"]
        yield _candidate(
            "A3",
            f"login session {session} of account {_name(login)}",
            login,
            told,
            against,
            ("shared account", "stolen credentials"),
            cites,
        )
        against = (f"the login it came from is {_name(login)}, so the account was used from somebody else's session",)
        doubts: tuple[str, ...] = ("session and account contradict each other", "shared account", "stolen credentials")
        yield _candidate("A3", f"account {_name(uid)}", uid, seen, against, doubts, cites)
        return
    doubts = (
        ("shared account", "stolen credentials")
        if login is not None
        else ("no login is recorded", "shared account", "stolen credentials")
    )
    yield _candidate(
        "A3", f"account {_name(uid)}", uid, [*seen, f"it ran under account {_name(uid)}"], (), doubts, cites
    )


# -- a file ------------------------------------------------------------------------------------------------------------


def _from_file(finding: Finding, facts: Facts) -> Iterator[Candidate]:
    """The owner of the file a finding names, as it lies now, and who else could have written it."""
    path = _file_of(str(finding.subject.path))
    try:
        status = os.lstat(path)
        folder = path.parent.stat()
    except OSError:
        return
    supports = [
        f"{path} belongs to account {_name(status.st_uid)}; its inode last changed at {_moment(status.st_ctime_ns)}"
    ]
    alternatives = ["an honest bug", "shared account", "stolen credentials"]
    against = []
    if status.st_mode & 0o022 or status.st_nlink > 1:
        against.append(f"others may write it (mode {status.st_mode & 0o7777:04o})")
        alternatives.append("others could write it")
    if folder.st_mode & 0o022 and not folder.st_mode & 0o1000:
        against.append(f"others may replace files in its folder (mode {folder.st_mode & 0o7777:04o})")
        alternatives.append("written through a shared folder")
    if status.st_uid == 0:
        alternatives.append("root could have set it")
    if status.st_uid == facts.uid:
        against.append("it is the account that started the run itself")
    yield _candidate(
        "A3",
        f"account {_name(status.st_uid)}",
        status.st_uid,
        supports,
        tuple(against),
        tuple(alternatives),
        finding.evidence,
    )


def _file_of(path: str) -> Path:
    """The file of `file` or `file:line`."""
    name, _, line = path.rpartition(":")
    return Path(name if name and line.isdigit() else path)


# -- what is left ------------------------------------------------------------------------------------------------------


def _host(finding: Finding, facts: Facts) -> Candidate:
    rank = f", rank {finding.subject.rank}" if finding.subject.rank is not None else ""
    supports = [f"it happened in the run that host {facts.host} recorded{rank}"]
    return _candidate(
        "A1",
        f"host {facts.host}",
        None,
        supports,
        (),
        ("an honest bug", "hardware", "any process or account of that host"),
        finding.evidence,
    )


def _effect_only(finding: Finding) -> Candidate:
    return _candidate(
        "A0",
        "the effect alone",
        None,
        [finding.message],
        ("nothing in the record says from where",),
        (),
        finding.evidence,
    )


def _candidate(
    level: Level,
    what: str,
    uid: int | None,
    supports: Iterable[str],
    against: tuple[str, ...],
    alternatives: tuple[str, ...],
    evidence: tuple[Citation, ...],
) -> Candidate:
    confidence = 1.0
    for each in alternatives:
        confidence *= 1 - SHARES[each]
    if level == "A0":
        confidence = 0.0
    return Candidate(
        level=level,
        what=what,
        uid=uid,
        confidence=round(confidence, 2),
        supports=tuple(supports),
        against=against,
        alternatives=tuple(dict.fromkeys(alternatives)),
        evidence=evidence,
    )


def _excluded(ranked: tuple[Candidate, ...]) -> Iterator[str]:
    """Accounts that stand behind another one for the same act."""
    for one in ranked:
        if "session and account contradict each other" in one.alternatives:
            yield f"{one.what}: {one.against[0]}"


def _sentence(finding: Finding, first: Candidate, facts: Facts) -> str:
    """In the words that may be used: host, process, account; and what is not known."""
    where = f"On host {facts.host}" if facts.host is not None else "On a host that was not recorded"
    step = f" (step {finding.subject.step})" if finding.subject.step is not None else ""
    if first.level in ("A0", "A1"):
        return f"{where}: {finding.message}{step}. The record does not show which process or account did it."
    return (
        f"{where}, {first.what}: {finding.message}{step}. Confidence {first.confidence:.0%}. "
        f"We have no independent evidence of who controlled it at that time."
    )


def _rung(level: Level) -> int:
    return int(level[1])


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except (KeyError, OverflowError):
        return f"uid {uid}"


def _moment(nanoseconds: int) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(nanoseconds // 10**9, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _login(value: object) -> int | None:
    """An audit uid or session as recorded (a number, or its text); None where there was no login."""
    number = int(value) if isinstance(value, str) and value.isdigit() else _whole(value)
    return None if number is None or number == NO_LOGIN else number
