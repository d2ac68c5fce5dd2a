"""Everyone the evidence of an incident names, and who approved what it rests on; and whether a card is one of them.

    subjects = subjects_of(home, incidents, leaves=leaves)
    hits = named(card, subjects, also=process_accounts())

Taken from the evidence: accounts and logins among the candidates, those spoken against, every uid in the records a
finding cites, the owner of the run, git authors and committers of the lines named, whoever last changed lines of
the lock and the settings beside it, their owners, and the key that signed the lock. An account is not a
person, and git authors can be written by anybody: that is why some exclusions can be lifted by two people
(`Subject.firm`), so that nobody is kept out of a case by being framed.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainguard.archive import LogLeaves, RunReader
from trainguard.cases.identity import Card
from trainguard.cases.records import Subject, payload_of
from trainguard.digest import sha256_hex
from trainguard.errors import MalformedEvidence, TrainguardError
from trainguard.evidence import Evidence
from trainguard.home import Home
from trainguard.incident import offline
from trainguard.incident.attribute import NO_LOGIN
from trainguard.incident.correlate import Incident
from trainguard.lockfile import LOCK_NAME, parse_lock

FIRST_LOGIN_UID = 1000
"""Below it stand the system's own accounts, which are nobody's alone (login.defs, UID_MIN)."""
ACCOUNT = re.compile(r"account (?:(?P<name>[^\s()]{1,64}) \()?uid (?P<uid>\d{1,10})\)?")
"""As candidates write accounts (incident/attribute.py): `account insider (uid 1002)`, `account uid 1002`."""
COMMITTED = re.compile(r"(?:by|names) ([^<>;:]{1,100}) <([^<>\s]{1,128})>")
"""As candidates write what git says: `from commit 0123456789ab by A B <a@example.org>`."""
UIDS = frozenset({"uid", "loginuid", "euid"})
DEPTH = 6
PLACES = 64
"""Lines of code asked of git, at most."""
APPROVING = (LOCK_NAME, "trainguard.toml")
"""Files beside a run that say what is approved."""
GIT_SECONDS = 10.0
LIMIT = 400
"""Subjects kept."""
_GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "--no-pager")


def subjects_of(home: Home, incidents: Sequence[Incident], *, leaves: LogLeaves | None = None) -> tuple[Subject, ...]:
    """Everyone named, each once, firm before liftable. Reads records and git; whatever cannot be read names nobody."""
    if leaves is None and home.log.is_dir():
        leaves = LogLeaves(home)
    found: list[Subject] = []
    for incident in incidents:
        found.extend(_candidates(incident))
        found.extend(_in_records(incident, _read(home, incident.run, leaves)))
        found.extend(_authors(incident, _folder(incident.run, leaves)))
    for run in dict.fromkeys(incident.run for incident in incidents):
        found.extend(_approvers(home, run, leaves))
    return _once(found)


def read_bundle(data: bytes) -> tuple[Incident, tuple[Subject, ...]]:
    """The incident of an evidence bundle, checked, and everyone its records name: for a case kept in another folder.

    The keys are the bundle's own: compare their fingerprints (trainguard incident verify). Raises MalformedEvidence.
    """
    try:
        offline.verify(data)
        files = offline.unpack(data)
        incident = msgspec.json.decode(files[offline.INCIDENT], type=Incident)
    except (offline.Refused, msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
        raise MalformedEvidence(f"evidence bundle: {error}") from error
    owners = [uid for name in files if name.startswith("leaves/") for uid in _owners(files[name])]
    records = [record for name in sorted(files) if name.startswith("segments/") for record in _spooled(files[name])]
    found = [*_candidates(incident), *_in_records(incident, records, owners), *_authors(incident, None)]
    return incident, _once(found)


def _owners(entry: bytes) -> Iterator[int]:
    """The account of a run, where the entry is its statement."""
    statement = payload_of(entry, "leaf")
    body = statement.get("predicate")
    if str(statement.get("predicateType")).endswith("/run/v1") and isinstance(body, dict):
        yield from _uids(body.get("account"), DEPTH)


def _spooled(data: bytes) -> Iterator[Evidence]:
    """The records of a segment that was checked."""
    for line in data.split(b"\n")[:-1]:
        payload = line[65:]
        try:
            yield msgspec.structs.replace(msgspec.json.decode(payload, type=Evidence), hash=sha256_hex(payload))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue  # of another version: what it names is not known here


def _once(found: Iterable[Subject]) -> tuple[Subject, ...]:
    """Each once, firm before liftable."""
    ordered = sorted(found, key=lambda one: not one.firm)
    unique: dict[tuple[str, str], Subject] = {}
    for one in ordered:
        unique.setdefault((one.kind, one.value.casefold()), one)
    return tuple(unique.values())[:LIMIT]


def named(card: Card, subjects: Iterable[Subject], *, also: Iterable[str] = ()) -> list[Subject]:
    """The subjects that this card is, by account, author or key. also: accounts it is known to act under."""
    accounts = {form for account in (*card.accounts, *also) for form in _forms(account)}
    authors = {author.casefold() for author in card.authors} | {card.name.casefold()}
    mine = {"account": accounts, "author": authors, "key": {card.key}}
    return [one for one in subjects if one.value.casefold() in mine[one.kind]]


def process_accounts() -> tuple[str, ...]:
    """Accounts that the kernel says this process acts under; those of the system name nobody and are left out."""
    uids = {os.getuid(), os.geteuid()}
    with contextlib.suppress(OSError, ValueError):
        uids.add(int(Path("/proc/self/loginuid").read_text()))
    return tuple(f"uid {uid}" for uid in sorted(uids) if FIRST_LOGIN_UID <= uid < NO_LOGIN)


def _forms(account: str) -> Iterator[str]:
    """An account by every name it may be written with: `mara`, `uid 1007`."""
    text = account.casefold().strip()
    yield text
    number = text.removeprefix("uid ")
    if number.isdigit():
        yield f"uid {number}"
        try:
            yield pwd.getpwuid(int(number)).pw_name.casefold()
        except (KeyError, OverflowError):
            return
    else:
        try:
            yield f"uid {pwd.getpwnam(account).pw_uid}"
        except (KeyError, ValueError):
            return


# -- what an incident says ---------------------------------------------------------------------------------------------


def _candidates(incident: Incident) -> Iterator[Subject]:
    for candidate in incident.attribution.candidates:
        firm = "session and account contradict each other" not in candidate.alternatives
        for match in ACCOUNT.finditer(candidate.what):
            yield from _account(match, f"a candidate of incident {incident.id}", firm=firm)
        if candidate.uid is not None:
            yield _uid(candidate.uid, f"a candidate of incident {incident.id}", firm=firm)
        for text in (*candidate.supports, *candidate.against):
            for author in COMMITTED.finditer(text):
                for value in author.groups():
                    yield Subject(kind="author", value=value, why=f"named by git in incident {incident.id}", firm=False)
    for text in incident.attribution.excluded:
        for match in ACCOUNT.finditer(text):
            yield from _account(match, f"named in incident {incident.id}, and spoken against", firm=False)


def _account(match: re.Match[str], why: str, *, firm: bool) -> Iterator[Subject]:
    yield _uid(int(match["uid"]), why, firm=firm)
    if match["name"]:
        yield Subject(kind="account", value=match["name"], why=why, firm=firm)


def _uid(uid: int, why: str, *, firm: bool) -> Subject:
    return Subject(kind="account", value=f"uid {uid}", why=why, firm=firm)


def _in_records(incident: Incident, records: Iterable[Evidence], owners: Iterable[int] = ()) -> Iterator[Subject]:
    """Uids in the records that the findings cite, and the account that owns the run."""
    cited = {citation.hash for finding in incident.findings for citation in finding.evidence}
    owning = set(owners)
    yield from (_uid(uid, f"runs {incident.run}", firm=False) for uid in sorted(owning))
    for record in records:
        if record.kind == "start":
            fresh = set(_uids(record.body.get("account"), DEPTH)) - owning
            owning |= fresh
            yield from (_uid(uid, f"runs {incident.run}", firm=False) for uid in sorted(fresh))
        elif record.hash in cited:
            uids = {*_uids(record.body, DEPTH), *(() if record.uid is None else (record.uid,))}
            for uid in sorted(uids - owning):
                yield _uid(uid, f"in evidence of incident {incident.id}", firm=True)


def _read(home: Home, run: str, leaves: LogLeaves | None) -> Iterator[Evidence]:
    try:
        yield from RunReader(home, run, leaves=leaves).records()
    except TrainguardError:
        return  # what does not hold names nobody; the verdict says that it does not hold


def _uids(value: object, depth: int) -> Iterator[int]:
    if depth and isinstance(value, Mapping):
        for key, inner in value.items():
            if key in UIDS and isinstance(inner, int | str) and str(inner).isdigit() and int(inner) < NO_LOGIN:
                yield int(inner)
            else:
                yield from _uids(inner, depth - 1)
    elif depth and isinstance(value, list):
        for inner in value[:100]:
            yield from _uids(inner, depth - 1)


# -- who wrote the lines, who approved them ----------------------------------------------------------------------------


def _folder(run: str, leaves: LogLeaves | None) -> Path | None:
    """Where the run was started: what its relative paths are relative to."""
    begin = (leaves.runs.get(run) if leaves is not None else None) or {}
    return next((Path(folder) for folder in _texts(begin.get("cwd"))), None)


def _authors(incident: Incident, folder: Path | None) -> Iterator[Subject]:
    places = dict.fromkeys(finding.subject.path for finding in incident.findings if finding.subject.path)
    for place in list(places)[:PLACES]:
        name, _, line = place.rpartition(":")
        path, lines = (Path(name), f"{line},{line}") if name and line.isdigit() else (Path(place), None)
        path = folder / path if folder is not None else path
        for author in blamed(path, lines):
            yield Subject(kind="author", value=author, why=f"wrote {place[:200]}", firm=False)


def _approvers(home: Home, run: str, leaves: LogLeaves | None) -> Iterator[Subject]:
    """Signer of the lock; owner and git authors of the lock and of the settings beside it."""
    begin = (leaves.runs.get(run) if leaves is not None else None) or {}
    yield from _lock_signer(home, begin, run)
    for folder in _texts(begin.get("cwd")):
        for path in (Path(folder) / name for name in APPROVING):
            why = f"approved by {path.name} of run {run}"
            try:
                yield _uid(path.lstat().st_uid, why, firm=False)
            except OSError:
                continue
            for author in blamed(path, None):
                yield Subject(kind="author", value=author, why=why, firm=False)


def _lock_signer(home: Home, begin: Mapping[str, Any], run: str) -> Iterator[Subject]:
    for digest in _texts(begin.get("lock")):
        try:
            signer = parse_lock(home.blob(digest), where="lock").signer
        except TrainguardError:
            continue
        yield Subject(kind="key", value=signer, why=f"signed the lock of run {run}", firm=True)


def _texts(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else ()


def blamed(path: Path, lines: str | None) -> tuple[str, ...]:
    """Authors and committers of a file or of some of its lines (`first,last`); empty where git cannot say.

    The committed version is asked, so that git reads no file through a filter the repository configures; a line that
    is not there has the authors of the whole file. The repository may be the attacker's: everything is off that could
    make git run a program.
    """
    said = _blame(path, ("-L", lines)) if lines else None
    return _people(said if said is not None else _blame(path, ()) or b"")


def _blame(path: Path, which: tuple[str, ...]) -> bytes | None:
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            [*_GIT, "blame", "--porcelain", "--no-textconv", *which, "HEAD", "--", path.name],
            cwd=path.parent,
            env=environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return done.stdout if done.returncode == 0 else None


def _people(porcelain: bytes) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for line in porcelain[: 4 << 20].decode("utf-8", "replace").splitlines():
        field, _, value = line.partition(" ")
        if field in ("author", "committer", "author-mail", "committer-mail"):
            value = value.strip().strip("<>")
            if value and value not in ("Not Committed Yet", "not.committed.yet", "External file (--contents)"):
                found[value[:128]] = None
    return tuple(found)
