"""Check *surface*: the names that training calls lead to the code that was verified (docs/checks/surface.md).

A difference is a fact about the running process; whose code stands there decides what it means. Code that is not what
its own file compiles to, code swapped inside a function, and defaults other than the source's are proof. A function of
another installed package is as good as that package's hash: it is told (`installed`), and is no finding. The job's own
patches are suspicious until approved. A variable of a closure that its source binds once, and that holds another
object, is proof too; a number that only a computed assignment of the job's own sources moves is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainguard.appraise.origin import Standing, rows, text
from trainguard.appraise.sweeps import SweepCheck, place_of, whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding, Outcome

KINDS = {
    "replaced": "replaced",
    "wrapped": "wrapped",
    "code": "changed inside",
    "moved": "another than when the training began",
    "class": "another than when the training began",
    "bases": "a class with other bases than when the training began",
    "guest": "replaced",
    "added": "a method that was put before that of its base",
}
"""What a difference is called; see watch/surface.py and watch/steady.py."""


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
        if kind == "cell":
            yield from self._cell(evidence, line, binding, since)
            return
        if kind == "value":
            yield from self._number(evidence, line, binding, since)
            return
        if kind == "unhooked":
            yield from self._unhooked(evidence, binding, place, since)
            return
        standing = self._origins.standing(place) if place is not None else "generated"
        if kind == "moved" and self._is_at_home(line, place, standing):
            return
        if kind == "guest" and standing not in ("planted", "foreign"):
            if standing in ("library", "generated"):
                self._installed[f"{binding}: {place}"] = None
            return  # names of torch that no source of torch can be compared with: the job's own code may use them
        function = text(line.get("function")) or "native code"
        claims = line.get("claims") is True
        if standing in ("library", "guard") and not claims and not (kind == "replaced" and _inside_torch(place)):
            if standing == "library":  # its file is verified
                self._installed[f"{binding}: {place}"] = None
            return
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

    def _unhooked(self, evidence: Evidence, binding: str, place: str | None, since: str) -> Iterator[Finding]:
        """A step without torch's hooks is seen by no link."""
        yield from self._finding(
            evidence,
            "suspicious",
            f"{binding} runs torch's hooks no more: no link sees its steps ({since}, or later)",
            place=place or binding,
            techniques=("B3", "G7"),
            expected="the step of torch.optim, with its hooks around it",
        )

    def _is_at_home(self, line: dict[str, Any], place: str | None, standing: Standing) -> bool:
        """Whether a name of the job's own leads to something that the job may well have put there itself."""
        if standing == "approved":
            return True
        before = text(line.get("was"), 4096)
        return standing == "own" and before is not None and place is not None and _file(before) == _file(place)

    def _cell(self, evidence: Evidence, line: dict[str, Any], binding: str, since: str) -> Iterator[Finding]:
        """A closure's variable that its source binds once: no code that runs in the ordinary way can change it."""
        yield from self._finding(
            evidence,
            "violated",
            f"{binding} was changed from outside: its source binds it once ({since})",
            place=place_of(line) or binding,
            techniques=("B4", "B3"),
            expected=text(line.get("expected")),
            found=text(line.get("found")),
        )

    def _number(self, evidence: Evidence, line: dict[str, Any], binding: str, since: str) -> Iterator[Finding]:
        """A plain value is another: weighed by who, of the job's own sources, assigns it."""
        stores = [(place, kind) for place, kind in rows(line.get("stores"), 2) if isinstance(place, str)]
        standings = [(self._origins.standing(place), kind) for place, kind in stores]
        if any(one in ("approved", "library") or (one == "own" and kind != "literal") for one, kind in standings):
            return  # verified or ordinary code moves it: a counter, a switch, a schedule
        planted = [place for place, _ in stores if self._origins.standing(place) == "planted"]
        told = f"; it is assigned at {stores[0][0]}" if stores else "; nothing in the job's own sources assigns it"
        yield from self._finding(
            evidence,
            "violated" if planted else "suspicious",
            f"the value of {binding} is another than when the training began ({since}){told[:400]}",
            place=(planted or [place for place, _ in stores] or [binding])[0],
            techniques=("B4", "B3"),
            expected=text(line.get("expected")),
            found=text(line.get("found")),
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
    return KINDS.get(kind, kind[:40])


def _file(place: str) -> str:
    return place.rpartition(":")[0] if ":" in place else place


def _inside_torch(place: str | None) -> bool:
    return place is not None and "/torch/" in place
