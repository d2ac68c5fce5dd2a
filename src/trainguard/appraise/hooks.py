"""Check *hooks*: functions that torch calls during training are known ones (docs/checks/hooks.md).

Hooks of installed packages and of the approved code hold and are listed. Without a lock, a hook of the job's own script
that can touch gradients or the update is suspicious only when it appears after the first step. Hooks from files outside
the job, and from files that contradict the lock, are findings wherever they hang.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainguard.appraise.origin import text
from trainguard.appraise.sweeps import SweepCheck, place_of, whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding

ACTS_ON_TRAINING = ("gradient", "post-accumulate", "optimizer pre", "optimizer post", "backward", "saved-tensor")
"""Beginnings or parts of the kinds of hooks that see gradients or the update."""


class Hooks(SweepCheck):
    """See the module."""

    name = "hooks"

    def line(self, evidence: Evidence, line: dict[str, Any]) -> Iterator[Finding]:
        kind, place = text(line.get("kind")) or "hook", place_of(line)
        acts = any(word in kind for word in ACTS_ON_TRAINING)
        function, on = text(line.get("function")) or "?", text(line.get("on")) or "?"
        standing = self._origins.standing(place) if place is not None else None
        if standing in ("library", "guard", "approved") or (standing is None and not acts):
            return
        if standing == "own" and not (acts and (evidence.step or 0) > 1):
            return
        owner = whose(standing) if standing is not None else "native code"
        yield from self._finding(
            evidence,
            "violated" if standing == "planted" else "suspicious",
            f"{kind} {function} at {place or '?'}, in {owner}, on {on} ({self._since(evidence)})",
            place=place,
            techniques=("B5", "C1") if acts else ("B5",),
            expected="hooks of the approved code and of installed packages",
            found=f"{kind} {function}",
        )
