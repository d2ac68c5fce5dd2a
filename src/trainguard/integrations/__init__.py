"""Wiring to training frameworks and experiment trackers. None of it is needed: `trainguard run` watches any script.

Callbacks for transformers, Lightning and Accelerate run in the training process and only add names, epochs and metrics
to the record, so that findings can be read beside them. In a process that is not guarded they do nothing. `mlflow` and
`wandb` run on the judge's side and bring the verdict to the tracker's page.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def guarded() -> bool:
    """Whether this process runs under `trainguard run`."""
    return "_trainguard" in sys.modules


def label(by: str, names: Mapping[str, Any]) -> bool:
    """Add facts (str, bool, int, float) to the record of this run; `by` says who tells. False when nobody listens."""
    return bool(_guard().label(by, names)) if guarded() else False


def metric(by: str, values: Mapping[str, Any], epoch: float | None = None) -> bool:
    """Add numbers at the current optimizer step. False when nobody listens."""
    return bool(_guard().metric(by, values, epoch)) if guarded() else False


def _guard() -> Any:
    return importlib.import_module("_trainguard.annotations")
