"""Where tasks are performed: one small file per engine, the same content-addressed tasks for all (spec/replay.md).

    executor = chosen("slurm", worker=("/opt/guard/bin/python",), settings={"slurm_partition": "audit"})
    executor.perform(tasks, folder)      # afterwards every outcome lies in the folder, or Unavailable says why not

An engine's own package is imported when it is asked for: `pip install trainguard[slurm]`, `trainguard[ray]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainguard.errors import Misuse
from trainguard.replay.executors.kubernetes import KubernetesExecutor
from trainguard.replay.executors.local import LocalExecutor
from trainguard.replay.executors.ray import RayExecutor
from trainguard.replay.executors.slurm import SlurmExecutor
from trainguard.replay.tasks import Executor

NAMES = ("local", "slurm", "ray", "kubernetes")


def chosen(name: str, *, worker: Sequence[str] = (), settings: Mapping[str, str] | None = None) -> Executor:
    """The executor `name`. worker: words that start a Python with trainguard where tasks are performed; empty takes
    ours. settings: what the engine is told, by its own names. Raises Misuse for an engine or a setting there is not."""
    given = dict(settings or {})
    if name == "local":
        return LocalExecutor.made(worker, given)
    if name == "slurm":
        return SlurmExecutor.made(worker, given)
    if name == "ray":
        return RayExecutor.made(worker, given)
    if name == "kubernetes":
        return KubernetesExecutor.made(worker, given)
    raise Misuse(f"expected an executor of {', '.join(NAMES)}, found {name!r}")
