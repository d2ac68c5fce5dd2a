"""Tasks: what an audit has done elsewhere, each with an id by content, and what comes back (spec/replay.md, "Tasks").

    done = perform(task)                     on the machine that replays: sandbox, measurement, rerun
    desk = Desk(folder, executor)            on the auditor's side: nothing is done twice
    desk.outcome(task).rerun()

A task says everything that decides its outcome and nothing of how it must come out: no fingerprint of the run's
crosses over. What comes back is the frames that the replayed process said and the digests of its own states; comparing
and judging stay with the auditor. The outcome names its task's id, and one that names another is refused.

The machine that performs a task sees the run's working folder, its points and the auditor's state folder under the same
paths as the auditor does (a shared file system, or mounts).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from trainguard.digest import canonical_json, file_sha256, sha256_hex, write_durably
from trainguard.errors import MalformedEvidence, TrainguardError, Unavailable
from trainguard.lockfile import parse_lock
from trainguard.measure import measure
from trainguard.measure.command import resolve
from trainguard.replay import points, states
from trainguard.replay.committed import Point
from trainguard.replay.files import written_natively
from trainguard.replay.rerun import Frame, Job, Ready, Rerun, heard, rerun, variables
from trainguard.replay.sandbox import Sandbox
from trainguard.replay.scratch import scratch
from trainguard.replay.told import told_by, written_texts
from trainguard.replay.turns import in_turn

TASK_LIMIT_BYTES = 4 << 20
OUTCOME_LIMIT_BYTES = 1 << 30
FOLDERS = "trainguard-task-"


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One replay. Two tasks with the same id have the same outcome, wherever they are performed."""

    version: int = 1
    run: str
    command: tuple[str, ...]
    """With the interpreter that is to replay in the place of the run's."""
    cwd: str
    """The run's working folder: copied, never written to."""
    state: str
    """The auditor's state folder: not copied."""
    began: str
    """When the run began, nanoseconds since 1970, in digits: canonical JSON has no integers of that size."""
    environment: dict[str, str]
    """The run's settings that decide arithmetic or order."""
    numeric: dict[str, str] = {}
    """Settings of this replay alone, over those: another number of threads, other instructions."""
    inputs: dict[str, str] = {}
    """Files that the command names → SHA-256: another script on the machine that replays proves nothing."""
    key: str
    """The run's key, as it said at its end."""
    begin: int = 0
    """Warp to the state after this step; 0 replays from the first."""
    until: int
    points: tuple[Point, ...] = ()
    """The sealed states to begin at, by rank."""
    ranks: int = 1
    """Processes that make steps, all of them on the machine that performs the task."""
    in_turn: bool = False
    """Whether they run one after another, never two at a time (turns.py)."""
    patience_seconds: float = 300.0
    """How long ranks may be silent once they make steps."""
    keep: tuple[int, ...] = ()
    """Steps whose state comes back as digests."""
    against: dict[str, str] = {}
    """`rank/step` to keep → folder of the run's own state after it: how far apart they are comes back as well."""
    leave: str = ""
    """Folder to leave the kept states in, as `rank-step`; empty leaves none."""
    plant: int | None = None
    clock: float = 1.0
    """How much faster than it is the command sees time pass (told.py)."""
    turn: int = 0
    """Which of several replays that are to agree with one another: each is made for itself."""
    trusted: tuple[str, ...] = ()
    limit_seconds: float = 3600.0
    lock: str | None = None
    """SHA-256 of the run's lock among the blobs: the environment is measured against it before anything runs."""
    apart: bool = False
    """Whether the environment is to be measured."""

    @property
    def id(self) -> str:
        """32 hex digits, over everything above."""
        return sha256_hex(canonical_json(msgspec.to_builtins(self)))[:32]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a task was performed, as that machine says."""

    host: str
    boot_id: str | None = None
    python: str
    """The interpreter that replayed, links followed no further than its own folder."""
    prefix: str | None = None
    """Real path of its environment."""
    site: str | None = None
    """Device and number of its package folder: the same folder under another name is the same environment."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a task."""

    task: str
    place: Place
    frames: tuple[Frame, ...] = ()
    facts: dict[str, Any] = {}
    """Fields of `Rerun` that are not told by frames."""
    states: dict[str, dict[str, str]] = {}
    """`rank/step` → tensor → digest."""
    distances: dict[str, dict[str, tuple[float, float, float]]] = {}
    """`rank/step` → tensor → (distance to the run's own, how far the replay moved, its size), L2 norms in float64."""
    measurement: str | None = None
    """What the environment is, canonical JSON; on the auditor's side its SHA-256 among the blobs."""
    unmeasured: str | None = None
    """Why it could not be measured."""
    unavailable: str | None = None
    """Why nothing could be replayed there."""

    def rerun(self) -> Rerun:
        """The replay, as the auditor compares it. Raises Unavailable where there was none."""
        if self.unavailable is not None:
            raise Unavailable(self.unavailable)
        result = heard(self.frames)
        for name, value in self.facts.items():
            if name in Rerun.TOLD:
                setattr(result, name, value)
        result.texts = told_by(result.texts)
        result.states = {_at(name): digests for name, digests in self.states.items()}
        result.distances = {_at(name): told for name, told in self.distances.items()}
        return result


def parse_task(data: bytes) -> Task:
    """A task, strictly. Raises MalformedEvidence."""
    if len(data) > TASK_LIMIT_BYTES:
        raise MalformedEvidence(f"task: expected at most {TASK_LIMIT_BYTES} bytes, found {len(data)}")
    try:
        task = msgspec.json.decode(data, type=Task)
    except msgspec.DecodeError as error:
        raise MalformedEvidence(f"task: not as specified: {error}") from error
    if not re.fullmatch(r"[0-9]{1,20}", task.began):
        raise MalformedEvidence(f"task: expected digits in began, found {task.began[:40]!r}")
    if task.version != 1:
        raise MalformedEvidence(f"task: expected version 1, found {task.version}")
    return task


def parse_outcome(data: bytes, task: str) -> Outcome:
    """The outcome of task `task`, strictly. Raises MalformedEvidence, also for the outcome of another task."""
    if len(data) > OUTCOME_LIMIT_BYTES:
        raise MalformedEvidence(f"outcome of task {task}: expected at most {OUTCOME_LIMIT_BYTES} bytes")
    try:
        outcome = msgspec.json.decode(data, type=Outcome)
    except msgspec.DecodeError as error:
        raise MalformedEvidence(f"outcome of task {task}: not as specified: {error}") from error
    if outcome.task != task:
        raise MalformedEvidence(f"expected the outcome of task {task}, found that of {outcome.task[:64]}")
    return outcome


# -- on the machine that replays ---------------------------------------------------------------------------------------


def perform(task: Task, *, root: Path | None = None) -> Outcome:
    """Do it here. root: parent of the sandbox, by default the temporary folder. Never raises for what it finds."""
    place = _place(task)
    try:
        measured, unmeasured = _measured(task)
        with scratch(FOLDERS, root) as folder:
            return _performed(task, place, folder, measured, unmeasured)
    except (TrainguardError, OSError) as error:
        return Outcome(task=task.id, place=place, unavailable=str(error)[:2000])


def explored(task: Task, window: tuple[int, int], explore: Callable[[Ready], bool]) -> Rerun:
    """Replay here, and before each step of the window let `explore` try it. Raises Unavailable, Misuse."""
    with scratch(FOLDERS) as folder:
        return _replayed(task, folder, window, explore)[0]


def _replayed(
    task: Task, folder: Path, window: tuple[int, int] | None = None, explore: Callable[[Ready], bool] | None = None
) -> tuple[Rerun, Sandbox, dict[int, Path]]:
    """The command once more in a sandbox, with the sandbox and the sealed states it began at."""
    home = Path(task.state)
    for path, digest in task.inputs.items():
        if (now := file_sha256(path)) != digest:
            raise Unavailable(f"{path} is another file there: expected SHA-256 {digest[:16]}, found {now[:16]}")
    sandbox = Sandbox(root=folder / "sandbox", origin=Path(task.cwd), began_ns=int(task.began))
    sandbox.unchanged = frozenset(task.inputs)
    sandbox.prepare(skip=[home])
    sealed = _points(task, home)
    cache = private(_own_cache() if task.apart else home / "cache" / "replayed")
    job = Job(
        command=sandbox.command(task.command), cwd=sandbox.work, root=sandbox.root,
        environment=task.environment | task.numeric, key=task.key, began_ns=int(task.began),
        trusted=[Path(each) for each in task.trusted], cache=cache,
    )  # fmt: skip
    what: dict[str, Any] = {
        "until": task.until, "begin": task.begin, "points": sealed, "plant": task.plant, "keep": task.keep,
        "limit_seconds": task.limit_seconds, "ranks": task.ranks, "clock": task.clock,
    }  # fmt: skip
    if task.in_turn:
        return in_turn(job, **what), sandbox, sealed
    found = rerun(job, **what, patience_seconds=task.patience_seconds, window=window, explore=explore)
    return found, sandbox, sealed


def _performed(task: Task, place: Place, folder: Path, measured: str | None, unmeasured: str | None) -> Outcome:
    began = time.time_ns()
    found, sandbox, sealed = _replayed(task, folder)
    if found.status == 0 and found.reached < task.until:
        found.texts = written_texts(sandbox.work, began)
    found.left_out = sandbox.left_out
    found.root = os.path.realpath(sandbox.root)
    found.native = written_natively(found.written, task.key)
    for (rank, step), state in found.folders.items() if task.leave else ():
        shutil.copytree(state, Path(task.leave) / f"{rank}-{step}", dirs_exist_ok=True)
    kept = {f"{rank}/{step}": path for (rank, step), path in found.folders.items()}
    return Outcome(
        task=task.id,
        place=place,
        frames=tuple(found.tape),
        facts={name: getattr(found, name) for name in Rerun.TOLD},
        states={name: points.digests(path, points.read_index(path)) for name, path in kept.items()},
        distances=states.distances(_interpreter(task), kept, task.against, {str(r): str(p) for r, p in sealed.items()}),
        measurement=measured,
        unmeasured=unmeasured,
    )


def _at(name: str) -> tuple[int, int]:
    """Rank and step."""
    rank, _, step = name.partition("/")
    return int(rank), int(step)


def _points(task: Task, home: Path) -> dict[int, Path]:
    """Rank → folder of the sealed state to begin at, once all files are what the log says."""
    folders = {rank: home / "runs" / task.run / "points" / point.name for rank, point in enumerate(task.points)}
    for rank, point in enumerate(task.points):
        points.open_point(folders[rank], point)
    return folders


def _interpreter(task: Task) -> str:
    """The Python at the end of the command: behind a launcher, the one that starts it."""
    found = resolve(task.command, cwd=Path(task.cwd), env=os.environ).interpreter
    return str(found) if found is not None else task.command[0]


def _measured(task: Task) -> tuple[str | None, str | None]:
    """The measurement of the environment that replays, or why there is none."""
    if not task.apart:
        return None, None
    key = (task.command[0], task.cwd, task.lock)
    known = _MEASURED.get(key)
    if known is None:
        known = _MEASURED[key] = _measure(task)
    return known


_MEASURED: dict[Any, tuple[str | None, str | None]] = {}
"""Measured once in a process."""


def _measure(task: Task) -> tuple[str | None, str | None]:
    home = Path(task.state)
    try:
        approved = None
        if task.lock is not None:
            approved = parse_lock((home / "blobs" / task.lock).read_bytes(), where="lock").measurement
        found = measure(
            list(task.command), cwd=Path(task.cwd), env=variables(task.environment | task.numeric),
            cache=home / "cache", against=approved, trust_cache=False,
        )  # fmt: skip
    except (TrainguardError, OSError) as error:
        return None, f"it cannot be measured: {error}"[:1000]
    return found.encode().decode(), None


def _place(task: Task) -> Place:
    python = _interpreter(task)
    prefix = _prefix(python)
    site = next(iter(sorted((prefix / "lib").glob("python3*/site-packages"))), None) if prefix is not None else None
    try:
        status = site.stat() if site is not None else None
    except OSError:
        status = None
    return Place(
        host=platform.node(),
        boot_id=_line(Path("/proc/sys/kernel/random/boot_id")),
        python=python,
        prefix=str(prefix) if prefix is not None else None,
        site=f"{status.st_dev}:{status.st_ino}" if status is not None else None,
    )


def _prefix(python: str) -> Path | None:
    """Where the environment of an interpreter lies: the folder above its own, links of the folder followed."""
    found = shutil.which(python)
    return Path(os.path.realpath(Path(found).parent)).parent if found is not None else None


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _own_cache() -> Path:
    """Bytecode of an environment apart is kept on the machine that replays, not where the run's host can write."""
    return Path(tempfile.gettempdir()) / f"trainguard-replayed-{os.getuid()}"


def private(path: Path) -> Path:
    """The folder, made if need be, ours alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022:
        raise Unavailable(f"{path}: others can write there; bytecode is not taken from it")
    return path


# -- on the auditor's side ---------------------------------------------------------------------------------------------


class NotPerformed(Unavailable):
    """The engine could not have a task performed. Nothing follows for the run; called again, the audit goes on."""


class Executor(Protocol):
    """Has tasks performed somewhere. One file per kind in executors/."""

    @property
    def name(self) -> str:
        """As `--executor` names it."""

    @property
    def ahead(self) -> bool:
        """Whether tasks are worth handing over together, before the first one's outcome is known."""

    def perform(self, tasks: Sequence[Task], folder: Path) -> None:
        """Have each task performed; its outcome then lies in `outcome_path(folder, task)`.

        Raises NotPerformed, with what the engine said, where one cannot be.
        """


def task_path(folder: Path, task: Task) -> Path:
    """Where a task is written down for who performs it."""
    return folder / f"{task.id}.task"


def outcome_path(folder: Path, task: Task) -> Path:
    """Where its outcome is expected."""
    return folder / f"{task.id}.outcome"


class Desk:
    """Hands tasks out and keeps what came back: a task is done once, also when the audit is begun again."""

    def __init__(self, folder: Path, executor: Executor, store: Callable[[bytes], str]) -> None:
        self._folder = folder
        self._executor = executor
        self._store = store
        self._known: dict[str, Outcome] = {}
        self.places: dict[str, tuple[Place, str | None, str | None]] = {}
        """Task → where it was performed, the digest of that place's measurement, or why there is none."""

    def expect(self, tasks: Sequence[Task]) -> None:
        """These are going to be asked for: hand over together what is not done yet, where that is of use."""
        if self._executor.ahead:
            self._perform([task for task in tasks if not outcome_path(self._folder, task).exists()])

    def outcome(self, task: Task) -> Outcome:
        """What came of a task. Raises NotPerformed where nobody performed it."""
        known = self._known.get(task.id)
        if known is None:
            path = outcome_path(self._folder, task)
            if not path.exists():
                self._perform([task])
            known = self._known[task.id] = self._read(path, task)
        return known

    def _perform(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            return
        for task in tasks:
            write_durably(task_path(self._folder, task), msgspec.json.encode(task), mode=0o600)
        self._executor.perform(tasks, self._folder)

    def _read(self, path: Path, task: Task) -> Outcome:
        try:
            if path.stat().st_size > OUTCOME_LIMIT_BYTES:
                raise NotPerformed(f"{path}: larger than {OUTCOME_LIMIT_BYTES} bytes")
            outcome = parse_outcome(path.read_bytes(), task.id)
        except OSError as error:
            raise NotPerformed(
                f"task {task.id}: executor {self._executor.name} left no outcome: {error.strerror}"
            ) from error
        except MalformedEvidence as error:
            raise NotPerformed(str(error)) from error
        digest = None
        if outcome.measurement is not None:
            digest = self._store(outcome.measurement.encode())
            outcome = msgspec.structs.replace(outcome, measurement=digest)
        self.places[task.id] = (outcome.place, digest, outcome.unmeasured)
        return outcome


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Leave an outcome where the desk looks for it: whole, or not at all."""
    write_durably(path, msgspec.json.encode(outcome), mode=0o600)


def settings(value: object) -> Mapping[str, str]:
    """The run's settings, from its statement."""
    return {str(name): str(item) for name, item in value.items()} if isinstance(value, dict) else {}
