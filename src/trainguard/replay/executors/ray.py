"""Tasks on a Ray cluster: one Ray task each. Needs `pip install trainguard[ray]`.

The nodes see the auditor's state folder, the run's working folder and the worker's Python under the same paths. What a
node runs is `python -m trainguard.replay.worker`, in a process of its own: Ray only carries bytes in and out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trainguard.errors import MalformedEvidence, Misuse
from trainguard.replay.tasks import NotPerformed, Task, outcome_path, parse_outcome, write_outcome

SETTINGS = frozenset({"address", "num_cpus", "num_gpus", "memory", "max_retries"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RayExecutor:
    """A Ray cluster: the one at `address`, or one of this machine for as long as the audit runs."""

    worker: tuple[str, ...]
    address: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """What each task asks of its node."""
    name: str = "ray"
    ahead: bool = True

    @classmethod
    def made(cls, worker: Sequence[str], settings: Mapping[str, str]) -> RayExecutor:
        """Settings: `address`, and of a task `num_cpus`, `num_gpus`, `memory` (bytes), `max_retries`."""
        unknown = set(settings) - SETTINGS
        numbers = {name: value for name, value in settings.items() if name != "address"}
        if unknown or not all(value.isdigit() for value in numbers.values()):
            raise Misuse(f"executor ray: expected {', '.join(sorted(SETTINGS))} (numbers), found {dict(settings)}")
        options = {name: int(value) for name, value in numbers.items()}
        return cls(worker=tuple(worker) or (sys.executable,), address=settings.get("address"), options=options)

    def perform(self, tasks: Sequence[Task], folder: Path) -> None:
        """See `Executor`."""
        try:
            import ray
        except ImportError as error:
            raise NotPerformed(
                "executor ray: ray is not installed", next_step="pip install 'trainguard[ray]'"
            ) from error
        ours = not ray.is_initialized()
        try:
            if ours:
                ray.init(address=self.address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            self._perform(ray, tasks, folder)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise NotPerformed(f"executor ray: {said[-1][:300]}") from error
        finally:
            if ours:
                ray.shutdown()

    def _perform(self, ray: Any, tasks: Sequence[Task], folder: Path) -> None:
        remote = ray.remote(**{"num_cpus": 1, **self.options})(
            subprocess.run
        )  # nothing of ours has to be in Ray's Python
        command = [*self.worker, "-m", "trainguard.replay.worker", "-", "-"]
        waiting = {remote.remote(command, input=msgspec.json.encode(task), capture_output=True): task for task in tasks}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(ready)
            done = ray.get(ready)
            if done.returncode:
                said = done.stderr.decode(errors="replace")[-300:]
                raise NotPerformed(f"executor ray: the worker ended with status {done.returncode} and said: {said}")
            try:
                write_outcome(outcome_path(folder, task), parse_outcome(done.stdout, task.id))
            except MalformedEvidence as error:
                raise NotPerformed(f"executor ray: {error}") from error
