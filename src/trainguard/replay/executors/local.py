"""Tasks on this machine: in this process one after another, or in worker processes, some at a time.

A worker may be started through other words, `ssh verifier python` or `podman run … image python`: then the task goes in
by stdin and its outcome comes back by stdout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainguard.errors import MalformedEvidence, Misuse
from trainguard.replay.tasks import (
    OUTCOME_LIMIT_BYTES,
    NotPerformed,
    Task,
    outcome_path,
    parse_outcome,
    perform,
    write_outcome,
)

ENGINES = ("docker", "podman")
TEMPORARY = "/tmp:exec"  # noqa: S108 - inside the container
SPARE_SECONDS = 600.0
"""On top of the task's own limit: starting, copying, measuring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalExecutor:
    """Processes of this machine, or of one that its words lead to."""

    worker: tuple[str, ...] = ()
    """Empty performs tasks in this process."""
    jobs: int = 1
    image: str | None = None
    """A container image whose `python` performs tasks: it needs trainguard beside the job's packages."""
    engine: str = "docker"
    name: str = "local"

    @classmethod
    def made(cls, worker: Sequence[str], settings: Mapping[str, str]) -> LocalExecutor:
        """Settings: `jobs`, how many at a time; `image`, with `engine` docker or podman."""
        jobs, engine = settings.get("jobs", "1"), settings.get("engine", "docker")
        if set(settings) - {"jobs", "image", "engine"} or not jobs.isdigit() or not 0 < int(jobs) <= 1024:
            raise Misuse(f"executor local: expected the settings jobs=N and engine=…, found {dict(settings)}")
        if engine not in ENGINES:
            raise Misuse(f"executor local: expected engine to be one of {', '.join(ENGINES)}, found {engine!r}")
        return cls(worker=tuple(worker), jobs=int(jobs), image=settings.get("image"), engine=engine)

    @property
    def ahead(self) -> bool:
        """Together only where several run at a time: else the first difference spares the rest."""
        return self.jobs > 1

    def perform(self, tasks: Sequence[Task], folder: Path) -> None:
        """See `Executor`."""
        if self.jobs == 1 and not self.worker and self.image is None:
            for task in tasks:
                write_outcome(outcome_path(folder, task), perform(task))
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda task: _worked(self.words(task), task, folder), tasks))

    def words(self, task: Task) -> tuple[str, ...]:
        """What starts the worker of a task. A container sees the working folder, the points and the lock, read only."""
        if self.image is None:
            return self.worker or (sys.executable,)
        state = Path(task.state)
        seen = [task.cwd, str(state / "runs" / task.run / "points")]
        seen += [str(state / "blobs" / task.lock)] if task.lock else []
        mounts = [word for path in seen for word in ("--volume", f"{path}:{path}:ro")]
        return (
            self.engine, "run", "--rm", "--interactive", "--network", "none", "--read-only", "--tmpfs", TEMPORARY,
            "--cap-drop", "ALL", "--user", f"{os.getuid()}:{os.getgid()}", *mounts, self.image,
            *(self.worker or ("python",)),
        )  # fmt: skip


def _worked(words: Sequence[str], task: Task, folder: Path) -> None:
    """One task in a worker process."""
    command = [*words, "-m", "trainguard.replay.worker", "-", "-"]
    try:
        done = subprocess.run(
            command, input=msgspec.json.encode(task), capture_output=True, check=False,
            timeout=2 * task.limit_seconds + SPARE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotPerformed(f"{words[0]}: the worker cannot be started or takes too long: {error}") from error
    if done.returncode or len(done.stdout) > OUTCOME_LIMIT_BYTES:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise NotPerformed(
            f"{' '.join(words)}: the worker ended with status {done.returncode} and said: {said[0][:300]}",
            next_step="name a Python that has trainguard there: --worker 'ssh host /opt/guard/bin/python'",
        )
    try:
        write_outcome(outcome_path(folder, task), parse_outcome(done.stdout, task.id))
    except MalformedEvidence as error:
        raise NotPerformed(f"{' '.join(words)}: {error}") from error
