"""Who and what: from a finding to the host, process and account the record shows, with what speaks against it.

    told = attribute(findings, facts)
    told.candidates, told.account, told.sentence

The ladder (threat model, section 8.2): A0 effect only, A1 host, A2 process and its ancestry, A3 account or session.
The software stops at A3; A4 (corroborated from elsewhere) and A5 (admitted, or proved outside the digital) are entered
by people. An account is not a person: it may be shared, stolen, or used to frame its owner. So an account under which
something was done and the login session from which it was done are separate candidates, and where they contradict
each other the session is the stronger one: su and sudo change a process's account, its audit login is set once.

A process that cron or a timer started did what its script says, and not what its account chose just then: if the script
is another account's, it is followed there. A file tells of its owner as the record met it; read from the disk, the
owner counts only while the inode is as it was at the act, and nobody's number is nobody.

What a process ran counts as much as its account: a file that others may write, or another's, or none that is known
while nobody was there, speaks for nobody in particular. The owner of a file that is as it was committed is whoever
pulled it.

A process of the job acts under the account that started the job, whoever wrote the code that it runs: such an act is
followed to the file that holds the line, never to the job's own account. And a trace that would look the same whoever
had left it (a file that others may write, a file of root) does not outrank the host.

A score is what is left of 1 after every alternative has taken its share, never a feeling: see SHARES. The confidence
that is shown for an account is that score, or how often scripted truth bears such a one out where that is less.
"""

from __future__ import annotations

import datetime
import math
import pwd
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from trainguard.evidence import Evidence
from trainguard.finding import Citation, Finding
from trainguard.incident.calibration import calibrated
from trainguard.incident.traces import HERE, Authorship, Inode, Sources

Level = Literal["A0", "A1", "A2", "A3"]
NO_LOGIN = 4294967295
"""What the kernel gives as audit uid or session where there was no login: (uint32) -1."""

SHARES: dict[str, float] = {
    "shared account": 0.10,
    "stolen credentials": 0.05,
    "an honest bug": 0.10,
    "hardware": 0.05,
    "others could write it": 0.50,
    "written through a shared folder": 0.15,
    "root stands for whoever administers the host": 0.50,
    "it is the account that started the run": 0.50,
    "the cause is open: honest code does this too": 0.50,
    "the process may have been steered by what it read": 0.10,
    "session and account contradict each other": 0.40,
    "no login is recorded": 0.15,
    "any process or account of that host": 0.50,
    "no account stands behind that number": 0.50,
    "the file was changed after the act": 0.50,
    "an older file was put in its place": 0.50,
    "it lies in another account's folder": 0.50,
    "it started unattended, from a file of another account": 0.50,
    "it started unattended, and what it ran is not known": 0.25,
    "it is a service that root set up": 0.50,
    "it ran a file of another account": 0.50,
    "it ran in a container, whose numbers and paths are its own": 0.50,
    "it came with a checkout of a repository": 0.50,
    "what lies there now was not changed at the time": 0.50,
}
"""Alternative → share of the score it takes; what is left is multiplied, so doubts never add up to certainty.

A half is taken by whatever makes a trace worth no more than "somebody on that host": then the host stands first.
"""

NOBODY = frozenset({65533, 65534})
"""What file servers and user namespaces make of root, and of numbers that they do not know."""
UNATTENDED = frozenset({"cron", "crond", "anacron", "atd", "fcron", "systemd"})
ATTENDED = frozenset({"sshd", "login", "su", "sudo", "tmux", "screen", "gnome-terminal", "agetty"})
"""Programs in a process's ancestry that tell whether anybody chose the moment it began."""
ENGINES = frozenset({"containerd-shim", "containerd-shim-runc-v2", "conmon", "dockerd", "crio", "runc", "crun"})
"""Programs that start what runs in a container."""
TICKS_UNKNOWN = -1

FINDINGS_LIMIT = 64
"""Findings of one incident that are followed to their traces, worst first."""
OPENS_LIMIT = 100_000
MOVED_NS = 60 * 10**9
"""A file whose content is so much older than its inode's last change was moved, or had its times set."""
SUPPORTS_LIMIT = 12
JOB_KINDS = ("kill", "open", "code")
"""Kinds of frames whose records attribution reads, beside those of the supervisor."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to "from where?", with its evidence."""

    level: Level
    what: str
    """`account victim-b (uid 1001)`, `login session 7 of account insider (uid 1002)`, `process 412`, `host node-3`."""
    uid: int | None = None
    """Of the account or login; None for processes and hosts, which are no accounts."""
    score: float
    """What is left of 1 after each alternative has taken its share."""
    confidence: float
    """The score; of an account or login no more than how often such a one was right (calibration.py). Candidates stand
    in its order."""
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
    around: tuple[str, ...] = ()
    """Who started the run, from which login, and through which scheduler: circumstances, not candidates."""

    @property
    def account(self) -> Candidate | None:
        """The account or login session the record points to; None where the host is as likely as any of them."""
        for candidate in self.candidates:
            if candidate.level == "A3":
                return candidate
            if candidate.level in ("A0", "A1"):
                return None
        return None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the record of a run says beside its findings."""

    host: str | None = None
    uid: int | None = None
    """Account that started the run."""
    loginuid: int | None = None
    session: int | None = None
    submitted: tuple[str, ...] = ()
    """How the job came to this host, in words; a claim of its environment."""
    began_ns: int | None = None
    """Clock of the host when the run began, nanoseconds since the epoch."""
    pids: Mapping[int, frozenset[int]] = {}
    """The job's own processes: pid → start ticks of those that had it; TICKS_UNKNOWN where they were not recorded."""
    by_hash: Mapping[str, Evidence] = {}
    """Records that findings cite, by hash."""
    opens: Mapping[str, Mapping[str, Any]] = {}
    """SHA-256 → what the run said of a file with that content when it opened it."""


class _Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A file that an act leads to."""

    path: str
    line: int | None = None
    how: str
    """What the file has to do with it: `its content changed while the run read it`."""
    then: Inode | None = None
    """Owner and modes when the run met it, where the record has them."""
    moved: bool = False
    """Whether something was done to the file itself; False: it is where the code lies."""
    during: bool = False
    """Whether its content became another while the run went on."""


def facts_of(records: Iterable[Evidence], findings: Iterable[Finding]) -> Facts:
    """The facts in a run's records that its findings rest on."""
    wanted = {citation.hash for finding in findings for citation in finding.evidence}
    start: Mapping[str, Any] = {}
    kept: dict[str, Evidence] = {}
    pids: dict[int, set[int]] = {}
    began: int | None = None
    opens: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if record.kind == "start" and not start:
            start, began = record.body, record.at
        if record.hash in wanted and record.hash is not None:
            kept[record.hash] = record
        if record.kind == "process" and record.body.get("of_the_job") is True and record.pid is not None:
            ticks = _whole(record.body.get("start_ticks"))
            pids.setdefault(record.pid, set()).add(TICKS_UNKNOWN if ticks is None else ticks)
        elif record.kind == "ledger" and isinstance(record.body.get("child"), int):
            pids.setdefault(record.body["child"], set()).add(TICKS_UNKNOWN)
        elif record.kind == "open":
            _keep_opens(record, opens)
    account = start.get("account")
    account = account if isinstance(account, dict) else {}
    host = start.get("host")
    return Facts(
        host=host if isinstance(host, str) else None,
        uid=_whole(account.get("uid")),
        loginuid=_login(account.get("loginuid")),
        session=_login(account.get("session")),
        submitted=tuple(_submitted(start.get("submitter"))),
        began_ns=began,
        pids={pid: frozenset(ticks) for pid, ticks in pids.items()},
        by_hash=kept,
        opens=opens,
    )


def attribute(findings: Finding | Sequence[Finding], facts: Facts, *, sources: Sources = HERE) -> Attribution:
    """Candidates for what findings that belong together show; the sentence is about the first of them.

    sources: who owns files and who committed lines; by default as they lie on this machine now.
    """
    group = [findings] if isinstance(findings, Finding) else list(findings)
    merged: dict[tuple[str, str], Candidate] = {}
    for finding in group[:FINDINGS_LIMIT]:
        for candidate in _candidates(finding, facts, sources):
            key = (candidate.level, candidate.what)
            merged[key] = _stronger(merged[key], candidate) if key in merged else candidate
    if facts.host is not None:
        merged.setdefault(("A1", f"host {facts.host}"), _host(group[0], facts))
    # Where two are as likely, the one that claims less stands first.
    ranked = tuple(sorted(merged.values(), key=lambda one: (-one.confidence, -one.score, _rung(one.level), one.what)))
    ranked = ranked or (_effect_only(group[0]),)
    return Attribution(
        candidates=ranked,
        excluded=tuple(dict.fromkeys(_excluded(ranked, facts))),
        sentence=_sentence(group[0], ranked[0], facts),
        around=tuple(_around(facts)),
    )


def _candidates(finding: Finding, facts: Facts, sources: Sources) -> Iterator[Candidate]:
    """What one finding shows: first what the kernel saw, then the files it leads to."""
    traces: list[_Trace] = []
    outside = False
    for citation in finding.evidence:
        record = facts.by_hash.get(citation.hash)
        if record is None:
            continue
        sender = _sender(record)
        if sender is not None:
            within = _is_of_the_job(sender, facts)
            outside = outside or not within
            lent = () if within else tuple(_from_script(sender, finding, facts, sources))
            ran = () if within or lent else tuple(_what_it_ran(sender, sources))
            yield from _from_process(sender, facts, (citation,), within=within, lent=bool(lent), ran=ran)
            yield from lent
        traces.extend(_in_record(record, finding, facts))
    if outside:
        return
    if not traces and finding.subject.path is not None:
        path, line = _file_of(finding.subject.path)
        if path.startswith("/"):
            traces.append(_Trace(path=path, line=line, how="it holds the line"))
    for trace in traces:
        yield from _from_file(trace, finding, facts, sources)


def _stronger(a: Candidate, b: Candidate) -> Candidate:
    """One candidate that two findings lead to: the stronger case, with what supports either."""
    best, other = (a, b) if a.score >= b.score else (b, a)
    supports = tuple(dict.fromkeys([*best.supports, *other.supports]))[:SUPPORTS_LIMIT]
    against = tuple(dict.fromkeys([*best.against, *other.against]))[:SUPPORTS_LIMIT]
    evidence = tuple(dict.fromkeys([*best.evidence, *other.evidence]))[:SUPPORTS_LIMIT]
    return msgspec.structs.replace(best, supports=supports, against=against, evidence=evidence)


# -- a process that the kernel named ---------------------------------------------------------------------------------


def _sender(record: Evidence) -> Mapping[str, Any] | None:
    """The process that a record is about as the one that acted."""
    if record.kind in ("signalled", "outside"):
        sender = record.body.get("sender")
        return sender if isinstance(sender, dict) else None
    if record.kind == "process" and record.body.get("of_the_job") is not True:
        return {**record.body, "pid": record.pid, "uid": record.uid}
    return None


def _is_of_the_job(sender: Mapping[str, Any], facts: Facts) -> bool:
    """Whether a process is one of the job's, or was started by one."""
    named = [(sender.get("pid"), sender.get("start_ticks")), *((step[0], step[1]) for step in _ancestry(sender))]
    return any(_is_same(facts.pids.get(pid), ticks) for pid, ticks in named if isinstance(pid, int))


def _is_same(known: frozenset[int] | None, ticks: object) -> bool:
    """Whether a pid is that of a process we know: numbers are given out again, with the start they differ."""
    if known is None:
        return False
    return not isinstance(ticks, int) or TICKS_UNKNOWN in known or ticks in known


def _ancestry(sender: Mapping[str, Any]) -> list[list[Any]]:
    chain = sender.get("ancestry")
    steps = chain if isinstance(chain, list) else []
    return [step for step in steps if isinstance(step, list) and len(step) > 2 and isinstance(step[0], int)]


def _from_script(sender: Mapping[str, Any], finding: Finding, facts: Facts, sources: Sources) -> Iterator[Candidate]:
    """The owner of the script that a process ran unattended, where that is not the account it ran under."""
    if not _is_unattended(sender) or _is_contained(sender):
        return
    path = _script(sender)
    now = sources.inode(Path(path)) if path is not None else None
    if path is None or now is None or now.uid in {sender.get("uid"), 0, *NOBODY}:
        return
    trace = _Trace(path=path, how="a process that cron or a timer started ran it", moved=True)
    yield from _from_file(trace, finding, facts, sources)


def _is_unattended(sender: Mapping[str, Any]) -> bool:
    programs = {str(step[2]) for step in _ancestry(sender)}
    return bool(programs & UNATTENDED) and not programs & ATTENDED


def _is_service(sender: Mapping[str, Any]) -> bool:
    """Whether the machine's own systemd started it; an account's timers hang below a second one, the account's."""
    programs = [str(step[2]) for step in _ancestry(sender)]
    return programs.count("systemd") == 1 and set(programs) & UNATTENDED == {"systemd"} and not set(programs) & ATTENDED


def _is_contained(sender: Mapping[str, Any]) -> bool:
    return any(str(step[2]) in ENGINES for step in _ancestry(sender))


def _what_it_ran(sender: Mapping[str, Any], sources: Sources) -> Iterator[tuple[str, str]]:
    """What the file that a process ran takes from its account: an alternative, and its reason."""
    if _is_contained(sender):
        yield "it ran in a container, whose numbers and paths are its own", "who was in that container is not recorded"
        return
    if _is_service(sender):
        yield (
            "it is a service that root set up",
            "systemd started it for the machine: root chose the account it runs under",
        )
    path, unattended = _script(sender), _is_unattended(sender)
    now = sources.inode(Path(path)) if path is not None else None
    if now is None:
        command = sender.get("cmdline")
        told = isinstance(command, list) and "-c" in command and path is None
        if unattended and not told:
            what = f"{path} is not there any more" if path is not None else "its command names no file"
            yield "it started unattended, and what it ran is not known", f"nobody was there, and {what}"
        return
    if now.uid != sender.get("uid") and (unattended or now.uid != 0):
        yield "it ran a file of another account", f"it ran {path}, which belongs to account {_name(now.uid)} now"
    if now.writable_by_others or now.replaceable_by_others:
        yield "others could write it", f"it ran {path}, which others may write or replace"


def _script(sender: Mapping[str, Any]) -> str | None:
    """The file that a command line runs: its first word that is a path, the program itself apart."""
    command = sender.get("cmdline")
    words = [str(word) for word in command[:8]] if isinstance(command, list) else []
    exe, cwd = sender.get("exe"), sender.get("cwd")
    for word in words:
        if word.startswith("/") and word != exe and "/bin/python" not in word:
            return word
        if word.endswith((".py", ".sh")) and isinstance(cwd, str) and cwd.startswith("/"):
            return f"{cwd}/{word}"
    return None


def _from_process(
    sender: Mapping[str, Any],
    facts: Facts,
    cites: tuple[Citation, ...],
    *,
    within: bool,
    lent: bool = False,
    ran: Sequence[tuple[str, str]] = (),
) -> Iterator[Candidate]:
    """A process, the account it ran under, and the login it came from.

    lent: it ran another account's file, and nobody chose the moment. ran: what the file it ran takes from its account.
    """
    pid, uid = _whole(sender.get("pid")), _whole(sender.get("uid"))
    login, session = _login(sender.get("loginuid")), _login(sender.get("session"))
    command = sender.get("cmdline")
    words = " ".join(str(word) for word in command)[:200] if isinstance(command, list) else ""
    name = f"process {pid} ({words or sender.get('comm') or 'command not recorded'})"
    seen = [f"the kernel named {name} as the one that acted"]
    ancestry = [str(step[2])[:60] for step in _ancestry(sender)]
    if ancestry:
        seen.append(f"it descends from {' < '.join(ancestry[:6])}")
    if uid is not None:
        seen.append(f"it ran under account {_name(uid)}")
    if within:
        seen.append("it is a process of the job itself: it does what the code it runs says")
    steered = ("the process may have been steered by what it read",)
    yield _candidate("A2", name, None, seen, (), steered, cites)
    if uid is not None:
        yield from _accounts(uid, login, session, facts, seen, cites, within=within, lent=lent, ran=ran)


def _accounts(
    uid: int,
    login: int | None,
    session: int | None,
    facts: Facts,
    seen: Sequence[str],
    cites: tuple[Citation, ...],
    *,
    within: bool,
    lent: bool,
    ran: Sequence[tuple[str, str]],
) -> Iterator[Candidate]:
    """The account of a process, and the login session where that is another's: su and sudo keep the audit login."""
    doubts = ["shared account", "stolen credentials", *(alternative for alternative, _ in ran)]
    if within:
        doubts.append("an honest bug")
    against = tuple(line for _, line in ran)
    if login is not None and login != uid:
        told = [*seen, f"its audit login is {_name(login)}, session {session}: set at login, kept through su and sudo"]
        other = (f"the process ran under account {_name(uid)}, not under the account that logged in", *against)
        yield _candidate(
            "A3", f"login session {session} of account {_name(login)}", login, told, other, tuple(doubts), cites
        )
        against += (f"the login it came from is {_name(login)}, so the account was used from somebody else's session",)
        doubts.append("session and account contradict each other")
    elif login is None:
        doubts.append("no login is recorded")
    if within:
        against += ("it is the account that started the run: every process of the job has it, whoever wrote its code",)
        doubts.append("it is the account that started the run")
    elif uid == facts.uid and login in (None, facts.loginuid):
        against += ("it is the account that started the run itself, and its owner may have ended what she began",)
        doubts += ["it is the account that started the run", "an honest bug"]
    if lent:
        against += ("nobody was there: cron or a timer ran a file that belongs to another account",)
        doubts.append("it started unattended, from a file of another account")
    if uid == 0:
        doubts.append("root stands for whoever administers the host")
    if uid in NOBODY:
        doubts.append("no account stands behind that number")
    yield _candidate("A3", f"account {_name(uid)}", uid, seen, against, tuple(doubts), cites)


# -- a file ------------------------------------------------------------------------------------------------------------


def _in_record(record: Evidence, finding: Finding, facts: Facts) -> Iterator[_Trace]:
    """The files that a record says something was done to, as it met them."""
    body = record.body
    if record.kind == "open":
        yield from _in_opens(body.get("files"), finding)
    elif record.kind == "opened" and isinstance(body.get("path"), str):
        yield _Trace(path=body["path"], how="it was read as a model", then=_owner(body.get("owner")), moved=True)
    elif record.kind == "code" and isinstance(body.get("ran"), dict):
        yield from _in_ran(body["ran"], facts)


def _in_opens(files: object, finding: Finding) -> Iterator[_Trace]:
    lines = [line for line in files if isinstance(line, dict)] if isinstance(files, list) else []
    for line in lines[:1000]:
        path = line.get("path")
        if not isinstance(path, str) or (len(lines) > 1 and path not in finding.message):
            continue
        changed = line.get("changed") is True
        how = "its content changed while the run read it" if changed else "the run read it"
        yield _Trace(path=path, how=how, then=_met(line), moved=True, during=changed)


def _in_ran(ran: Mapping[str, Any], facts: Facts) -> Iterator[_Trace]:
    """Code that ran from a file, or from text that the run had read from one."""
    file, source = ran.get("file"), ran.get("source")
    line = facts.opens.get(source) if isinstance(source, str) else None
    if line is not None and isinstance(line.get("path"), str) and line["path"] != file:
        then = _met(line)
        yield _Trace(path=line["path"], how="its text was run as code", then=then, moved=True)
    elif isinstance(file, str) and file.startswith("/"):
        yield _Trace(path=file, how="it was run", then=_owner(ran.get("owner")), moved=True)


def _from_file(trace: _Trace, finding: Finding, facts: Facts, sources: Sources) -> Iterator[Candidate]:
    """The owner of a file that an act leads to, and who else could have written it."""
    now = sources.inode(Path(trace.path))
    then = trace.then
    owner = then.uid if then is not None else now.uid if now is not None else None
    if owner is None:
        return
    supports, against = list(_owned(trace, owner, now)), []
    alternatives = ["an honest bug", "shared account", "stolen credentials"]
    if then is not None and now is not None and now.uid != then.uid:
        against.append(f"{trace.path} belongs to account {_name(now.uid)} now: it was given away since")
    known = [inode for inode in (then, now) if inode is not None and inode.uid == owner]
    if any(inode.writable_by_others for inode in known):
        modes = ", ".join(f"{inode.mode:04o}" for inode in known if inode.mode is not None)
        against.append(f"others may write it (mode {modes})")
        alternatives.append("others could write it")
    if any(inode.replaceable_by_others for inode in known):
        against.append("others may replace files in its folder")
        alternatives.append("written through a shared folder")
    if owner == 0:
        alternatives.append("root stands for whoever administers the host")
    for alternative, line in _may_be_others(trace, owner, now, finding, facts):
        alternatives.append(alternative)
        against.append(line)
    if owner == facts.uid:
        against.append("it is the account that started the run itself")
        alternatives.append("it is the account that started the run")
    elif not trace.moved and finding.outcome != "violated":
        alternatives.append("the cause is open: honest code does this too")
    wrote = sources.lines(Path(trace.path), trace.line) if trace.line is not None else None
    fits = wrote is not None and _fits(wrote, owner)
    (supports if fits else against).extend(_committed(wrote))
    if wrote is not None and wrote.commit and not (fits and wrote.signed == "good"):
        against.append("the file is as it was committed: it belongs to whoever pulled it")
        alternatives.append("it came with a checkout of a repository")
    cites = finding.evidence
    if facts.loginuid is not None and owner == facts.uid != facts.loginuid:
        told = [*supports, f"the run was started from login session {facts.session} of account {_name(facts.loginuid)}"]
        yield _candidate(
            "A3",
            f"login session {facts.session} of account {_name(facts.loginuid)}",
            facts.loginuid,
            told,
            (f"the file belongs to account {_name(owner)}",),
            (
                *("an honest bug", "shared account", "stolen credentials"),
                *(("it is the account that started the run",) if trace.moved else ()),
            ),
            cites,
        )
        against.append(f"the run was started from a login of account {_name(facts.loginuid)}")
        alternatives.append("session and account contradict each other")
    yield _candidate("A3", f"account {_name(owner)}", owner, supports, tuple(against), tuple(alternatives), cites)


def _may_be_others(
    trace: _Trace, owner: int, now: Inode | None, finding: Finding, facts: Facts
) -> Iterator[tuple[str, str]]:
    """What makes the owner of a file say little of who did it: an alternative, and its reason."""
    then = trace.then
    if owner in NOBODY:
        yield "no account stands behind that number", "a file server made a number of its own of the owner"
    acted = max((facts.by_hash[c.hash].at for c in finding.evidence if c.hash in facts.by_hash), default=None)
    changed = now.changed_ns if now is not None else None
    if then is None and acted is not None and changed is not None and changed > acted:
        yield (
            "the file was changed after the act",
            f"its inode was changed at {_moment(changed)}, after the act: who owned it then is not recorded",
        )
    if trace.during and then is None and changed is not None and changed < (facts.began_ns or 0):
        yield (
            "what lies there now was not changed at the time",
            f"its content became another in the run, but what lies there now was last changed at {_moment(changed)}",
        )
    known = [inode for inode in (then, now) if inode is not None and inode.uid == owner]
    if any(inode.replaceable_by_others for inode in known) and then is not None and _is_older(then):
        yield (
            "an older file was put in its place",
            "its content is older than its place in that folder, where others may put it",
        )
    for inode in known[-1:]:
        if inode.folder_uid not in (None, 0, owner) and inode.folder_mode is not None and not inode.folder_mode & 0o022:
            yield (
                "it lies in another account's folder",
                f"its folder belongs to account {_name(inode.folder_uid or 0)}, who alone can put files there",
            )


def _is_older(inode: Inode) -> bool:
    """Whether a file's content is older than its inode's last change, as that of one that was moved is."""
    written, changed = inode.written_ns, inode.changed_ns
    return written is not None and changed is not None and changed - written > MOVED_NS


def _owned(trace: _Trace, owner: int, now: Inode | None) -> Iterator[str]:
    yield f"{trace.path}: {trace.how}"
    if trace.then is not None:
        yield f"{trace.path} belonged to account {_name(owner)} when the run met it"
    elif now is not None:
        changed = f"; its inode last changed at {_moment(now.changed_ns)}" if now.changed_ns is not None else ""
        yield f"{trace.path} belongs to account {_name(owner)} now{changed}"


def _committed(wrote: Authorship | None) -> Iterator[str]:
    """What git says of the line; an author is whatever somebody typed, and a signature is the committer's."""
    if wrote is None:
        return
    other = wrote.committer and wrote.committer != wrote.identity
    by = f"{wrote.identity}, as committed by {wrote.committer}" if other else wrote.identity
    if not wrote.commit:
        yield "the file is not as it was committed: git does not say who changed it"
    elif wrote.signed == "good":
        yield (
            f"git: the line comes from commit {wrote.commit[:12]}, which names {by} as author; whoever committed it "
            f"signed it, and the signature holds by key {wrote.key}"
        )
    elif wrote.signed == "bad":
        yield f"git: the line comes from commit {wrote.commit[:12]} by {by}, whose signature does not hold"
    else:
        yield (
            f"git names {by} as author of the line (commit {wrote.commit[:12]}, "
            f"{'not signed' if wrote.signed == 'none' else 'signature not checked'}: anybody can write that)"
        )


def _fits(wrote: Authorship, owner: int) -> bool:
    """Whether git names the owner of the file as the one who committed the line, by a word and not by a part of one."""
    words = re.split(r"[^\w.-]+", wrote.committer or wrote.identity)
    return bool(wrote.commit) and _name(owner).split(" ", 1)[0] in words


def _file_of(path: str) -> tuple[str, int | None]:
    """The file and line of `file` or `file:line`."""
    name, _, line = path.rpartition(":")
    return (name, int(line)) if name and line.isdigit() and len(line) < 10 else (path, None)


def _owner(value: object) -> Inode | None:
    """`[uid, mode, uid of the folder, its mode]` as records have it."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    uid, mode, folder_uid, folder_mode = (_whole(part) for part in value)
    if uid is None or mode is None:
        return None
    return Inode(uid=uid, mode=mode & 0o7777, folder_uid=folder_uid, folder_mode=folder_mode)


def _met(line: Mapping[str, Any]) -> Inode | None:
    """What a process saw of a file when it opened it."""
    uid, changed, written = (_whole(line.get(name)) for name in ("uid", "ctime_ns", "mtime_ns"))
    return None if uid is None else Inode(uid=uid, changed_ns=changed, written_ns=written)


# -- what is left ------------------------------------------------------------------------------------------------------


def _keep_opens(record: Evidence, opens: dict[str, Mapping[str, Any]]) -> None:
    files = record.body.get("files")
    for line in files if isinstance(files, list) else ():
        if isinstance(line, dict) and isinstance(line.get("sha256"), str) and len(opens) < OPENS_LIMIT:
            opens.setdefault(line["sha256"], line)


def _submitted(value: object) -> Iterator[str]:
    """`submitter` of the run's first record in words."""
    if not isinstance(value, dict):
        return
    for system, fields in list(value.items())[:8]:
        if isinstance(fields, dict):
            words = ", ".join(f"{str(name)[:40]} {str(text)[:100]}" for name, text in list(fields.items())[:12])
            yield f"{str(system)[:40]}: {words} (claimed by the job's environment)"


def _around(facts: Facts) -> Iterator[str]:
    if facts.uid is not None:
        login = (
            f", from login session {facts.session} of account {_name(facts.loginuid)}"
            if facts.loginuid is not None
            else ""
        )
        yield f"the run was started by account {_name(facts.uid)}{login or ', without a recorded login'}"
    yield from facts.submitted


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
    alternatives = tuple(dict.fromkeys(alternatives))
    score = 0.0 if level == "A0" else round(math.prod(1 - SHARES[each] for each in alternatives), 2)
    return Candidate(
        level=level,
        what=what,
        uid=uid,
        score=score,
        confidence=calibrated(score) if level == "A3" else score,
        supports=tuple(supports)[:SUPPORTS_LIMIT],
        against=against[:SUPPORTS_LIMIT],
        alternatives=alternatives,
        evidence=evidence,
    )


def _excluded(ranked: tuple[Candidate, ...], facts: Facts) -> Iterator[str]:
    """Accounts that the record names and speaks against for the same act."""
    for one in ranked:
        if {"session and account contradict each other", "it is the account that started the run"} & set(
            one.alternatives
        ) and one.against:
            yield f"{one.what}: {one.against[-1]}"
        for line in one.against:
            if line.endswith("it was given away since"):
                yield line


def _sentence(finding: Finding, first: Candidate, facts: Facts) -> str:
    """In the words that may be used: host, time, process, account, file; and what is not known."""
    where = f"On host {facts.host}" if facts.host is not None else "On a host that was not recorded"
    record = next((facts.by_hash[c.hash] for c in finding.evidence if c.hash in facts.by_hash), None)
    when = f" at {_moment(record.at)} by its own clock" if record is not None else ""
    step = f" (step {finding.subject.step})" if finding.subject.step is not None else ""
    if first.level in ("A0", "A1"):
        return f"{where}{when}: {finding.message}{step}. The record does not show which process or account did it."
    named = first.what.split(" (", 1)[0]
    who = "" if finding.message.startswith(f"{named} ") else f", {first.what}"
    return (
        f"{where}{when}{who}: {finding.message}{step}. Confidence {first.confidence:.0%}. "
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
    try:
        moment = datetime.datetime.fromtimestamp(nanoseconds // 10**9, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        return "a time that is no time"
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _login(value: object) -> int | None:
    """An audit uid or session as recorded (a number, or its text); None where there was no login."""
    number = int(value) if isinstance(value, str) and value.isdigit() and len(value) < 12 else _whole(value)
    return None if number is None or number == NO_LOGIN else number
