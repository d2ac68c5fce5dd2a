"""Check *deferred*: code that will run later is known code (docs/checks/deferred.md).

Threads, signal handlers, callbacks and import hooks of installed packages and of the job's own code are listed. Those
of other files are findings, and so are a trace function, an import hook or a replaced builtin of code without a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainguard.appraise.origin import text
from trainguard.appraise.sweeps import SweepCheck, place_of, whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding

NEVER_ORDINARY = ("builtin",)
"""Kinds that are suspicious even in the job's own code."""


class Deferred(SweepCheck):
    """See the module."""

    name = "deferred"

    def line(self, evidence: Evidence, line: dict[str, Any]) -> Iterator[Finding]:
        kind, place = text(line.get("kind")) or "?", place_of(line)
        if kind == "debugger":
            yield from self._debugger(evidence, line)
            return
        if place is None:
            return  # native code, or a timer whose handler is judged for itself
        standing = self._origins.standing(place)
        if standing in ("library", "guard", "cache"):
            return
        if standing in ("own", "approved") and kind not in NEVER_ORDINARY:
            return
        on = text(line.get("on"))
        function = (text(line.get("function")) or "?") + (f" ({on})" if on else "")
        yield from self._finding(
            evidence,
            "violated" if standing == "planted" else "suspicious",
            f"{kind} {function} at {place}, in {whose(standing)} ({self._since(evidence)})",
            place=place,
            techniques=("B7",),
            expected=f"no {kind} outside the job's code and its libraries",
            found=f"{kind} {function}",
        )

    def _debugger(self, evidence: Evidence, line: dict[str, Any]) -> Iterator[Finding]:
        name, on = text(line.get("function")) or "?", text(line.get("on")) or "?"
        yield from self._finding(
            evidence,
            "suspicious",
            f"{name} ({on}) is attached to the training process as a debugger ({self._since(evidence)})",
            place=name,
            techniques=("B8",),
            expected="no debugger",
            found=name,
        )
