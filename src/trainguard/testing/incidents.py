"""Scripted incidents with their truth: who did what, whom it was made to look like, and what it cost.

    for script in SCRIPTS:
        told = play(script, folder, seed=1)       # runs recorded through the real writer, sealed, logged
        told.truth.account, told.truth.framed, told.truth.hours

Each is one small history of a cluster: a base model, a run made from it in which something happens, a run made from
that one, and one that has nothing to do with it. What happens is taken from the threat catalogue: acts with a trace to
an account, acts that leave none, acts made to look like somebody else's, faults of hardware, and honest oddities. The
accounts are roles. No process is started, and no file but the models exists: who owns a file, and who committed a line,
is scripted in `sources`.

The scripts know the catalogue and the records (spec/evidence.md); they know nothing of how attribution weighs.
"""

from __future__ import annotations

import base64
import hashlib
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard import __version__
from trainguard.appraise.judge import judge_run
from trainguard.appraise.verdict import Verdict
from trainguard.archive import RunWriter
from trainguard.envelope import load_or_create_key
from trainguard.finding import Finding, Subject
from trainguard.home import Home
from trainguard.incident.correlate import incidents
from trainguard.incident.damage import Range, assess
from trainguard.incident.lineage import read_lineage, run_key
from trainguard.incident.traces import Authorship, Inode, Sources
from trainguard.lockfile import Code, Declared, Interpreter, Launch, Measurement, Tree, make_lock
from trainguard.log import Log
from trainguard.policy import Approval, Policy
from trainguard.seal.write import seal_path

VICTIM_A, VICTIM_B, INSIDER, SERVICE, COLLEAGUE, ROOT = 1001, 1002, 1003, 1004, 1005, 0
ACCOUNTS = {
    VICTIM_A: "victim-a",
    VICTIM_B: "victim-b",
    INSIDER: "insider",
    SERVICE: "svc-train",
    COLLEAGUE: "colleague",
    ROOT: "root",
}
NO_LOGIN = 4294967295
SECOND = 1_000_000_000
RANKS, STEPS, SAVES, PACE_SECONDS = 4, 24, (8, 16, 24), 30.0
HOST = "node-3"
SUPERVISOR, AGENT, RANK0 = 10, 20, 30
A, B = "a" * 64, "b" * 64
SITE = "/env/lib/site-packages"
LOCKED = {"train.py": f"{A} 1", "hook.json": f"{A} 1"}

Group = Literal["act", "frame", "hardware", "honest"]
Body = dict[str, Any]

_KEY = ec.generate_private_key(ec.SECP256R1())
"""Signs the locks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What really happened."""

    account: int | None = None
    """Account, or audit login, the act came from; None: nothing in the record shows one, or there was no act."""
    framed: frozenset[int] = frozenset()
    """Accounts it was made to look like."""
    loss: Literal["results", "time", None] = None
    """`results`: the work from the act on and what was made from it; `time`: devices that waited or worked twice."""
    hours: float | None = None
    """Device-hours lost; None where nothing is claimed about it. Set by `play`."""
    word: str = "TAINTED"
    """What the run, and what was made from it afterwards, is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One incident; `act` sets the stage for it and says what is true."""

    name: str
    group: Group
    act: Callable[[Stage], Truth]


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A history on disk: run `attacked`, run `tuned` made from its last checkpoint, runs `base` and `apart`."""

    script: Script
    home: Home
    truth: Truth
    sources: Sources


@dataclass(slots=True)
class Stage:
    """What a script sets, and what play keeps."""

    home: Home
    folder: Path
    draw: random.Random
    now: int = 1_760_000_000 * SECOND
    uid: int = VICTIM_A
    loginuid: int = VICTIM_A
    session: int = 3
    locked: bool = True
    node: bool = False
    approve: tuple[Approval, ...] = ()
    at: dict[int, Callable[[Job], None]] = field(default_factory=dict)
    """Step of the attacked run → what happens when it begins."""
    before: Callable[[Job], None] | None = None
    """What happens before its first step."""
    last: Callable[[Job], None] | None = None
    """What happens after its last step."""
    inodes: dict[str, Inode] = field(default_factory=dict)
    lines: dict[str, Authorship] = field(default_factory=dict)
    says: dict[str, Any] = field(default_factory=dict)
    """What the start of the attacked run claims beside."""
    bad_from: int | None = None
    lost_ns: int = 0

    def owns(self, path: str, uid: int, mode: int = 0o644, *, folder: tuple[int, int] = (0, 0o755)) -> str:
        """Say who owns a file now, and who its folder; returns the path."""
        self.inodes[path] = Inode(uid=uid, mode=mode, changed_ns=self.now, folder_uid=folder[0], folder_mode=folder[1])
        return path

    def step(self) -> int:
        """A step in the middle of the run."""
        return self.draw.randrange(10, 16)


@dataclass(slots=True)
class Job:
    """A run while it is played."""

    stage: Stage
    writer: RunWriter
    ranks: int
    opens: Path | None = None
    """The checkpoint it starts from."""
    base: int = 0
    """Number of the first process of this attempt."""
    attempt: int = 0
    number: int = 0
    """Step of the job, from 1."""
    offset: int = 0
    """Steps of earlier attempts that this one's processes do not count."""
    saved_at: int = 0
    saved_step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    """What the next step frame of rank 0 says beside."""
    slow_ns: int = 0
    """By how much the next step is slower."""

    def add(self, kind: str, body: Body, **fields: Any) -> None:
        """A record of the supervisor."""
        self.writer.add(kind, body, **fields)

    def says(self, kind: str, body: Body, rank: int = 0) -> None:
        """A frame of a rank."""
        step = self.number - self.offset
        self.add(kind, body, source="process", step=step if step > 0 else None, **self.where(rank))

    def where(self, rank: int) -> dict[str, Any]:
        """The fields of a record about a rank."""
        number = self.base + rank
        return {"process": number, "pid": pid_of(number), "rank": rank, "uid": self.stage.uid}

    def facts(self, rank: int) -> Body:
        """What the kernel says of a rank's process."""
        pid = pid_of(self.base + rank)
        return {
            "pid": pid,
            "uid": self.stage.uid,
            "euid": self.stage.uid,
            "exe": "/usr/bin/python3",
            "cmdline": ["python", "train.py"],
            "cwd": "/job",
            "start_ticks": pid * 7,
            "loginuid": self.stage.loginuid,
            "session": self.stage.session,
            "ancestry": [[AGENT, AGENT * 7, "python3", ["torchrun", "train.py"]]],
        }

    def bad(self) -> None:
        """From here on the results are worth nothing."""
        self.stage.bad_from = self.stage.now

    def die(self, *, signal: int = 9, **ended: Any) -> None:
        """Every rank ends, the first by a signal; the launcher starts them again from the last checkpoint."""
        stage = self.stage
        stage.now += 5 * SECOND
        for rank in range(self.ranks):
            how = {"status": None, "signal": signal if rank == 1 else 15, **(ended if rank == 1 else {})}
            if rank != 1:
                self.add("signalled", _signal(_agent(stage), self.facts(rank), 15), pid=AGENT)
            self.add(
                "exit", {"said_bye": False, "frames": 1, "greeted": True, "ended": how} | ended, **self.where(rank)
            )
        stage.now += stage.draw.randrange(60, 240) * SECOND
        self.base += self.ranks
        self.attempt += 1
        self.offset = self.number = self.saved_step
        _measure(self)
        _greet(self)
        stage.lost_ns += self.ranks * (stage.now - self.saved_at)


def pid_of(process: int) -> int:
    """Pid of the process with the supervisor's number `process`."""
    return RANK0 + process


def play(script: Script, folder: Path, *, seed: int) -> Played:
    """Write the history of `script` below `folder`, which is new."""
    home = Home(folder / "home")
    home.prepare()
    stage = Stage(home, folder / "models", random.Random(f"{script.name} {seed}"))  # noqa: S311 - repeats
    stage.folder.mkdir(parents=True)
    truth = script.act(stage)
    log = Log.open(home.log, home.keys / "log.key")
    try:
        base = _run(stage, log, "base", 1, 5, (5,))[-1]
        last = _run(stage, log, "attacked", RANKS, STEPS, SAVES, opens=base, attacked=True)[-1]
        ended, begun = stage.now, stage.now
        _run(stage, log, "tuned", 2, 6, (6,), opens=last)
        below = 2 * (stage.now - begun)
        _run(stage, log, "apart", 1, 5, (5,))
        log.publish()
    finally:
        log.close()
    lost = {"time": stage.lost_ns, "results": RANKS * (ended - (stage.bad_from or ended)) + below, None: None}[
        truth.loss
    ]
    truth = replace(truth, hours=None if lost is None else lost / (3600 * SECOND))
    sources = Sources(
        inode=lambda path: stage.inodes.get(str(path)),
        lines=lambda path, line: stage.lines.get(f"{path}:{line}"),
    )
    return Played(script=script, home=home, truth=truth, sources=sources)


def _run(
    stage: Stage,
    log: Log,
    name: str,
    ranks: int,
    steps: int,
    saves: Sequence[int],
    *,
    opens: Path | None = None,
    attacked: bool = False,
) -> list[Path]:
    """Record one run; returns what it saved."""
    key = load_or_create_key(stage.home.keys / "attestation.pem")
    writer = RunWriter(stage.home, name, log, key, clock=lambda: stage.now)
    job = Job(stage, writer, ranks, opens)
    try:
        policy = Policy(heartbeat_seconds=3600.0, approve=stage.approve if attacked else ())
        start = _start(stage, stage.home.store_blob(msgspec.json.encode(policy)), attacked=attacked)
        writer.begin({"run": name, **start})
        job.add("start", start)
        _measure(job)
        job.add("ledger", {"state": "on", "reason": None, "child": AGENT, "supervisor": SUPERVISOR, "keeper": 11})
        if stage.node and attacked:
            job.add("node", {"state": "on"})
        job.add("process", {"hello": {"env": {}}, "ppid": SUPERVISOR, "of_the_job": True}, process=99, pid=AGENT)
        job.saved_at = stage.now
        _greet(job)
        if opens is not None:
            digest = hashlib.sha256(opens.read_bytes()).hexdigest()
            job.says(
                "open", {"files": [{"path": str(opens), "sha256": digest, "mode": "r", "first": 0, "uid": COLLEAGUE}]}
            )
        if attacked and stage.before is not None:
            stage.before(job)
        saved = _steps(job, log, name, steps, saves, attacked=attacked)
        if attacked and stage.last is not None:
            stage.last(job)
        for rank in range(ranks):
            job.add("exit", {"said_bye": True, "frames": 1, "greeted": True}, **job.where(rank))
        job.add("end", {"status": 0, "signal": None, "wall_ns": 1, "cpu_ns": 1, "key": "00"})
        writer.seal(final=True)
    finally:
        writer.close()
    return saved


def _steps(job: Job, log: Log, name: str, steps: int, saves: Sequence[int], *, attacked: bool) -> list[Path]:
    stage, saved = job.stage, dict[int, Path]()
    waiting = dict(stage.at) if attacked else {}
    while job.number < steps:
        job.number += 1
        if attacked and job.number % 7 == 3:
            _noise(job)
        act = waiting.pop(job.number, None)
        if act is not None:
            act(job)
            if job.number == job.offset:
                continue  # the job was started again
        wall = int(PACE_SECONDS * SECOND * stage.draw.uniform(0.99, 1.01)) + job.slow_ns
        stage.lost_ns += job.ranks * job.slow_ns
        stage.now += wall
        for rank in range(job.ranks):
            body = {
                "opt": 0,
                "index": job.number - job.offset,
                "wall_ns": wall,
                "own_ns": 1,
                "checked": True,
                "level": 0,
            }
            job.says("step", body | (job.extra if rank == 0 else {}), rank)
        job.extra, job.slow_ns = {}, 0
        if job.number in saves:
            path = stage.folder / f"{name}-{job.number}.pt"
            path.write_text(f"{name} {job.number} {stage.draw.random()}")
            step = job.number - job.offset
            report = seal_path(stage.home, path, run=name, step=step, log=log, source="run")
            job.add("seal", {"path": str(path), "leaf": report.leaf, "findings": [], "prints": None}, step=step)
            job.saved_at, job.saved_step = stage.now, job.number
            job.writer.seal()
            saved[job.number] = path
    return list(saved.values())


def _noise(job: Job) -> None:
    """What goes on in every job: launcher and ranks talk, a rank ends its loader, logs are written."""
    job.add("signalled", _signal(_agent(job.stage), job.facts(0), 10), pid=AGENT)
    loader = job.facts(0) | {"pid": 500, "start_ticks": 3500, "cmdline": ["python", "loader"]}
    loader["ancestry"] = [[pid_of(job.base), 7 * pid_of(job.base), "python3", ["python", "train.py"]]]
    job.add("signalled", _signal(job.facts(0), loader, 15), pid=pid_of(job.base))
    job.says("open", {"files": [{"path": "/job/out/log.txt", "mode": "w", "place": "/job/train.py:30", "step": 1}]})


def _start(stage: Stage, policy: str, *, attacked: bool) -> Body:
    uid, login, session = (stage.uid, stage.loginuid, stage.session) if attacked else (VICTIM_B, VICTIM_B, 4)
    return {
        "command": ["torchrun", "train.py"],
        "cwd": "/job",
        "host": HOST,
        "kernel": "6.1",
        "account": {"uid": uid, "name": ACCOUNTS[uid], "loginuid": str(login), "session": str(session)},
        "trainguard": __version__,
        "policy": policy,
        "lock": None,
        "settings": {"links": "governed"},
    } | (stage.says if attacked else {})


def _measure(job: Job) -> None:
    """What was measured before this attempt; with a lock, exactly what it holds."""
    trees = {
        "code": Tree(name="code", root="/job", files=LOCKED),
        "site-packages": Tree(name="site-packages", root=SITE, files={"torch/optim/adamw.py": f"{A} 1"}),
    }
    if job.opens is not None:
        digest = hashlib.sha256(job.opens.read_bytes()).hexdigest()
        name = f"weights:{job.opens.name}"
        trees[name] = Tree(name=name, root=str(job.opens.parent), files={job.opens.name: f"{digest} 1"})
    measured = Measurement(
        cwd="/job",
        launch=Launch(argv=(), kind="script"),
        interpreter=Interpreter(
            executable="/env/bin/python",
            version="",
            implementation="",
            cache_tag="",
            prefix="/env",
            base_prefix="/usr",
            path=(),
            user_site=False,
        ),
        code=Code(root="/job"),
        trees=trees,
        distributions={},
        declared=Declared(outputs=("out",)),
    )
    home = job.stage.home
    lock = home.store_blob(make_lock(measured, _KEY, made="").data) if job.stage.locked else None
    body = {"blob": home.store_blob(measured.encode()), "lock": lock, "attempt": job.attempt}
    job.add("measurement", body)


def _greet(job: Job) -> None:
    for rank in range(job.ranks):
        env = {"RANK": str(rank), "WORLD_SIZE": str(job.ranks), "TORCHELASTIC_RESTART_COUNT": str(job.attempt)}
        body = {"hello": {"version": "3.11.7", "env": env}, "ppid": AGENT, "of_the_job": True}
        job.add(
            "process", body | {k: v for k, v in job.facts(rank).items() if k not in ("pid", "uid")}, **job.where(rank)
        )


def _agent(stage: Stage) -> Body:
    """The launcher of the ranks."""
    return {
        "pid": AGENT,
        "uid": stage.uid,
        "euid": stage.uid,
        "exe": "/usr/bin/python3",
        "cmdline": ["torchrun", "train.py"],
        "start_ticks": AGENT * 7,
        "loginuid": stage.loginuid,
        "session": stage.session,
        "ancestry": [],
    }


def _signal(sender: Body, target: Body, number: int, call: str = "kill") -> Body:
    return {"call": call, "signal": number, "sender": sender, "target": target["pid"], "targets": [target]}


# -- acts that leave a trace to an account -------------------------------------------------------------------------


def _side_file(
    stage: Stage, *, uid: int = INSIDER, recorded: int | None = None, mode: int = 0o644, **owns: Any
) -> None:
    """B2: an approved hook reads a file whose content changes while the run goes on."""
    path = stage.owns("/job/hook.json", uid, mode, **owns)
    stage.owns("/job/train.py", VICTIM_A)

    def act(job: Job) -> None:
        step = job.number
        line = {"path": path, "sha256": B, "was": A, "mode": "r", "changed": True, "size": 20, "step": step, "opens": 9}
        line |= {"place": "/job/train.py:14", "uid": uid if recorded is None else recorded}
        line |= {"mtime_ns": stage.now, "ctime_ns": stage.now}
        job.bad()
        job.says("open", {"files": [line]})

    stage.at[stage.step()] = act


def _planted(
    stage: Stage, tell: Callable[[Job, str], None], *, uid: int = INSIDER, mode: int = 0o644, **owns: Any
) -> None:
    """Code in a file that is neither the job's nor a library's, and that shows in a sweep, a load or a sleep."""
    path = stage.owns("/shared/tools/debug.py", uid, mode, **owns)
    stage.owns("/job/train.py", VICTIM_A)

    def act(job: Job) -> None:
        job.bad()
        tell(job, path)

    stage.at[stage.step()] = act


def _thread(job: Job, path: str) -> None:
    found = [{"kind": "thread", "origin": f"{path}:12", "function": "watch", "on": "", "name": "t", "count": 1}]
    job.says("sweep", {"what": "deferred", "checked": 3, "found": found, "threads": 2, "atexit": 0})


def _hook(job: Job, path: str) -> None:
    found = [{"kind": "gradient hook", "origin": f"{path}:31", "function": "flip", "on": "lm_head.weight", "count": 1}]
    job.says("sweep", {"what": "hooks", "checked": 9, "found": found, "total": 1})


def _executed(job: Job, path: str) -> None:
    owner = job.stage.inodes[path]
    ran = {
        "file": path,
        "sha256": B,
        "same": True,
        "source": B,
        "code": B,
        "place": "/job/train.py:14",
        "function": "f",
    }
    ran |= {"times": 1, "owner": [owner.uid, owner.mode, owner.folder_uid, owner.folder_mode]}
    job.says("code", {"ran": ran})


def _imported(job: Job, path: str) -> None:
    job.says("code", {"files": [[path, B, "debug", "source"]]})


def _library(stage: Stage, *, uid: int = INSIDER, mode: int = 0o644, **owns: Any) -> None:
    """A5: an installed file is not what was approved."""
    path = stage.owns(f"{SITE}/torch/optim/adamw.py", uid, mode, **owns)

    def act(job: Job) -> None:
        job.bad()
        job.says("code", {"files": [[path, B, "torch.optim.adamw", "source"]]})

    stage.before = act


def _text_from_data(stage: Stage) -> None:
    """B2: text read from a data file is run as code, by a line of the victim's own script."""
    path = stage.owns("/shared/data/notes.txt", INSIDER)
    stage.owns("/job/train.py", VICTIM_A)

    def act(job: Job) -> None:
        job.bad()
        line = {"path": path, "sha256": B, "mode": "r", "place": "/job/train.py:14", "uid": INSIDER, "step": job.number}
        job.says("open", {"files": [line]})
        ran = {"file": "<string>", "sha256": None, "same": None, "source": B, "code": B, "place": "/job/train.py:14"}
        job.says("code", {"ran": ran | {"function": "f", "times": 1, "owner": None}})

    stage.at[stage.step()] = act


def _checkpoint(stage: Stage, technique: str, message: str, *, uid: int = INSIDER, mode: int = 0o644) -> None:
    """E1, E3, E6: a model file that carries code, was edited at rest, or was put back."""
    path = stage.owns("/shared/ckpt/base.pt", uid, mode)

    def act(job: Job) -> None:
        found = Finding(
            check="seal",
            outcome="violated",
            techniques=(technique,),
            subject=Subject(run="attacked", path="base.pt"),
            message=message,
        )
        owner = job.stage.inodes[path]
        body: Body = {
            "path": path,
            "owner": [owner.uid, owner.mode, owner.folder_uid, owner.folder_mode],
            "findings": [msgspec.to_builtins(found)],
            "verdict": "unsafe",
            "format": "zip",
            "sha256": B,
            "place": "/job/train.py:9",
            "why": message,
            "refused": False,
        }
        job.bad()
        job.add("opened", body, **job.where(0))

    stage.before = act


def _sleeps(stage: Stage, place: str = "/shared/tools/debug.py:44", *, uid: int = INSIDER) -> None:
    """F7: short sleeps on some steps, in code that nobody approved; the ranks wait for each other."""
    stage.owns(place.rpartition(":")[0], uid)
    first = stage.step()
    steps = [first, *(number for number in range(first + 1, STEPS) if stage.draw.random() < 0.5)]

    def act(job: Job) -> None:
        job.slow_ns = int(stage.draw.uniform(10, 25) * SECOND)
        ask = job.number
        frames = [f"{place}:pause", f"{SITE}/torch/optim/adamw.py:200:step", "/job/train.py:20:<module>"]
        answer = {"ask": ask, "id": 7, "frames": frames, "same": True, "done": job.number - 1 - job.offset}
        job.says("stack", answer | {"since_ns": job.slow_ns})
        body = {"ask": ask, "why": "asleep", "call": "clock_nanosleep", "samples": 1, "median_ns": 30 * SECOND}
        body |= {"elapsed_ns": job.slow_ns, "cpu_ns": 0, "queue_ns": 0}
        job.add("stall", body, **job.where(0), step=job.number - job.offset)

    stage.at.update(dict.fromkeys(steps, act))


def _kill_within(stage: Stage, place: str, *, uid: int, mode: int = 0o644) -> None:
    """F8: a rank ends another one; the line that did it lies in `place`."""
    stage.owns(place.rpartition(":")[0], uid, mode)

    def act(job: Job) -> None:
        stage.now += 10 * SECOND
        job.says("kill", {"pid": pid_of(job.base + 1), "signal": 9, "place": place})
        job.add("signalled", _signal(job.facts(0), job.facts(1), 9), pid=job.facts(0)["pid"], uid=stage.uid)
        job.die()

    stage.at[stage.step()] = act


def _kill_from_outside(stage: Stage, sender: Body) -> None:
    """F8: a process that has nothing to do with the job ends a rank; the node's ledger saw it."""
    stage.node = True
    known = {"pid": 900, "euid": sender["uid"], "exe": "/usr/bin/python3", "cmdline": ["python3", "tidy.py"]}
    known |= {"start_ticks": 6300, "ancestry": [[890, 1, "bash", ["-bash"]], [880, 1, "sshd", ["sshd"]]]}

    def act(job: Job) -> None:
        stage.now += 10 * SECOND
        target = pid_of(job.base + 1)
        body = {"signal": 9, "target": target, "target_comm": "python", "target_uid": stage.uid, "kernel": False}
        job.add("outside", body | {"sender": known | sender, "at": stage.now})
        job.die()

    stage.at[stage.step()] = act


def _stranger(stage: Stage, sender: Body) -> None:
    """G4: a process that does not descend from the job reports as part of it."""

    def act(job: Job) -> None:
        facts = {"ppid": 1, "exe": "/usr/bin/python3", "cmdline": ["python3", "x.py"], "start_ticks": 6300}
        facts |= {"loginuid": sender.get("loginuid"), "session": sender.get("session")}
        body = {"hello": {"version": "3.11.7", "env": {}}, "of_the_job": False}
        job.add("process", body | facts, process=60, pid=900, uid=sender["uid"])

    stage.at[stage.step()] = act


def _account(uid: int, login: int | None = None, session: int = 7) -> Body:
    """A sender's account, and the login it came from."""
    return {"uid": uid, "loginuid": uid if login is None else login, "session": session}


# -- acts and faults that leave none -------------------------------------------------------------------------------


def _edited(job: Job, elements: int, old: float = 0.5, new: float = 0.75) -> None:
    """E4: weights are others than the step before left them; `elements` of them."""
    changed = {"name": "lm_head.weight", "what": "weight", "differ": elements, "of": 64, "at": list(range(elements))}
    changed |= {"old": _blob([old] * elements), "new": _blob([new] * elements)}
    weights = {"after": "c" * 16, "before": "d" * 16, "expected": "e" * 16, "tensors": 4, "held": 3}
    job.extra["weights"] = weights | {"changed": [changed], "changed_tensors": 1}


def _blob(values: Sequence[float]) -> Body:
    data = struct.pack(f"<{len(values)}f", *values)
    return {"f": "<f", "b": base64.b64encode(data).decode()}


def _weights(stage: Stage, elements: int, **values: float) -> None:
    def act(job: Job) -> None:
        job.bad()
        _edited(job, elements, **values)

    stage.at[stage.step()] = act


def _written_by(stage: Stage, place: str, uid: int) -> None:
    """E4 whose writer is known by its line: an act, or an average of weights as many scripts keep one."""
    stage.owns(place.rpartition(":")[0], uid)

    def act(job: Job) -> None:
        _edited(job, 4)
        writer = {
            "op": "aten::lerp_",
            "name": "lm_head.weight",
            "stack": [f"{place}:average", "/job/train.py:20:<module>"],
        }
        job.extra["weights"]["writers"] = [writer]

    stage.at[stage.step()] = act


def _program_text(job: Job) -> None:
    job.bad()
    differ = {"path": f"{SITE}/torch/lib/libtorch_cpu.so", "offset": 4096, "expected": "00", "found": "90"}
    body = {"mappings": 9, "pages": 1, "differ": [differ], "restored": 0, "unread": [], "anonymous": 0}
    job.add("text", body | {"probes": False, "tracer": None}, **job.where(0), step=job.number - job.offset)


def _dies(stage: Stage, **ended: Any) -> None:
    def act(job: Job) -> None:
        stage.now += 10 * SECOND
        job.die(**ended)

    stage.at[stage.step()] = act


# -- the scripts ---------------------------------------------------------------------------------------------------

INSIDERS = Truth(account=INSIDER, framed=frozenset({VICTIM_A, VICTIM_B}))
NOBODY = Truth(framed=frozenset({VICTIM_A, VICTIM_B, COLLEAGUE, INSIDER, SERVICE}), word="VERIFIED")


def _scene(name: str, group: Group, truth: Truth, play_it: Callable[[Stage], object], **stage: Any) -> Script:
    def act(on: Stage) -> Truth:
        for key, value in stage.items():
            setattr(on, key, value)
        play_it(on)
        return truth

    return Script(name=name, group=group, act=act)


def _acts() -> list[Script]:
    lost = replace(INSIDERS, loss="results")
    time = replace(INSIDERS, loss="time")
    odd = replace(INSIDERS, word="SUSPECT")
    unsafe, edited = "the pickle names os.system", "tensor lm_head.weight is not what was sealed"
    old = "step 500 is put back where step 900 was sealed"
    return [
        _scene("side file of a hook", "act", lost, _side_file),
        _scene("thread of a planted file", "act", lost, lambda s: _planted(s, _thread)),
        _scene("gradient hook of a planted file", "act", lost, lambda s: _planted(s, _hook)),
        _scene("planted file executed", "act", lost, lambda s: _planted(s, _executed)),
        _scene("planted module imported", "act", lost, lambda s: _planted(s, _imported)),
        _scene("edited library", "act", lost, _library),
        _scene("text of a data file executed", "act", lost, _text_from_data),
        _scene("code in a checkpoint", "act", lost, lambda s: _checkpoint(s, "E1", unsafe)),
        _scene("checkpoint edited at rest", "act", lost, lambda s: _checkpoint(s, "E3", edited)),
        _scene("older checkpoint put back", "act", lost, lambda s: _checkpoint(s, "E6", old)),
        _scene("sleeps in a planted file", "act", time, _sleeps),
        _scene(
            "rank killed by a planted line",
            "act",
            time,
            lambda s: _kill_within(s, "/shared/tools/debug.py:9", uid=INSIDER),
        ),
        _scene(
            "rank killed from outside",
            "act",
            replace(time, word="SUSPECT"),
            lambda s: _kill_from_outside(s, _account(INSIDER)),
        ),
        _scene("stranger reports as a rank", "act", odd, lambda s: _stranger(s, _account(INSIDER))),
        _scene("side file, no lock", "act", odd, _side_file, locked=False),
        _scene("weights edited, nobody seen", "act", replace(lost, account=None), lambda s: _weights(s, 4)),
        _scene(
            "program text changed, nobody seen",
            "act",
            replace(lost, account=None),
            lambda s: s.at.update({s.step(): _program_text}),
        ),
    ]


def _frames() -> list[Script]:
    lost, time = replace(INSIDERS, loss="results"), replace(INSIDERS, loss="time", word="SUSPECT")
    nobody = replace(lost, account=None)
    said = Authorship(commit="1" * 40, identity="victim-b", signed="none")
    world, group = {"mode": 0o666}, {"mode": 0o664}

    def forged(stage: Stage) -> None:
        _planted(stage, _thread)
        stage.lines["/shared/tools/debug.py:12"] = said

    def given_away(stage: Stage) -> None:
        _side_file(stage, uid=VICTIM_B, recorded=INSIDER)

    def from_insiders_session(stage: Stage) -> None:
        stage.uid, stage.loginuid, stage.session = VICTIM_B, INSIDER, 7
        _kill_within(stage, "/home/victim-b/loop.py:3", uid=VICTIM_B)

    def own_script(stage: Stage, mode: int) -> None:
        _kill_within(stage, "/job/train.py:80", uid=VICTIM_A, mode=mode)

    return [
        _scene(
            "kill as victim-b from insider's session",
            "frame",
            time,
            lambda s: _kill_from_outside(s, _account(VICTIM_B, INSIDER)),
        ),
        _scene(
            "kill as the service account from insider's session",
            "frame",
            time,
            lambda s: _kill_from_outside(s, _account(SERVICE, INSIDER)),
        ),
        _scene(
            "kill as root from insider's session",
            "frame",
            time,
            lambda s: _kill_from_outside(s, _account(ROOT, INSIDER)),
        ),
        _scene(
            "stranger as victim-b from insider's session",
            "frame",
            replace(INSIDERS, word="SUSPECT"),
            lambda s: _stranger(s, _account(VICTIM_B, INSIDER)),
        ),
        _scene(
            "job as victim-b from insider's session", "frame", replace(INSIDERS, loss="time"), from_insiders_session
        ),
        _scene("author of the line forged", "frame", nobody, forged),
        _scene("side file given away afterwards", "frame", lost, given_away),
        _scene("victim's file that all may write", "frame", nobody, lambda s: _side_file(s, uid=VICTIM_B, **world)),
        _scene(
            "victim's file that the group may write", "frame", nobody, lambda s: _side_file(s, uid=VICTIM_B, **group)
        ),
        _scene(
            "victim's file that all may write, in an open folder",
            "frame",
            nobody,
            lambda s: _planted(s, _thread, uid=VICTIM_B, mode=0o666, folder=(VICTIM_B, 0o777)),
        ),
        _scene(
            "victim's file that all may write, hook",
            "frame",
            nobody,
            lambda s: _planted(s, _hook, uid=VICTIM_B, **world),
        ),
        _scene(
            "victim's library that the group may write", "frame", nobody, lambda s: _library(s, uid=VICTIM_B, **group)
        ),
        _scene(
            "victim's checkpoint that all may write",
            "frame",
            nobody,
            lambda s: _checkpoint(s, "E3", "edited", uid=VICTIM_B, **world),
        ),
        _scene(
            "kill by the victim's own script", "frame", replace(nobody, loss="time"), lambda s: own_script(s, 0o664)
        ),
        _scene(
            "kill by the victim's own script, private",
            "frame",
            replace(nobody, loss="time"),
            lambda s: own_script(s, 0o644),
        ),
    ]


def _faults() -> list[Script]:
    memory = {"out_of_memory": {"group": 1, "host": 1, "named": []}}
    odd = replace(NOBODY, word="SUSPECT")
    stopped = {"pid": 5, "comm": "slurmstepd", "exe": "/usr/sbin/slurmstepd", "cmdline": ["slurmstepd"]}
    pace = {"window_ns": 60 * SECOND, "steps": 2, "samples": 90, "running": 40, "asleep": {}, "timed": 0, "waits": 0}
    pace |= {"cpu_ns": 20 * SECOND, "queue_ns": 40 * SECOND, "throttled": 9, "throttled_ns": 20 * SECOND, "cpus": 2}

    def busy(stage: Stage) -> None:
        def act(job: Job) -> None:
            job.slow_ns = 20 * SECOND
            job.add("pace", dict(pace), **job.where(2), step=job.number)

        stage.at[stage.step()] = act

    def peer_lost(stage: Stage) -> None:
        def act(job: Job) -> None:
            error = {"type": "RuntimeError", "text": "Connection closed by peer", "place": f"{SITE}/torch/x.py:3"}
            for rank in range(job.ranks):
                job.says("bye", {"dropped": 0, "faults": {}, "error": error}, rank)
            job.die(signal=6)

        stage.at[stage.step()] = act

    return [
        _scene("one bit of one weight", "hardware", odd, lambda s: _weights(s, 1, old=0.5, new=-0.5)),
        _scene("out of memory", "hardware", NOBODY, lambda s: _dies(s, **memory)),
        _scene("segmentation fault", "hardware", NOBODY, lambda s: _dies(s, signal=11)),
        _scene("bus error", "hardware", NOBODY, lambda s: _dies(s, signal=7)),
        _scene("node lost", "hardware", NOBODY, peer_lost),
        _scene("co-tenant load", "hardware", NOBODY, busy),
        _scene(
            "cancelled by the scheduler",
            "hardware",
            replace(odd, word="VERIFIED"),
            lambda s: _kill_from_outside(s, _account(ROOT, NO_LOGIN) | stopped),
        ),
        _scene("nothing", "hardware", NOBODY, lambda s: None),
    ]


def _oddities() -> list[Script]:
    odd = replace(NOBODY, word="SUSPECT")

    def own_config(stage: Stage) -> None:
        _side_file(stage, uid=VICTIM_A)

    def watchdog(stage: Stage) -> None:
        stage.owns("/job/train.py", VICTIM_A)

        def act(job: Job) -> None:
            child = job.facts(1) | {"pid": 77, "start_ticks": 539, "cmdline": ["python", "watchdog.py"]}
            child["ancestry"] = [[pid_of(job.base + 1), 7 * pid_of(job.base + 1), "python3", ["python", "train.py"]]]
            job.add("signalled", _signal(child, job.facts(1), 9), pid=77, uid=stage.uid)
            job.die()

        stage.at[stage.step()] = act

    def admins_file(stage: Stage) -> None:
        _side_file(stage, uid=ROOT)

    approved = (Approval(check="inputs", place="/job/train.py:14", reason="read every epoch"),)
    return [
        _scene("own configuration edited, no lock", "honest", odd, own_config, locked=False),
        _scene("own configuration edited, approved", "honest", NOBODY, own_config, approve=approved),
        _scene("watchdog ends its own rank", "honest", odd, watchdog),
        _scene(
            "average of weights in the own script",
            "honest",
            odd,
            lambda s: _written_by(s, "/job/train.py:60", VICTIM_A),
        ),
        _scene(
            "average of weights in a colleague's file",
            "honest",
            odd,
            lambda s: _written_by(s, "/shared/lib/ema.py:8", COLLEAGUE),
        ),
        _scene("administrator updates a shared file, no lock", "honest", odd, admins_file, locked=False),
        _scene(
            "hook of a colleague's file, no lock",
            "honest",
            odd,
            lambda s: _planted(s, _hook, uid=COLLEAGUE),
            locked=False,
        ),
    ]


SCRIPTS: tuple[Script, ...] = (*_acts(), *_frames(), *_faults(), *_oddities())


# -- what an answer is worth ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """An answer beside the truth."""

    name: str
    group: Group
    right: bool
    """The account that stands first is the true one, or none stands first where the record shows none."""
    framed: bool
    """Somebody stands first who had nothing to do with it."""
    hours: Range | None
    truth_hours: float | None
    words: Mapping[str, str]
    """Run → word."""
    spread: bool
    """Everything made from the run afterwards carries its word; what has nothing to do with it is VERIFIED."""
    said: str
    accounts: tuple[tuple[float, bool], ...] = ()
    """Score of every account or login among the candidates, and whether it is the true one."""

    @property
    def loss_is_right(self) -> bool:
        """Within 5 %, and the truth between low and high; true where nothing is claimed."""
        if self.truth_hours is None or self.hours is None:
            return True
        near = abs(self.hours.likely - self.truth_hours) <= 0.05 * self.truth_hours
        return near and self.hours.low <= self.truth_hours * 1.000001 and self.truth_hours <= self.hours.high * 1.000001


def score(played: Played) -> Score:
    """What the log of a history is said to show, beside what happened."""
    lineage = read_lineage(played.home, judge=_judge)
    known = incidents(played.home, lineage=lineage, sources=played.sources)
    truth = played.truth
    named = [one.attribution.account for one in known]
    first = [one.attribution.candidates[0].uid for one in known]
    accounts = {account.uid for account in named if account is not None}
    expected = set() if truth.account is None else {truth.account}
    hours = assess(played.home, lineage=lineage).hours if truth.hours is not None else None
    words = {run: lineage.standing_of(run_key(run)).word for run in lineage.verdicts}
    clean = "VERIFIED" if truth.word == "VERIFIED" else truth.word
    spread = (words["base"], words["apart"]) == ("VERIFIED", "VERIFIED")
    spread = spread and (words["attacked"], words["tuned"]) == (clean, clean)
    return Score(
        name=played.script.name,
        group=played.script.group,
        right=accounts == expected,
        framed=bool((accounts | set(first)) & truth.framed),
        hours=hours,
        truth_hours=truth.hours,
        words=words,
        spread=spread,
        said=known[0].attribution.sentence if known else "no incident",
        accounts=tuple(
            (candidate.score, candidate.uid == truth.account)
            for one in known
            for candidate in one.attribution.candidates
            if candidate.level == "A3"
        ),
    )


def _judge(home: Home, run: str, **options: Any) -> Verdict:
    """The real verdict; a run in which nothing was found counts as fully measured, which scripts are too short for."""
    verdict = judge_run(home, run, **options)
    if all(finding.outcome == "not_checked" for finding in verdict.findings):
        return msgspec.structs.replace(verdict, verdict="VERIFIED", findings=())
    return verdict
