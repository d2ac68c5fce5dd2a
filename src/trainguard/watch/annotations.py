"""Names, epochs and metrics that an integration adds to the record. Claims of the job, for people to read.

No check rests on an annotation: a job can say anything here. `src/trainguard/integrations` calls it from the job's
side, through `trainguard.integrations.annotate`.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Callable, Dict, Mapping, Optional

from . import bootstrap

VALUE_LIMIT = 64
"""Names taken from one annotation; the rest is counted as `more`."""

NAME_LIMIT = 100
TEXT_LIMIT = 200


def label(by: str, names: Mapping[str, Any]) -> bool:
    """Record facts about the run under the integration's name. Returns whether a supervisor is listening."""
    return _guarded("label", lambda: {"by": _text(by, NAME_LIMIT), **_bounded(names, _fact)})


def metric(by: str, values: Mapping[str, Any], epoch: Optional[float] = None) -> bool:
    """Record numbers at the current optimizer step; what is not a number is left out. Returns as `label` does."""

    def body() -> Dict[str, Any]:
        said = {"by": _text(by, NAME_LIMIT), **_bounded(values, _number)}
        number = _number(epoch)
        return said if number is None else {**said, "epoch": number}

    return _guarded("metric", body)


def _guarded(kind: str, body: Callable[[], Dict[str, Any]]) -> bool:
    """Send what `body` makes. A fault of ours is counted like any other and never reaches the job."""
    client = bootstrap.current()
    if client is None or not client.alive:
        return False
    try:
        client.send(kind, body(), _step())
    except Exception as error:
        client.fault("annotations." + kind, error)
    return True


def _step() -> Optional[int]:
    """Optimizer steps of this process so far; None before the first."""
    module = sys.modules.get(__package__ + ".engine")
    engine = module.current() if module is not None else None
    return (engine.tally.steps or None) if engine is not None else None


def _bounded(values: Mapping[str, Any], read: Any) -> Dict[str, Any]:
    taken: Dict[str, Any] = {}
    more = 0
    for name, value in values.items():
        kept = read(value)
        if kept is None:
            continue
        if len(taken) == VALUE_LIMIT:
            more += 1
            continue
        taken[_text(name, NAME_LIMIT)] = kept
    return {"values": taken, "more": more} if more else {"values": taken}


def _fact(value: Any) -> Any:
    number = _number(value)
    if number is not None or isinstance(value, bool):
        return number if number is not None else value
    return _text(value, TEXT_LIMIT) if isinstance(value, str) else None


def _number(value: Any) -> Any:
    """A plain finite int or float, or the word for a float that is not finite; None for anything else.

    Tensors are left alone: reading one may wait for a device.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else None
    return float(value) if math.isfinite(value) else repr(float(value))


def _text(value: Any, limit: int) -> str:
    return str(value)[:limit]
