"""A colleague who is wrongly suspected: constellations of shared houses in which no account may be pointed at wrongly.

Each says what the kernel, the disk and git showed, and whom the record allows to point at; nobody where two stories fit
equally well. `points_at` is an account's or login's uid, or None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from msgspec import structs
from tests.unit.render.test_documents import DRAWN, made, text_of

from trainguard.evidence import Evidence
from trainguard.finding import Citation, Finding, Subject
from trainguard.incident import attribute as module
from trainguard.incident.attribute import NO_LOGIN, Attribution, attribute, facts_of
from trainguard.incident.traces import Authorship, Inode, Sources

OWNER, VICTIM, INSIDER, SERVICE, COLLEAGUE, RUNNER = 1001, 1002, 1003, 1004, 1005, 998
NAMES = {OWNER: "owner", VICTIM: "victim-b", INSIDER: "insider", SERVICE: "svc", COLLEAGUE: "colleague", RUNNER: "ci"}
HASH, HOST, NOW = "c" * 64, "node-3", 1_760_000_000 * 10**9
DAY = 86_400 * 10**9
CRON, TIMER, SSH = ("sh", "cron", "systemd"), ("systemd", "systemd"), ("bash", "sshd", "systemd")
"""Ancestries; an account's timers hang below a systemd of its own."""


@pytest.fixture(autouse=True)
def accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_name", lambda uid: f"{NAMES[uid]} (uid {uid})" if uid in NAMES else f"uid {uid}")


def start(**account: Any) -> Evidence:
    known = {"uid": OWNER, "loginuid": OWNER, "session": 3} | account
    return Evidence(n=0, at=NOW, source="supervisor", kind="start", body={"host": HOST, "account": known})


def rank(pid: int, ticks: int) -> Evidence:
    """A process of the job as it greeted."""
    body = {"of_the_job": True, "start_ticks": ticks}
    return Evidence(n=1, at=NOW, source="supervisor", kind="process", body=body, pid=pid, uid=OWNER, process=0)


def inode(uid: int, mode: int = 0o644, *, folder: tuple[int, int] = (0, 0o755), changed: int = NOW - DAY) -> Inode:
    return Inode(
        uid=uid, mode=mode, changed_ns=changed, written_ns=changed, folder_uid=folder[0], folder_mode=folder[1]
    )


def disk(files: Mapping[str, Inode] | None = None, lines: Mapping[str, Authorship] | None = None) -> Sources:
    return Sources(
        inode=lambda path: (files or {}).get(str(path)), lines=lambda path, line: (lines or {}).get(f"{path}:{line}")
    )


def killed(
    *programs: str, sources: Sources | None = None, ranks: tuple[Evidence, ...] = (), **sender: Any
) -> Attribution:
    """A signal from a process; programs: its ancestry, nearest first."""
    known: dict[str, Any] = {"pid": 4321, "start_ticks": 777, "comm": "python3", "exe": "/usr/bin/python3"}
    known |= {"cmdline": ["python3", "tidy.py"], "cwd": "/srv", "loginuid": NO_LOGIN, "session": NO_LOGIN}
    known |= {"ancestry": [[4000 - 10 * at, 900 - at, word, [word]] for at, word in enumerate(programs)]} | sender
    record = Evidence(n=7, at=NOW, source="supervisor", kind="outside", body={"sender": known}, hash=HASH, leaf=9)
    finding = Finding(
        check="kills",
        outcome="violated",
        techniques=("F8",),
        subject=Subject(run="r", rank=1, step=40),
        message="a process outside the job sent SIGKILL to rank 1",
        evidence=(Citation(leaf=9, hash=HASH),),
    )
    return attribute(finding, facts_of([start(), *ranks, record], [finding]), sources=sources or disk())


def line_of(
    path: str, owner: Inode, wrote: Authorship | None = None, *, outcome: Any = "violated", **account: Any
) -> Attribution:
    """Code that lies in a file did it."""
    finding = Finding(
        check="hooks",
        outcome=outcome,
        techniques=("B5",),
        subject=Subject(run="r", rank=0, step=12, path=f"{path}:7"),
        message="a hook that nobody approved",
    )
    lines = {f"{path}:7": wrote} if wrote is not None else {}
    return attribute(finding, facts_of([start(**account)], [finding]), sources=disk({path: owner}, lines))


def read(path: str, now: Inode | None, *, uid: int | None, **account: Any) -> Attribution:
    """A file whose content changed while the run read it. uid: its owner as the process met it."""
    line: dict[str, Any] = {"path": path, "sha256": "b" * 64, "mode": "r", "changed": True}
    line |= {"uid": uid, "ctime_ns": NOW, "mtime_ns": NOW} if uid is not None else {}
    record = Evidence(n=7, at=NOW, source="process", kind="open", body={"files": [line]}, hash=HASH, leaf=9)
    finding = Finding(
        check="inputs",
        outcome="violated",
        techniques=("B2",),
        subject=Subject(run="r", rank=0, step=12, path=path),
        message=f"{path} changed while it was read",
        evidence=(Citation(leaf=9, hash=HASH),),
    )
    sources = disk({path: now} if now is not None else {})
    return attribute(finding, facts_of([start(**account), record], [finding]), sources=sources)


def points_at(told: Attribution) -> int | None:
    return told.account.uid if told.account is not None else None


def committed(author: str, committer: str | None = None, **more: Any) -> Authorship:
    more = {"committer": committer} | more if committer is not None else more
    return Authorship(commit="1" * 40, identity=f"{author} <{author}@example.org>", **more)


TIDY = "/srv/tidy.py"

CONSTELLATIONS: dict[str, tuple[int | None, Any]] = {
    # -- shared and borrowed accounts
    "sudo from a shared login to victim-b": (
        SERVICE,
        lambda: killed("bash", "sudo", "bash", "sshd", uid=VICTIM, loginuid=SERVICE, session=4),
    ),
    "run as victim-b by a system service, nobody logged in": (
        None,
        lambda: killed("systemd", uid=VICTIM, cmdline=["python3", "-m", "tidy"]),
    ),
    "a container process with the number of victim-b, by the engine": (
        None,
        lambda: killed("sh", "containerd-shim", "systemd", uid=VICTIM, cmdline=["sh", "-c", "kill -9 31"]),
    ),
    "root in a container, by the engine": (
        None,
        lambda: killed("sh", "containerd-shim", "systemd", uid=0, cmdline=["sh", "-c", "kill -9 31"]),
    ),
    "a number of a user namespace that is no account": (
        None,
        lambda: killed("conmon", "systemd", uid=101003, cmdline=["sh", "-c", "kill -9 31"]),
    ),
    # -- cron, timers, robots
    "cron of victim-b runs victim-b's script that all may write": (
        None,
        lambda: killed(*CRON, uid=VICTIM, cmdline=["python3", TIDY], sources=disk({TIDY: inode(VICTIM, 0o666)})),
    ),
    "cron of victim-b runs victim-b's script in a folder where all may replace it": (
        None,
        lambda: killed(
            *CRON,
            uid=VICTIM,
            cmdline=["python3", TIDY],
            sources=disk({TIDY: inode(VICTIM, 0o644, folder=(0, 0o777))}),
        ),
    ),
    "cron of victim-b runs victim-b's private script": (
        VICTIM,
        lambda: killed(*CRON, uid=VICTIM, cmdline=["python3", TIDY], sources=disk({TIDY: inode(VICTIM)})),
    ),
    "cron of victim-b runs something that is not recorded: her crontab, less surely": (
        VICTIM,
        lambda: killed(*CRON, uid=VICTIM, cmdline=["python3", "-m", "tidy"]),
    ),
    "cron of victim-b runs a script of root": (
        None,
        lambda: killed(*CRON, uid=VICTIM, cmdline=["python3", TIDY], sources=disk({TIDY: inode(0)})),
    ),
    "a timer of victim-b runs a script that was removed since: hers, less surely": (
        VICTIM,
        lambda: killed(*TIMER, uid=VICTIM, cmdline=["python3", TIDY]),
    ),
    "victim-b runs her own script, which all may write, by hand": (
        None,
        lambda: killed(
            *SSH,
            uid=VICTIM,
            loginuid=VICTIM,
            session=5,
            cmdline=["python3", TIDY],
            sources=disk({TIDY: inode(VICTIM, 0o666)}),
        ),
    ),
    "victim-b runs a colleague's script by hand": (
        None,
        lambda: killed(
            *SSH,
            uid=VICTIM,
            loginuid=VICTIM,
            session=5,
            cmdline=["python3", TIDY],
            sources=disk({TIDY: inode(COLLEAGUE)}),
        ),
    ),
    "victim-b types it herself": (
        VICTIM,
        lambda: killed(*SSH, uid=VICTIM, loginuid=VICTIM, session=5, cmdline=["kill", "-9", "31"]),
    ),
    "a build robot, a service of the machine, runs what somebody pushed": (
        None,
        lambda: killed(
            "bash",
            "Runner.Worker",
            "Runner.Listener",
            "systemd",
            uid=RUNNER,
            cmdline=["bash", "/ci/_work/step.sh"],
            sources=disk({"/ci/_work/step.sh": inode(RUNNER)}),
        ),
    ),
    # -- git
    "forged author, and the framed one pulled it": (
        None,
        lambda: line_of("/home/victim-b/repo/hook.py", inode(VICTIM), committed("victim-b")),
    ),
    "victim-b pulled what another committed": (
        None,
        lambda: line_of("/home/victim-b/repo/hook.py", inode(VICTIM), committed("insider")),
    ),
    "victim-b pulled what another committed and signed": (
        None,
        lambda: line_of("/home/victim-b/repo/hook.py", inode(VICTIM), committed("insider", signed="good", key="F00D")),
    ),
    "rebased and signed by another, the author kept": (
        None,
        lambda: line_of(
            "/home/insider/repo/hook.py", inode(COLLEAGUE), committed("victim-b", "insider", signed="good", key="F00D")
        ),
    ),
    "a formatter's commit is the last to touch the line": (
        None,
        lambda: line_of("/home/owner/repo/hook.py", inode(COLLEAGUE), committed("colleague", "ci")),
    ),
    "committed by the build robot": (None, lambda: line_of("/srv/repo/hook.py", inode(RUNNER), committed("ci"))),
    "signed by whoever is called like the owner": (
        VICTIM,
        lambda: line_of(
            "/home/victim-b/repo/hook.py", inode(VICTIM), committed("victim-b", "victim-b", signed="good", key="F00D")
        ),
    ),
    "not as it was committed: changed in the owner's private folder": (
        VICTIM,
        lambda: line_of("/home/victim-b/repo/hook.py", inode(VICTIM), Authorship(commit="")),
    ),
    # -- pids, clocks, file servers, numbers
    "pid of a rank that had ended, used by a stranger": (
        INSIDER,
        lambda: killed(*SSH, pid=31, start_ticks=999, uid=INSIDER, loginuid=INSIDER, session=9, ranks=(rank(31, 500),)),
    ),
    "pid of a rank in the ancestry of a stranger, used anew": (
        INSIDER,
        lambda: killed(
            pid=700,
            start_ticks=999,
            uid=INSIDER,
            loginuid=INSIDER,
            session=9,
            cmdline=["kill", "-9", "32"],
            ancestry=[[31, 950, "bash", ["bash"]], [20, 900, "sshd", ["sshd"]]],
            ranks=(rank(31, 500),),
        ),
    ),
    "the rank itself, by pid and start": (
        None,
        lambda: killed(pid=31, start_ticks=500, uid=OWNER, loginuid=OWNER, session=3, ranks=(rank(31, 500),)),
    ),
    "a file server makes nobody of everybody": (None, lambda: read("/nfs/hook.json", inode(65534), uid=65534)),
    "a file server with its clock ahead, owner met by the run": (
        INSIDER,
        lambda: read("/nfs/hook.json", inode(INSIDER, changed=NOW + DAY), uid=INSIDER),
    ),
    "a file server with its clock ahead, owner not met": (
        None,
        lambda: read("/nfs/hook.json", inode(VICTIM, changed=NOW + DAY), uid=None),
    ),
    "a link of victim-b in a folder of all": (
        None,
        lambda: read("/shared/hook.json", inode(VICTIM, 0o644, folder=(0, 0o777)), uid=None),
    ),
    "an account that was deleted": (4077, lambda: read("/srv/hook.json", inode(4077), uid=4077)),
    "a shared service account's file, in a run that a colleague started": (
        None,
        lambda: read_as(SERVICE, COLLEAGUE),
    ),
    "a hook of a library that a colleague maintains, only suspicious": (
        None,
        lambda: line_of("/shared/lib/hook.py", inode(COLLEAGUE), outcome="suspicious"),
    ),
    "a file that root's deployment put there": (None, lambda: read("/srv/hook.json", inode(0), uid=0)),
}


def read_as(owner: int, login: int) -> Attribution:
    """The run's account owns the file that changed; the run was started from another login."""
    path = "/srv/hook.json"
    line = {"path": path, "sha256": "b" * 64, "mode": "r", "changed": True, "uid": owner}
    line |= {"ctime_ns": NOW, "mtime_ns": NOW}
    record = Evidence(n=7, at=NOW, source="process", kind="open", body={"files": [line]}, hash=HASH, leaf=9)
    finding = Finding(
        check="inputs",
        outcome="violated",
        techniques=("B2",),
        subject=Subject(run="r", rank=0, step=12, path=path),
        message=f"{path} changed while it was read",
        evidence=(Citation(leaf=9, hash=HASH),),
    )
    began = start(uid=owner, loginuid=login, session=12)
    return attribute(finding, facts_of([began, record], [finding]), sources=disk({path: inode(owner)}))


def test_what_is_not_known_of_a_process_takes_from_how_sure_the_answer_is() -> None:
    """Cron with a command that names no file, and a script that is gone: less sure than with her private script."""
    for unsure in (
        "cron of victim-b runs something that is not recorded: her crontab, less surely",
        "a timer of victim-b runs a script that was removed since: hers, less surely",
    ):
        told = CONSTELLATIONS[unsure][1]().account
        sure = CONSTELLATIONS["cron of victim-b runs victim-b's private script"][1]().account
        assert told.score < sure.score
        assert any("nobody was there" in line for line in told.against)


@pytest.mark.parametrize("name", CONSTELLATIONS)
def test_the_record_points_at_whom_it_shows_and_at_nobody_else(name: str) -> None:
    """And the sentence names no account where it points at none."""
    truth, tell = CONSTELLATIONS[name]
    told = tell()
    assert points_at(told) == truth, [(one.what, one.confidence, one.alternatives) for one in told.candidates]
    if truth is None:
        assert "does not show which process or account" in told.sentence or told.candidates[0].level == "A2"
        assert not any(f"account {name}" in told.sentence for name in NAMES.values())
    assert "person" not in told.sentence


@pytest.mark.parametrize("name", [name for name, (truth, _) in CONSTELLATIONS.items() if truth is None])
def test_no_document_that_leaves_the_case_names_an_account(name: str) -> None:
    """Notice, reach, review, authority: none names one; the report in plain words points at none."""
    dossier = made(text="a process outside the job ended rank 1")
    told = CONSTELLATIONS[name][1]()
    dossier = dataclasses.replace(dossier, incident=structs.replace(dossier.incident, attribution=told))
    for draw in ("flash", "reach", "review", "authority"):
        page = text_of(DRAWN[draw](dossier))
        assert not {f"account {known}" for known in NAMES.values() if f"account {known}" in page}, draw
        assert not {known for known in ("victim-b", "insider", "colleague") if known in page}, draw
    plain = text_of(DRAWN["plain"](dossier))
    assert "sabotage" not in plain.lower()
    assert "is not a person" in plain
