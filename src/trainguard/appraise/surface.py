"""Check *surface*: the names that training calls lead to the code that was verified (docs/checks/surface.md).

A difference is a fact about the running process; whose code stands there decides what it means. Code that is not what
its own file compiles to, code swapped inside a function, and defaults other than the source's are proof. A function of
another installed package is explained by that package's hash. The job's own patches are suspicious until approved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainguard.appraise.origin import text
from trainguard.appraise.sweeps import SweepCheck, place_of, whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding, Outcome


class Surface(SweepCheck):
    """See the module."""

    name = "surface"

    def line(self, evidence: Evidence, line: dict[str, Any]) -> Iterator[Finding]:
        binding, kind = text(line.get("binding")) or "?", text(line.get("kind")) or "?"
        place = place_of(line)
        since = self._since(evidence)
        if kind in ("defaults", "constant", "removed"):
            yield from self._value(evidence, line, binding, kind, since)
            return
        standing = self._origins.standing(place) if place is not None else "generated"
        function = text(line.get("function")) or "native code"
        claims = line.get("claims") is True
        if standing in ("library", "guard") and not claims and not (kind == "replaced" and _inside_torch(place)):
            return  # a wrapper that an installed package put there; its file is verified
        outcome: Outcome = "violated" if claims or kind == "code" or standing == "planted" else "suspicious"
        named = "other code than its file compiles to" if claims else f"{function} in {whose(standing)}"
        yield from self._finding(
            evidence,
            outcome,
            f"{binding} is {_kind(kind)}: it leads to {named} at {place or 'an unknown place'} ({since})",
            place=place,
            techniques=("B4", "B3") if kind == "code" else ("B3", "B4"),
            expected=f"the function {binding} of the verified source",
            found=f"{function} at {place}",
        )

    def _value(
        self, evidence: Evidence, line: dict[str, Any], binding: str, kind: str, since: str
    ) -> Iterator[Finding]:
        sentences = {
            "defaults": f"the defaults of {binding} are not those of its source",
            "constant": f"the constant {binding} is not what its source says",
            "removed": f"{binding} was removed",
        }
        yield from self._finding(
            evidence,
            "violated" if kind == "defaults" else "suspicious",
            f"{sentences[kind]} ({since})",
            place=place_of(line) or binding,
            techniques=("B3",) if kind == "removed" else ("B4",),
            expected=text(line.get("expected")),
            found=text(line.get("found")),
        )

    def _sweep(self, evidence: Evidence) -> Iterator[Finding]:
        unread = evidence.body.get("unread")
        if isinstance(unread, list) and unread:
            self._blind[f"the source of {len(unread)} files could not be had again: {str(unread[0])[:200]}"] = None
        yield from super()._sweep(evidence)


def _kind(kind: str) -> str:
    return {"replaced": "replaced", "wrapped": "wrapped", "code": "changed inside"}.get(kind, kind[:40])


def _inside_torch(place: str | None) -> bool:
    return place is not None and "/torch/" in place
