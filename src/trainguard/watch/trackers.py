"""Which runs of experiment trackers the job has open: read from modules the job itself imported.

So the verdict can be brought to the page where people look at the run (`trainguard verdict RUN --tag`). A claim of the
job; no check rests on it.
"""

from __future__ import annotations

import sys
from typing import Any, Iterator, List, Optional, Set, Tuple

TEXT_LIMIT = 200


class Trackers:
    """A link in form only: says each tracker run once."""

    name = "trackers"
    every_step = False

    def __init__(self, client: Any) -> None:
        self._said: Set[Tuple[str, str]] = set()

    def before(self, step: Any) -> None:
        """Nothing to see before the update."""

    def after(self, step: Any) -> Optional[List[List[str]]]:
        """[[tracker, run id, where], …] for runs not said before; None when there is nothing new."""
        new = [run for run in _open_runs() if (run[0], run[1]) not in self._said]
        self._said.update((run[0], run[1]) for run in new)
        return [list(run) for run in new] or None

    def forked(self) -> None:
        """The child's trackers are its own."""
        self._said = set()


def _open_runs() -> Iterator[Tuple[str, str, str]]:
    fluent = sys.modules.get("mlflow.tracking.fluent")
    if fluent is not None:
        run = fluent.active_run()
        if run is not None:
            yield "mlflow", _text(run.info.run_id), _text(sys.modules["mlflow"].get_tracking_uri())
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        yield "wandb", _text(run.id), _text(run.project)


def _text(value: Any) -> str:
    return str(value)[:TEXT_LIMIT]
