"""Tasks as a Slurm array, through submitit: one array for all tasks of a wave.

Needs `pip install trainguard[slurm]`, and the auditor's state folder, the run's working folder and the worker's Python
under the same paths on every node. submitit pickles one function of the standard library and two paths; what the node
runs is `python -m trainguard.replay.worker`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainguard.errors import Misuse
from trainguard.replay.tasks import NotPerformed, Task, outcome_path, task_path

CLUSTERS = ("slurm", "local")
"""Of submitit: a real Slurm, or processes of this machine (to try the words)."""

SPARE_MINUTES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmExecutor:
    """A Slurm cluster, reached by the `sbatch` on PATH."""

    worker: tuple[str, ...]
    cluster: str = "slurm"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """submitit's parameters: slurm_partition, slurm_account, slurm_qos, slurm_array_parallelism, cpus_per_task, …"""
    name: str = "slurm"
    ahead: bool = True

    @classmethod
    def made(cls, worker: Sequence[str], settings: Mapping[str, str]) -> SlurmExecutor:
        """Settings: `cluster`, and submitit's parameters by name; digits become numbers."""
        given = {name: int(value) if value.isdigit() else value for name, value in settings.items()}
        cluster = given.pop("cluster", "slurm")
        if cluster not in CLUSTERS:
            raise Misuse(f"executor slurm: expected cluster to be one of {', '.join(CLUSTERS)}, found {cluster!r}")
        return cls(worker=tuple(worker) or (sys.executable,), cluster=str(cluster), settings=given)

    def perform(self, tasks: Sequence[Task], folder: Path) -> None:
        """See `Executor`."""
        engine = self._engine(folder, tasks)
        command = [*self.worker, "-m", "trainguard.replay.worker"]
        words = [[*command, str(task_path(folder, task)), str(outcome_path(folder, task))] for task in tasks]
        try:
            jobs = engine.map_array(subprocess.call, words)
        except Exception as error:  # submitit's own errors, and those of sbatch
            raise NotPerformed(f"Slurm did not take the tasks: {_said(error)}") from error
        failed = [reason for job in jobs if (reason := _failure(job)) is not None]
        missing = [task.id for task in tasks if not outcome_path(folder, task).exists()]
        if missing:
            why = failed[0] if failed else "no reason given"
            raise NotPerformed(f"Slurm: {len(missing)} of {len(tasks)} tasks left no outcome: {why}")

    def _engine(self, folder: Path, tasks: Sequence[Task]) -> Any:
        try:
            import submitit
        except ImportError as error:
            raise NotPerformed(
                "executor slurm: submitit is not installed", next_step="pip install 'trainguard[slurm]'"
            ) from error
        minutes = int(max(task.limit_seconds for task in tasks) / 60) * 2 + SPARE_MINUTES
        try:
            engine = submitit.AutoExecutor(folder=folder / "slurm", cluster=self.cluster)
            engine.update_parameters(**{"name": "trainguard-audit", "timeout_min": minutes, **self.settings})
        except Exception as error:
            raise NotPerformed(f"executor slurm: {_said(error)}") from error
        return engine


def _failure(job: Any) -> str | None:
    """Why a job of the array left nothing, or None when its worker ended well."""
    try:
        status = job.result()
    except Exception as error:  # whatever the node raised is the reason
        return f"job {job.job_id}: {_said(error)}"
    return None if status == 0 else f"job {job.job_id}: the worker ended with status {status}"


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:300]
