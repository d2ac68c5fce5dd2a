"""Runs a command again in a clean process, in replay mode, and keeps what it commits to.

    result = rerun(job, begin=120, until=160, points={0: folder}, limit_seconds=600)
    result.account.steps[125]

A stand-in for the supervisor, as small as can be: the process says hello, gets its plan, and says one frame a step. The
process is ended when it has said what was asked for, or when its time is up. Nothing is judged here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from trainguard.errors import MalformedEvidence, Misuse
from trainguard.evidence import Evidence, unfold
from trainguard.replay.committed import Account
from trainguard.replay.measured import NEWER_KEPT

BOOT = Path(__file__).parent.parent / "watch" / "boot"
FRAME_LIMIT_BYTES = 256 * 1024
OUTPUT_TAIL_BYTES = 4_000
SAVES_LIMIT = 10_000
READ_LIMIT = 200

INHERITED = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "MKL_DYNAMIC",
    "OMP_DYNAMIC",
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTHONHASHSEED",
    "PYTHONOPTIMIZE",
    "TOKENIZERS_PARALLELISM",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
)
"""Variables that a replay takes over from the run: they decide arithmetic or order, and load no code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is run again, and where."""

    command: Sequence[str]
    cwd: Path
    root: Path
    """Everything below may be written; nothing else."""
    environment: Mapping[str, str]
    key: str
    began_ns: int = 0
    """When the run began: what the replay reads and is newer may be something else than the run read."""
    trusted: Sequence[Path] = ()
    """Folders that may be newer: an environment that the auditor made."""
    cache: Path
    """Private folder for bytecode, kept between replays: importing torch without one takes most of a short replay."""


Frame = tuple[int, str, int | None, dict[str, Any]]
"""What a replayed process said: its number, kind, step, body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Which rank of how many is run alone, and where ranks leave for each other what they give to collectives."""

    rank: int
    ranks: int
    folder: Path

    @property
    def plan(self) -> dict[str, Any]:
        """As the process is told."""
        return {"rank": self.rank, "ranks": self.ranks, "folder": str(self.folder)}

    @property
    def environment(self) -> dict[str, str]:
        """What a launcher with all ranks on one host sets for this one."""
        rank, ranks = str(self.rank), str(self.ranks)
        return {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "ROLE_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "ROLE_WORLD_SIZE": ranks,
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "default",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": "none",
        }


@dataclass(slots=True, kw_only=True)
class Saved:
    """One `torch.save` of a replay."""

    process: int
    number: int
    """As its process counts its saves."""
    step: int
    """Steps that its process had made."""
    path: str | None
    """None: into memory, or a file without a name."""
    aside: bool
    """Whether another thread than the one that steps saved it: it may have changed meanwhile."""
    storages: dict[str, tuple[int, str, str | None]] = field(default_factory=dict)
    """Record → bytes, digest of samples, digest of all."""


@dataclass(slots=True, kw_only=True)
class Rerun:
    """What a replay gave."""

    TOLD: ClassVar = ("status", "timed_out", "output", "seconds", "malformed", "left_out", "native", "root", "texts")
    """Fields that no frame tells."""

    account: Account
    """Steps of the process that trained, or of rank 0."""
    accounts: dict[int, Account] = field(default_factory=dict)
    """Rank → steps of its process."""
    landed: bool = False
    """Whether a warp put the sealed state in place."""
    unsound: str | None = None
    outside: list[str] = field(default_factory=list)
    """Paths outside the sandbox that the script wanted to write."""
    newer: list[str] = field(default_factory=list)
    """Files it read that changed since the run began."""
    status: int | None = None
    timed_out: bool = False
    output: str = ""
    """The end of what it printed."""
    seconds: float = 0.0
    trained: int = 0
    """How many processes made steps."""
    malformed: str | None = None
    real: int = 0
    """Module calls that a warp could not skip."""
    carried: int | None = None
    """The least number of steps after which a warp going forward wrote a file that it read after landing."""
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Files of the working folder that the sandbox does not have, because they changed since the run began."""
    states: dict[tuple[int, int], dict[str, str]] = field(default_factory=dict)
    """Rank and step → tensor → digest, of the replay's own state after it."""
    distances: dict[tuple[int, int], dict[str, tuple[float, float, float]]] = field(default_factory=dict)
    """Rank and step → tensor → (distance to the run's own state, how far the replay moved, its size)."""
    folders: dict[tuple[int, int], Path] = field(default_factory=dict)
    """Rank and step → folder of the state, as long as the sandbox is there."""
    tape: list[Frame] = field(default_factory=list)
    """Everything that was said."""
    saved: list[Saved] = field(default_factory=list)
    """What was saved through torch, in order; paths are those of the sandbox."""
    written: list[tuple[str, int]] = field(default_factory=list)
    """Files written by safetensors, and the steps made before."""
    native: dict[str, list[tuple[str, int, str, str | None, str]]] = field(default_factory=dict)
    """Of those written once: the storages that were in them at the end (seal/prints.py)."""
    root: str = ""
    """Where the sandbox was."""
    read: list[str] = field(default_factory=list)
    """Files it read that may be models: real paths, in the sandbox where they lie there."""
    texts: dict[str, str] = field(default_factory=dict)
    """Small text files that it wrote, where the command came to its end: path in its folder → text."""
    unable: str | None = None
    """Why its steps could not be tried again."""
    mixed: str | None = None
    """Why the processes that made steps are no ranks of one job."""
    waits: list[str] = field(default_factory=list)
    """What other ranks have to give before this one can go on, where ranks are replayed in turn (turns.py)."""

    @property
    def reached(self) -> int:
        """The last step that every rank came to."""
        return min((max(account.steps, default=0) for account in self.accounts.values()), default=0)

    def forget_sums(self, until: int) -> None:
        """Leave of the steps up to there what a rank alone can tell: streams, modes and settings. Before a warp by
        turns lands, what it reduces is not what the ranks reduced."""
        for account in self.accounts.values():
            for number, step in account.steps.items():
                if number <= until:
                    account.steps[number] = msgspec.structs.replace(step, vectors={}, own=b"", got=b"")


class _Hearing:
    """Makes accounts of what replayed processes say: as they say it, or from the tape of it."""

    def __init__(self, result: Rerun) -> None:
        self.result = result
        self.over: set[int] = set()
        """Processes that made steps and have no more to say."""
        self.accounts: dict[int, Account] = {}
        self._saving: dict[int, tuple[int, bool]] = {}
        """Process → steps it had made when it last began to save, and whether aside."""
        self.processes: dict[int, int] = {}
        """Process → rank, once concluded."""
        self._landed: set[int] = set()

    def take(self, process: int, kind: str, step: Any, body: dict[str, Any]) -> None:
        """One frame. What is no evidence is noted in the result."""
        try:
            self._take(process, kind, step, body)
        except (ValueError, KeyError, TypeError, MalformedEvidence) as error:
            self.result.malformed = self.result.malformed or str(error)

    def _take(self, process: int, kind: str, step: Any, body: dict[str, Any]) -> None:
        if kind in ("step", "steps"):
            for each in unfold(Evidence(n=0, at=0, source="process", kind=kind, body=body, step=step)):
                self.accounts.setdefault(process, Account()).take(each.step, each.body)
        elif kind == "replay":
            self._said(process, body)
        elif kind == "save":
            self._saved(process, body)
        elif kind == "note" and "fault" in body:
            self.result.faults.append(f"{body['fault']}: {body.get('text', '')}"[:300])

    def _saved(self, process: int, body: Mapping[str, Any]) -> None:
        number, rows = body.get("save"), body.get("storages")
        if type(number) is not int or len(self.result.saved) >= SAVES_LIMIT:
            return
        known = next((s for s in reversed(self.result.saved) if (s.process, s.number) == (process, number)), None)
        if isinstance(body.get("renamed"), str) and known is not None:
            known.path = body["renamed"]
        elif isinstance(rows, list):
            if known is None:
                step, aside = self._saving.get(process, (0, True))
                path = body.get("path")
                known = Saved(
                    process=process, number=number, step=step, path=path if isinstance(path, str) else None, aside=aside
                )
                self.result.saved.append(known)
            for name, size, sampled, whole, *_ in rows:
                known.storages[str(name)] = (int(size), str(sampled), None if whole is None else str(whole))

    def _said(self, process: int, body: Mapping[str, Any]) -> None:
        if "landed" in body:
            self._landed.add(process)
        if "real" in body:
            self.result.real = max(self.result.real, int(body["real"]))
        if "unsound" in body:
            self.result.unsound = str(body["unsound"])[:1000]
        if "unable" in body:
            self.result.unable = str(body["unable"])[:300]
        if "carried" in body:
            steps = int(body["steps"])
            self.result.carried = steps if self.result.carried is None else min(self.result.carried, steps)
        if "outside" in body and len(self.result.outside) < 20:
            self.result.outside.append(str(body["outside"])[:1000])
        if "newer" in body and len(self.result.newer) < NEWER_KEPT:
            self.result.newer.append(str(body["newer"])[:1000])
        if "read" in body and len(self.result.read) < READ_LIMIT:
            self.result.read.append(str(body["read"])[:1000])
        if "saving" in body:
            self._saving[process] = (int(body["saving"]), body.get("aside") is not False)
        if "written" in body and len(self.result.written) < SAVES_LIMIT:
            self.result.written.append((str(body["written"]), int(body["steps"])))
        if "waits" in body:
            self.result.waits = [str(name) for name in body["waits"]]
        if "stopped" in body or "waits" in body:
            self.over.add(process)

    def conclude(self) -> None:
        """Take the accounts of the processes that trained, by rank."""
        result = self.result
        trained = {process: account for process, account in self.accounts.items() if account.steps}
        result.trained = len(trained)
        result.landed = bool(trained) and self._landed >= trained.keys()
        for process, account in sorted(trained.items()):
            rank = account.rank or 0
            if rank in result.accounts:
                result.mixed = f"{len(trained)} processes made steps, and they are no ranks of one job"
            result.accounts[rank] = account
            self.processes[process] = rank
        result.account = result.accounts.get(0) or Account()


def heard(tape: Sequence[Frame]) -> Rerun:
    """The replay that said this, as it was heard where it ran."""
    hearing = _Hearing(Rerun(account=Account()))
    for process, kind, step, body in tape:
        hearing.take(process, kind, step, body)
    hearing.conclude()
    return hearing.result


TRIAL_SECONDS = 150.0
"""For one trial; the process itself gives up on it before (watch/reenact.py)."""


@dataclass(slots=True, kw_only=True)
class Trial:
    """What one step became with something done to it."""

    account: Account
    failure: str = ""
    """Why it came to nothing; empty when it reached its end."""
    facts: dict[str, Any] = field(default_factory=dict)


class Ready:
    """A replayed process that waits before a step, and can try it (watch/reenact.py)."""

    def __init__(self, host: _Host, link: Any, step: int) -> None:
        self.step = step
        """The step that comes next."""
        self.trials = 0
        self._host = host
        self._link = link
        self._base = next((a for a in host.hearing.accounts.values() if a.steps), Account())

    def attempt(self, acts: Sequence[Mapping[str, Any]], until: int) -> Trial:
        """Try the steps from here to `until` with these acts, in a fork of the process."""
        self.trials += 1
        trial = Trial(account=self._base.branch(self.step - 1), failure="the process did not answer")
        self._send({"trial": self.trials, "acts": list(acts), "until": until})
        for body in self._answers("tried", self.trials):
            if "frame" in body:
                kind, value, number = body["frame"]
                for each in unfold(Evidence(n=0, at=0, source="process", kind=kind, body=value, step=number)):
                    trial.account.take(each.step, each.body)
            else:
                trial.failure = str(body.get("done"))[:300]
                facts = body.get("facts")
                trial.facts = facts if isinstance(facts, dict) else {}
                break
        return trial

    def ask(self, what: str, **details: Any) -> Any:
        """What can be found without a trial; None where there is no answer."""
        self.trials += 1
        self._send({"ask": self.trials, "what": what, **details})
        return next((body.get("found") for body in self._answers("asked", self.trials)), None)

    def go(self, *, on: bool) -> None:
        """Let the process go on to the next step, or end."""
        self._send({"go": True} if on else {"stop": True})

    def _send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._link.send(json.dumps(message).encode())

    def _answers(self, kind: str, number: int) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + TRIAL_SECONDS
        while time.monotonic() < deadline:
            while self._host.answers:
                body = self._host.answers.popleft()
                if body.get(kind) == number:
                    yield body
            if self._link.fileno() < 0:
                return
            self._host.poll(0.2)


class _Host:
    """Accepts the processes of one replay."""

    def __init__(
        self, path: str, welcome: Mapping[str, Any], result: Rerun, ranks: int = 1, patience_seconds: float = math.inf,
        numbers: Iterator[int] | None = None,
    ) -> None:  # fmt: skip
        self.result = result
        self.hearing = _Hearing(result)
        self.ready: tuple[Any, int] | None = None
        """Connection of the process that waits before a step, and the step."""
        self.answers: deque[dict[str, Any]] = deque(maxlen=10_000)
        """What it said of trials and questions."""
        self._ranks = ranks
        self._pids: dict[int, tuple[int, int]] = {}
        """Process → pid, and a descriptor of it."""
        self._welcome = welcome
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(128)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._numbers = numbers or itertools.count()
        """What processes are called, as they come."""
        self.alone = ranks == 1
        self.patience_seconds = patience_seconds
        """How long ranks that have begun to make steps may be silent: where one waits for another in vain, all do."""
        self.heard = math.inf
        """When the last step was told; for ever away until there are ranks that make steps."""

    def poll(self, seconds: float) -> bool:
        """Take what waits; returns whether anything did."""
        events = self._selector.select(seconds)
        for key, _ in events:
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._read(key.fileobj, key.data)
        return bool(events)

    @property
    def done(self) -> bool:
        """Whether all ranks have said what was asked for, or one cannot go on."""
        return len(self.hearing.over) >= self._ranks or self.result.unsound is not None

    def close(self) -> None:
        """Close every socket, end what is left, and take the accounts of the processes that trained."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        for _, descriptor in self._pids.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        self.hearing.conclude()

    def _accept(self) -> None:
        link, _ = self._listener.accept()
        pid = int.from_bytes(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        number = next(self._numbers)
        with contextlib.suppress(OSError):
            self._pids[number] = (pid, os.pidfd_open(pid))
        self._selector.register(link, selectors.EVENT_READ, number)

    def _read(self, link: Any, process: int) -> None:
        try:
            data = link.recv(FRAME_LIMIT_BYTES)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(link)
            link.close()
            if self._ranks > 1 and process in self.hearing.accounts:
                self.hearing.over.add(process)
            return
        try:
            frame = json.loads(data)
            self._take(link, process, frame["k"], frame["b"], frame.get("s"))
        except (ValueError, KeyError, TypeError) as error:
            self.result.malformed = self.result.malformed or str(error)

    def _take(self, link: Any, process: int, kind: str, body: dict[str, Any], step: Any) -> None:
        if kind == "hello":
            link.send(json.dumps({**self._welcome, "process": process}).encode())
        elif kind == "replay" and ("tried" in body or "asked" in body):
            self.answers.append(body)
        elif kind == "replay" and "ready" in body:
            self.ready = (link, int(body["ready"]))
        elif kind in ("step", "steps", "replay") or (kind == "note" and "fault" in body):
            self.result.tape.append((process, kind, step, body))
            self.hearing.take(process, kind, step, body)
            if kind in ("step", "steps") and not self.alone:
                self.heard = time.monotonic()


def rerun(
    job: Job, *, until: int, begin: int = 0, points: Mapping[int, Path] | None = None, plant: int | None = None,
    keep: Sequence[int] = (), limit_seconds: float = 600.0, ranks: int = 1,
    patience_seconds: float = math.inf, window: tuple[int, int] | None = None,
    explore: Callable[[Ready], bool] | None = None, clock: float = 1.0, turn: Turn | None = None,
) -> Rerun:  # fmt: skip
    """Run the command until step `until`; with begin > 0 warped to the states `points`, by rank, after that step.

    ranks: how many processes make steps, all of them on this host; patience_seconds: how long they may be silent then.
    keep: steps after which the replay's own state is written down, to be compared with the sealed one.
    plant: turn the gradient's sign in this step, on our own side: a verifier that does not see it is broken.
    clock: how much faster than ours the command's clock runs.
    window, explore: before each of these steps, explore(ready) may try the step; it returns whether to go on.
    turn: run one rank alone; what the others gave lies in a folder (turns.py).
    Raises Misuse when the command cannot be started.
    """
    result = Rerun(account=Account())
    plan = {
        "from": begin,
        "until": until,
        "points": {str(rank): str(folder) for rank, folder in (points or {}).items()},
        "plant": plant,
        "clock": clock,
        "window": list(window) if window is not None else None,
        "began_ns": job.began_ns,
        "trusted": [str(folder) for folder in job.trusted],
        "roots": [str(job.root), str(job.cache), "/dev", "/proc/self"],
        "turn": turn.plan if turn is not None else None,
    }
    welcome = {
        "links": "none",
        "commits": True,
        "key": job.key,
        "commit_percent": 100.0,
        "points": str(job.root / "points"),
        "points_at": sorted(keep),
        "points_mb": 1 << 20,
        "pycache": str(job.cache),
        "replay": plan,
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trainguard-") as folder, tempfile.TemporaryFile() as output:
        path = str(Path(folder) / "s")
        numbers = itertools.count(turn.rank, turn.ranks) if turn is not None else None
        host = _Host(path, welcome, result, ranks, patience_seconds, numbers)
        try:
            child = subprocess.Popen(
                list(job.command), cwd=job.cwd, env=_environment(job, path, turn), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            host.close()
            raise Misuse(f"{job.command[0]}: cannot be started for replay: {error.strerror}") from error
        try:
            _listen(host, child, began + limit_seconds, result, explore)
        finally:
            _end(child)
            host.close()
        result.status = child.returncode
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - OUTPUT_TAIL_BYTES))
        result.output = output.read().decode(errors="replace")
    result.seconds = time.monotonic() - began
    for state in sorted((job.root / "points").glob("p*-step-*[0-9]")):
        process, _, step = state.name[1:].partition("-step-")
        rank = host.hearing.processes.get(int(process))
        if rank is not None:
            result.folders[rank, int(step)] = state
    return result


def _listen(
    host: _Host, child: subprocess.Popen[bytes], deadline: float, result: Rerun,
    explore: Callable[[Ready], bool] | None = None,
) -> None:  # fmt: skip
    """Take frames until the process has said all, or has ended, or its time is up."""
    while not host.done:
        if time.monotonic() > min(deadline, host.heard + host.patience_seconds):
            result.timed_out = True
            return
        busy = host.poll(0.2)
        if host.ready is not None:
            ready, host.ready = Ready(host, *host.ready), None
            ready.go(on=explore is not None and explore(ready))
        if not busy and child.poll() is not None:
            return
    if host.alone:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process and what it started: they are its own session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def variables(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a replay: the auditor's own, with the run's arithmetic settings over it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRAINGUARD_")}
    for name in INHERITED:
        env.pop(name, None)
    return env | {name: value for name, value in settings.items() if name in INHERITED}


def _environment(job: Job, path: str, turn: Turn | None) -> dict[str, str]:
    """As `variables` gives it, with our boot folder first, a private tmp, and who it is where it is one rank alone."""
    env = variables(job.environment) | (turn.environment if turn is not None else {})
    inherited = env.get("PYTHONPATH")
    env["PYTHONPATH"] = f"{BOOT}{os.pathsep}{inherited}" if inherited else str(BOOT)
    env["TRAINGUARD_SOCKET"] = path
    env["PYTHONPYCACHEPREFIX"] = str(job.cache)
    env["TMPDIR"] = str(job.root / "tmp")
    return env
