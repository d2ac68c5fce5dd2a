"""`Accelerator(log_with=TrainguardTracker())`: what a script logs through Accelerate, in the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from trainguard.integrations import label, metric


class TrainguardTracker(GeneralTracker):  # type: ignore[misc]
    """A tracker that writes to the run's record; idle outside `trainguard run`."""

    name = "trainguard"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()

    @property
    def tracker(self) -> TrainguardTracker:
        """Accelerate asks for the object behind the tracker; there is none but this."""
        return self

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """The configuration given to `init_trackers`."""
        label("accelerate", values)

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """What `accelerator.log` was given. The record's step is the optimizer's; the script's own goes beside it."""
        metric("accelerate", values if step is None else {**values, "own step": step})
