"""Check *live*: the Python code that runs is that of the files, seen from outside the process (docs/checks/live.md).

The supervisor's reader follows the interpreter's memory and compares functions, defaults and constants with what it
compiled itself. What it says does not pass through the process, so an attacker who has read our source and feeds the
inner half honest copies is seen here. A difference counts only against bytes that are known: those the process
compiled (link *code*), those that were measured or locked, or this product's own. A file that was edited on disk
since it was loaded cannot be compared, which is said.

The reader also looks at the guard itself: its code, its hooks in torch's tables, its engine and links (G6, G7).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import Origins, dicts, text
from trainguard.appraise.sweeps import whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

FINDING_LIMIT = 300


class Live:
    """See the module."""

    name = "live"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._origins = Origins(context)
        self._held = 0
        self._broken = 0
        self._blind: dict[str, None] = {}
        self._explained: dict[str, None] = {}
        self._told: set[tuple[int | None, str, str]] = set()
        self._stepped: set[int | None] = set()
        self._failed: set[int | None] = set()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        self._origins.see(evidence)
        if evidence.source == "process":
            if evidence.kind == "step":
                self._stepped.add(evidence.process)
            elif evidence.kind == "boot":
                self._failed.add(evidence.process)
            elif evidence.kind == "sweep" and evidence.body.get("what") == "guard":
                yield from self._from_inside(evidence)
        elif evidence.kind == "live":
            yield from self._reading(evidence)

    def _reading(self, evidence: Evidence) -> Iterator[Finding]:
        body = evidence.body
        if (error := text(body.get("error"))) is not None:
            self._blind[f"process {evidence.pid} could not be read from outside: {error}"] = None
            return
        before = self._broken
        files = body.get("files")
        hashes = files if isinstance(files, dict) else {}
        for line in dicts(body.get("found")):
            yield from self._line(evidence, line, hashes)
        for line in dicts(body.get("native")):
            yield from self._native(evidence, line)
        guard = body.get("guard")
        if isinstance(guard, dict):
            yield from self._guard(evidence, guard)
        if self._broken == before and isinstance(body.get("code"), int) and body["code"] > 0:
            self._held += 1

    # -- code -----------------------------------------------------------------------------------------------------

    def _line(self, evidence: Evidence, line: dict[str, Any], hashes: dict[str, Any]) -> Iterator[Finding]:
        binding, kind, place = text(line.get("binding")) or "?", text(line.get("kind")), text(line.get("origin"), 4096)
        file = place.rpartition(":")[0] if place is not None else ""
        ours = binding.startswith("_trainguard.")
        if kind in ("defaults", "constant"):
            outcome: Outcome = "violated" if kind == "defaults" or ours else "suspicious"
            found = (
                f"the {kind if kind == 'defaults' else 'value'} of {binding} {'are' if kind == 'defaults' else 'is'}"
            )
            message = f"{found} not what its source says"
        elif line.get("claims") is True:
            if not self._is_known(file, hashes.get(file)):
                self._blind["files that were edited since they were loaded could not be compared"] = None
                return
            outcome, message = "violated", f"{binding} runs other code than its file compiles to"
        else:
            standing = self._origins.standing(place) if place is not None else "generated"
            if standing == "library" or (standing in ("own", "approved") and kind == "replaced" and not ours):
                return  # whose file is verified; a patch of the job's own is for check *surface* to weigh
            outcome = "violated" if kind == "code" or standing == "planted" or ours else "suspicious"
            message = f"{binding} leads to {text(line.get('function')) or '?'} in {whose(standing)}"
        yield from self._finding(
            evidence,
            outcome,
            message,
            place=place or binding,
            techniques=("G6", "G7") if ours else ("B3", "B4") if kind == "replaced" else ("B4", "B3"),
            expected=text(line.get("expected")) or f"what sha256 {hashes.get(file)} compiles to",
        )

    def _is_known(self, file: str, digest: object) -> bool:
        """Whether the bytes that the reader compiled are those that were loaded, measured or locked."""
        path = self._origins.normal(file)
        area, _, below = self._origins.area(path)
        if area == "guard":
            return digest == self._origins.guard_file(below)
        loaded = self._origins.hashes.get(path)
        references = {loaded} if loaded is not None else {self._origins.locked(path), self._origins.taken(path)}
        return digest in references or (area == "library" and references == {None})

    def _native(self, evidence: Evidence, line: dict[str, Any]) -> Iterator[Finding]:
        binding = text(line.get("binding")) or "?"
        yield from self._finding(
            evidence,
            "suspicious",
            f"the native function {binding} leads to memory that belongs to no file",
            place=binding,
            techniques=("B8", "B3"),
            expected="the text of a library",
            found=text(line.get("address")),
        )

    # -- the guard ------------------------------------------------------------------------------------------------

    def _guard(self, evidence: Evidence, guard: dict[str, Any]) -> Iterator[Finding]:
        """Only where the guard's engine was at work before: what never was in place cannot have been removed."""
        if evidence.process not in self._stepped or evidence.process in self._failed:
            return
        if (unread := text(guard.get("unread"))) is not None:
            self._blind[f"process {evidence.pid}: the guard's own objects could not be read: {unread}"] = None
        for problem in _problems(guard):
            yield from self._finding(
                evidence,
                "suspicious",
                f"process {evidence.pid}: {problem}: what its inner half says from here on proves nothing",
                place="the guard inside the job",
                techniques=("G7", "G6"),
                key=problem,
            )

    def _from_inside(self, evidence: Evidence) -> Iterator[Finding]:
        """What the guard's second place inside the process misses (watch/presence.py)."""
        found = evidence.body.get("found")
        for line in found[:50] if isinstance(found, list) else ():
            yield from self._finding(
                evidence,
                "suspicious",
                f"process {evidence.pid}: {str(line)[:200]}, a part of the guard, is not what was put there",
                place="the guard inside the job",
                techniques=("G7", "G6"),
                inside=True,
            )

    # -- the balance ----------------------------------------------------------------------------------------------

    def end(self) -> Iterator[Finding | LinkState]:
        if not self._held and not self._broken:
            self._blind.setdefault("no process was read from outside: the run was too short, or it is switched off")
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(self._blind),
            explained=tuple(self._explained),
            required=False,
        )

    def _finding(
        self,
        evidence: Evidence,
        outcome: Outcome,
        message: str,
        *,
        place: str,
        techniques: tuple[str, ...],
        expected: str | None = None,
        found: str | None = None,
        key: str = "",
        inside: bool = False,
    ) -> Iterator[Finding]:
        told = (evidence.process, key or message, place)
        if told in self._told or len(self._told) >= FINDING_LIMIT:
            return
        self._told.add(told)
        if self._origins.approves(self.name, place):
            self._explained[self._origins.relative(place)] = None
            return
        self._broken += 1
        yield finding_from(
            self.name,
            outcome,
            message if inside else f"{message} (read from outside)",
            evidence,
            run=self._run,
            techniques=techniques,
            path=place if ":" in place or place.startswith("/") else None,
            expected=expected,
            found=found,
        )


def _problems(guard: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the guard inside a process that had reported steps."""
    if guard.get("modules") == 0:
        yield "the guard's modules were removed"
        return
    hooks = guard.get("hooks")
    if isinstance(hooks, list) and False in hooks:
        yield "the guard's hooks were removed from torch's optimizers"
    if guard.get("engine") is False:
        yield "the guard's engine was replaced"
    if guard.get("links") == 0:
        yield "the guard's links were removed"
    for name in ("strange", "shadowed"):
        values = guard.get(name)
        if isinstance(values, list) and values:
            said = ", ".join(str(value)[:60] for value in values[:5])
            yield f"{'links were replaced' if name == 'strange' else 'methods of the guard are hidden'}: {said}"
