"""One guarded run, put together: measure → start → watch → seal → judge. The only place where both banks meet.

session = Session(home, command, policy=…, lock=…, name=…)
outcome = session.run()
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trainguard import __version__
from trainguard.appraise.engine import Appraiser
from trainguard.appraise.interface import Context
from trainguard.appraise.judge import judge_run
from trainguard.appraise.origin import guard_files
from trainguard.appraise.ranks import member_of
from trainguard.appraise.verdict import Verdict
from trainguard.archive import LogLeaves, RunWriter
from trainguard.cli._gate import Gate, sealed_as
from trainguard.cli._progress import working
from trainguard.digest import canonical_json
from trainguard.envelope import load_or_create_key, load_public_key
from trainguard.errors import TrainguardError
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.lockfile import Lock
from trainguard.log import Log
from trainguard.measure import measure
from trainguard.measure.caches import compiler_caches
from trainguard.measure.submitter import submitter
from trainguard.policy import Policy
from trainguard.replay.audit import key_commitment, named_inputs, settings_of
from trainguard.replay.keys import drop_key, hold_key
from trainguard.replay.points import NAME as POINT_NAME
from trainguard.replay.points import seal_point
from trainguard.scan import vet
from trainguard.scan.trust import parse_trust_line
from trainguard.seal.ledger import read_ledger
from trainguard.seal.prints import read_prints
from trainguard.seal.verify import verify_seal
from trainguard.seal.write import seal_path
from trainguard.veil import Veil, read_veil
from trainguard.watch.outputs import is_model_file
from trainguard.watch.supervisor import Ended, Settings, Supervisor, blocked_signals

RESTARTS_LIMIT = 100
"""Attempts that are measured; a job that starts more often has other troubles."""

SEALING_SECONDS = 600
"""How long the end of a run waits for the last checkpoints to be sealed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What `trainguard run` has to show."""

    run: str
    ended: Ended | None
    """How the command ended; None when it was not started because preflight failed under --gate."""
    verdict: Verdict
    stopped: bool = False
    """Whether the guard ended it (--enforce stop)."""


class Session:
    """Everything one `trainguard run` needs. `notify(finding)` is called as findings become certain, in a thread."""

    def __init__(
        self,
        home: Home,
        command: Sequence[str],
        *,
        policy: Policy,
        lock: Lock | None,
        name: str | None = None,
        gate: bool = False,
        notify: Callable[[Finding], None] = lambda _finding: None,
    ) -> None:
        self._home = home
        self._command = list(command)
        self._policy = policy
        self._lock = lock
        self._gate = gate
        self._notify = notify
        self._supervisor: Supervisor | None = None
        self._sealer: _Sealer | None = None
        self._veil: Veil | None = None
        self._key = secrets.token_hex(32)
        self.run_id = run_id(name)

    def run(self) -> Outcome:
        """Run the command under watch. Raises TrainguardError before it is started; never afterwards."""
        for line in self._policy.load_trust:
            parse_trust_line(line)
        self._home.prepare()
        log = Log.open(self._home.log, self._home.keys / "log.key")
        try:
            return self._recorded(log)
        finally:
            log.close()

    def _recorded(self, log: Log) -> Outcome:
        key = load_or_create_key(self._home.keys / "attestation.pem")
        writer = RunWriter(self._home, self.run_id, log, key)
        try:
            recorder = _Observed(writer)
            policy = self._home.store_blob(msgspec.json.encode(self._policy))
            lock = self._home.store_blob(self._lock.data) if self._lock is not None else None
            start = self._start(policy, lock)
            writer.begin(start)
            if self._policy.commits:
                hold_key(self._home, self.run_id, self._key)
            judge = _LiveJudge(Context(run=self.run_id, policy=self._policy, blob=self._home.blob), self._hear)
            sealer = self._sealer = _Sealer(self._home, self.run_id, log, lock, recorder.add)
            restarts = _Restarts(lambda attempt: self._measure(recorder, lock, attempt))
            recorder.observers = [judge.feed, sealer.feed, restarts.feed]
            recorder.add("start", start)
            self._measure(recorder, lock)
            gate = Gate(self._home, self.run_id, self._policy, recorder.add, sealer.saved)
            try:
                ended = self._watch_unless_refused(recorder, judge, sealer, gate)
            finally:
                gate.close()
                restarts.close()
                sealer.close()
                judge.close()
                if writer.seal(final=True) is not None:
                    drop_key(self._home, self.run_id)
        finally:
            writer.close()
        log.publish()
        stopped = self._supervisor is not None and self._supervisor.stopped
        return Outcome(run=self.run_id, ended=ended, verdict=judge_run(self._home, self.run_id), stopped=stopped)

    def _hear(self, finding: Finding) -> None:
        """Pass a finding on; under --enforce stop the first proved one ends the job."""
        if not self._hidden(finding):
            self._notify(finding)
        if finding.outcome != "violated" or "stop" not in self._policy.measures or self._supervisor is None:
            return
        sealed = self._sealer.last if self._sealer is not None else None
        why = {
            "check": finding.check,
            "message": finding.message[:1000],
            "subject": msgspec.to_builtins(finding.subject),
        }
        self._supervisor.stop(why | {"checkpoint": sealed})

    def _hidden(self, finding: Finding) -> bool:
        """Whether this machine's approvers muted it; what is enforced is enforced all the same."""
        if self._veil is None:
            self._veil = read_veil(lambda: LogLeaves(self._home).sealed)
        return self._veil.hides("run", self.run_id) or self._veil.hides_path(finding.subject.path)

    def _start(self, policy: str, lock: str | None) -> dict[str, Any]:
        return {
            "command": self._command,
            "cwd": str(Path.cwd()),
            "host": platform.node(),
            "boot_id": _read_line("/proc/sys/kernel/random/boot_id"),
            "kernel": platform.release(),
            "account": {
                "uid": os.getuid(),
                "name": _account_name(),
                "loginuid": _read_line("/proc/self/loginuid"),
                "session": _read_line("/proc/self/sessionid"),
            },
            "trainguard": __version__,
            "guard": self._home.store_blob(canonical_json(guard_files())),
            "policy": policy,
            "lock": lock,
            "settings": {"links": self._policy.links, "commits": self._policy.commits},
            "began_ns": str(time.time_ns()),
            "key_sha256": key_commitment(self._key),
            "environment": settings_of(os.environ),
            "submitter": submitter(os.environ),
            "inputs": named_inputs(self._command, Path.cwd()),
            "stdin": _standard_input(),
        }

    def _measure(self, recorder: _Observed, lock: str | None, attempt: int = 0) -> None:
        """Measure what is about to run. What cannot be measured is a record too, and ends as blind."""
        try:
            with working("measuring what is about to run", shown=attempt == 0):
                measurement = measure(
                    self._command,
                    cwd=Path.cwd(),
                    env=dict(os.environ),
                    cache=self._home.cache,
                    against=self._lock.measurement if self._lock is not None else None,
                )
            blob = self._home.store_blob(measurement.encode())
        except Exception as error:  # whatever fails in measuring, the command still runs, and the link is blind
            recorder.add("unmeasured", {"reason": f"{type(error).__name__}: {error}"[:1000], "attempt": attempt})
            return
        signed = self._lock.trusted if self._lock is not None else None
        recorder.add("measurement", {"blob": blob, "lock": lock, "signed": signed, "attempt": attempt})

    def _watch_unless_refused(
        self, recorder: _Observed, judge: _LiveJudge, sealer: _Sealer, gate: Gate
    ) -> Ended | None:
        """How the command ended; None when preflight refused it. A command that is not started is on record as such."""
        if (self._gate or "stop" in self._policy.measures) and judge.violated:
            why = "--gate" if self._gate else "--enforce stop"
            recorder.add("end", {"not_started": f"preflight found differences from the lock ({why})"})
            return None
        try:
            return self._watch(recorder, judge, sealer, gate)
        except TrainguardError as error:
            recorder.add("end", {"not_started": str(error)})
            raise

    def _points(self) -> str:
        """The folder for replay points, or nothing where none are wanted."""
        wanted = self._policy.commits and self._policy.points_mb > 0
        return str(self._home.run(self.run_id) / "points") if wanted else ""

    def _watch(self, recorder: _Observed, judge: _LiveJudge, sealer: _Sealer, gate: Gate) -> Ended:
        policy = self._policy
        settings = Settings(
            links=policy.links,
            budget_percent=policy.budget_percent,
            credit_seconds=policy.credit_seconds,
            always_steps=policy.always_steps,
            tensors=policy.tensors,
            elements=policy.elements,
            kills=policy.kills,
            gate=gate.settings,
            outside_first_seconds=policy.outside_first_seconds,
            outside_seconds=policy.outside_seconds,
            commits=policy.commits,
            commit_percent=policy.commit_percent,
            points=self._points(),
            points_percent=policy.points_percent,
            points_mb=policy.points_mb,
            points_every=policy.points_every,
            key=self._key,
            pycache=str(_private_folder(self._home.cache / "bytecode")),
        )
        self._supervisor = supervisor = Supervisor(
            recorder,
            settings,
            heartbeat_seconds=policy.heartbeat_seconds,
            segment_seconds=policy.segment_seconds,
            hang_seconds=policy.hang_seconds,
            deny=policy.allow_signals if "deny-signals" in policy.measures else None,
            stop_grace_seconds=policy.stop_grace_seconds,
        )
        sealer.key = settings.key
        with blocked_signals() as mask:
            judge.start()
            sealer.start()
            gate.start()
            return supervisor.run(self._command, os.environ, mask=mask)


def _standard_input() -> str | None:
    """The command's standard input as the kernel names it: a path, `pipe:[…]`, `socket:[…]`; None if it is closed."""
    try:
        return str(Path("/proc/self/fd/0").readlink())[:4096]
    except OSError:
        return None


class _Restarts:
    """Measures anew, in a thread, whenever the job's launcher starts its ranks again (torchrun --max-restarts)."""

    def __init__(self, measure: Callable[[int], None]) -> None:
        self._measure = measure
        self._seen = 0
        self._threads: list[threading.Thread] = []

    def feed(self, evidence: Evidence) -> None:
        """Begin measuring when this is the first process of another attempt."""
        attempt = restart_count(evidence)
        if attempt <= self._seen or len(self._threads) >= RESTARTS_LIMIT:
            return
        self._seen = attempt
        thread = threading.Thread(target=self._measure, args=(attempt,), name="measurer", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Finish what has begun."""
        for thread in self._threads:
            thread.join(timeout=SEALING_SECONDS)


def restart_count(evidence: Evidence) -> int:
    """How often the job had been started again when this process began; 0 for records that do not say."""
    return member_of(evidence).attempt if evidence.kind == "process" else 0


class _Sealer:
    """Seals what the job saves and verifies what native code of it opened, in a thread, with a key the job never has.

    What Python code opens goes through the gate (_gate.py). The seal stays in the log and our store: nothing is written
    beside the job's own files.
    """

    def __init__(self, home: Home, run: str, log: Log, lock: str | None, add: Callable[..., Any]) -> None:
        self._home = home
        self._run = run
        self._log = log
        self._lock = lock
        self._add = add
        self._caches = compiler_caches(os.environ)
        """Compilers keep pickles there that are no checkpoints; who could have written them is measured (A8)."""
        self.key: str | None = None
        """The run's secret, by which storages are sampled; None samples nothing."""
        self.last: dict[str, Any] | None = None
        """The checkpoint that was sealed last: path, leaf, step."""
        self._ours: set[str] = set()
        """Paths saved by this attempt; reading those back needs no verifying, the seal was just made from them."""
        self._attempt = 0
        self._queue: queue.Queue[tuple[Callable[[Path, int | None], None], Path, int | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="sealer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def saved(self, path: str) -> bool:
        """Whether this run saved the file at `path`."""
        return path in self._ours

    def feed(self, evidence: Evidence) -> None:
        """Queue what a `saved` or `open` record calls for; other records are passed over."""
        if restart_count(evidence) > self._attempt:
            self._attempt = restart_count(evidence)
            self._ours = set()  # what it resumes from lay on disk while nobody ran
        if evidence.kind == "saved":
            path = Path(str(evidence.body["path"]))
            self._ours.add(str(path))
            self._queue.put((self._seal, path, evidence.step))
        elif evidence.kind == "point" and POINT_NAME.fullmatch(str(evidence.body.get("name"))):
            self._queue.put((self._point, self._home.run(self._run) / "points" / evidence.body["name"], evidence.step))
        elif evidence.kind == "open":
            for path in _read_paths(evidence):
                cached = any(path.is_relative_to(cache) for cache in self._caches)
                if not cached and str(path) not in self._ours and is_model_file(path):
                    self._queue.put((self._verify, path, evidence.step))

    def close(self) -> None:
        """Finish what is queued."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout=SEALING_SECONDS)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            action, path, step = task
            try:
                action(path, step)
            except TrainguardError as error:
                self._add("seal", {"path": str(path), "unsealed": str(error)}, step=step)

    def _seal(self, path: Path, step: int | None) -> None:
        report = seal_path(self._home, path, run=self._run, step=step, lock=self._lock, log=self._log, source="run")
        findings = msgspec.to_builtins(report.findings)
        prints = read_prints(path, self.key) if self.key is not None else None
        blob = self._home.store_blob(prints.encode()) if prints is not None else None
        body = {"path": str(path), "leaf": report.leaf, "findings": findings, "prints": blob}
        self._add("seal", body, step=step)
        self.last = {"path": str(path), "leaf": report.leaf, "step": step}

    def _point(self, path: Path, step: int | None) -> None:
        """Hash a replay point that the job wrote; one that is gone again made room for newer ones."""
        try:
            self._add("point_sealed", seal_point(path), step=step)
        except TrainguardError as error:
            self._add("point_unsealed", {"name": path.name, "reason": str(error)}, step=step)

    def _verify(self, path: Path, step: int | None) -> None:
        """Look at a model file the job opened: is it code (E1), and is it what our log has a seal of?"""
        findings = [f for f in vet(path).to_findings(run=self._run) if f.outcome == "violated"]
        ledger = read_ledger(self._home, load_public_key(self._home.keys / "attestation.pub"))
        body: dict[str, Any] = {"path": str(path)}
        if ledger is not None and ledger.newest(place=str(path.resolve())) is not None:
            seal = verify_seal(path, home=self._home)
            findings.extend(seal.findings)
            if (sealed := sealed_as(seal)) is not None:
                body["sealed"] = sealed
        self._add("opened", {**body, "findings": msgspec.to_builtins(findings)}, step=step)


def _read_paths(evidence: Evidence) -> list[Path]:
    """Paths that an `open` record says native code has mapped; whatever else it holds is passed over."""
    files = evidence.body.get("files")
    entries = [entry for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    return [
        Path(entry["path"])
        for entry in entries
        if isinstance(entry.get("path"), str) and entry.get("mode") == "mapped" and Path(entry["path"]).is_absolute()
    ]


class _Observed:
    """A recorder that also shows every record to the live judge and the sealer."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self.observers: list[Callable[[Evidence], None]] = []

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> Evidence | None:
        record = self._writer.add(kind, body, source=source, **fields)
        if record is not None:
            for observer in self.observers:
                observer(record)
        return record

    def seal(self, *, final: bool = False) -> int | None:
        return self._writer.seal(final=final)


class _LiveJudge:
    """Appraises records in a thread while the run goes on, so that a finding is heard when it happens.

    Its findings are for the ear only: the verdict is drawn afterwards from what the log proves.
    """

    QUEUE_LIMIT = 100_000

    def __init__(self, context: Context, notify: Callable[[Finding], None]) -> None:
        self._appraiser = Appraiser(context)
        self._notify = notify
        self._queue: queue.Queue[Evidence | None] = queue.Queue(self.QUEUE_LIMIT)
        self._thread: threading.Thread | None = None

    def feed(self, evidence: Evidence) -> None:
        """Judge `evidence` now, or soon once the thread runs; a full queue drops it, the verdict does not need it."""
        if self._thread is None:
            self._judge(evidence)
            return
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(evidence)

    def start(self) -> None:
        """From now on judge in a thread, so that the supervisor never waits."""
        self._thread = threading.Thread(target=self._work, name="judge", daemon=True)
        self._thread.start()

    @property
    def violated(self) -> bool:
        """Whether something is violated by now."""
        return any(finding.outcome == "violated" for finding in self._appraiser.findings)

    def close(self) -> None:
        """Finish what is queued."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout=60)

    def _work(self) -> None:
        while (evidence := self._queue.get()) is not None:
            self._judge(evidence)

    def _judge(self, evidence: Evidence) -> None:
        for finding in self._appraiser.see(evidence):
            self._notify(finding)


def run_id(name: str | None) -> str:
    """A new run's id: its name if it was given one, else date, time and six random hex digits."""
    return name or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def _private_folder(path: Path) -> Path:
    """`path`, made if need be, ours alone. A folder that others can write is not used."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        return path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    return path


def _account_name() -> str | None:
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return None


def _read_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"trainguard: {message}", file=sys.stderr)
