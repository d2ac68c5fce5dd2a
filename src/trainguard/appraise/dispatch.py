"""Check *dispatch*: operators call torch's own kernels (docs/checks/dispatch.md).

A kernel of torch's own operators (`aten::`, `prim::`, …) that was registered from a Python file outside installed
packages changes arithmetic everywhere, without a trace in names or hashes. Operators of the job's own name spaces are
its own business. Modes that stand between every call and its kernel are judged by where they are defined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainguard.appraise.origin import text
from trainguard.appraise.sweeps import SweepCheck, place_of, whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding

TORCH_NAMESPACES = ("aten::", "prim::", "prims::", "c10d::", "_c10d_functional::", "quantized::", "inductor::")


class Dispatch(SweepCheck):
    """See the module."""

    name = "dispatch"

    def line(self, evidence: Evidence, line: dict[str, Any]) -> Iterator[Finding]:
        kind, place, on = text(line.get("kind")) or "?", place_of(line), text(line.get("on")) or "?"
        standing = self._origins.standing(place) if place is not None else "generated"
        if standing in ("library", "guard"):
            return
        if kind == "kernel" and standing in ("own", "approved") and not on.startswith(TORCH_NAMESPACES):
            return
        function = text(line.get("function")) or "?"
        what = (
            f"the {function} kernel of {on} is" if kind == "kernel" else f"{kind} {function}, over every operator, is"
        )
        yield from self._finding(
            evidence,
            "violated" if standing == "planted" else "suspicious",
            f"{what} Python code at {place}, in {whose(standing)} ({self._since(evidence)})",
            place=place,
            techniques=("B6",),
            expected="kernels registered by torch or an installed package",
            found=f"registered at {place}",
        )
