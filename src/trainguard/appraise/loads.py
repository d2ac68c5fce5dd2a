"""Check *loads*: what the job read as a model file was vetted, and no pickle named what runs code (E1, E2).

The record `opened` says what vetting a file found, before or while the job read it (cli/_gate.py). Its findings are
told by check *seals*, beside those about seals; here it is counted what was vetted, could not be, and was refused.
The frame `load` is a process's own: an unpickler in it was about to resolve a name that starts programs or runs text as
code. A job can have an honest reason to send such a name around, so it is suspicious, and approved by its line.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainguard.appraise.interface import Context, finding_from
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState

SHOWN_LIMIT = 20
FINDINGS_LIMIT = 200


class Loads:
    """See the module."""

    name = "loads"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._policy = context.policy
        self._held = 0
        self._broken = 0
        self._explained: set[str] = set()
        self._blind: dict[str, None] = {}
        self._named: set[tuple[str, str | None]] = set()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        if evidence.kind == "opened" and evidence.source == "supervisor":
            yield from self._opened(evidence)
        elif evidence.kind == "load" and evidence.source == "process":
            yield from self._named_in_memory(evidence)

    def end(self) -> Iterator[LinkState]:
        reasons = list(self._blind)
        more = len(reasons) - SHOWN_LIMIT
        shown = (*reasons[:SHOWN_LIMIT], *([f"and {more} more"] if more > 0 else []))
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=shown,
            explained=tuple(sorted(self._explained)),
            required=False,  # a job that reads no model files has nothing to vet
        )

    def _opened(self, evidence: Evidence) -> Iterator[Finding]:
        body = evidence.body
        left_out, verdict, why = body.get("left_out"), body.get("verdict"), body.get("why")
        if isinstance(left_out, int):
            if left_out:
                self._blind[f"{left_out} model files were not vetted: the budget for it was used up"] = None
            return
        if body.get("findings"):
            self._broken += 1
        elif verdict == "safe":
            self._held += 1
        else:
            path = str(body.get("path"))[:500]
            self._blind[f"{path}: not known to be safe: {str(why)[:500]}"] = None
            if body.get("refused") is True:
                message = f"{path} was not let be read: {str(why)[:1000]}"
                yield finding_from(
                    self.name, "suspicious", message, evidence, run=self._run, techniques=("E1",), path=path
                )

    def _named_in_memory(self, evidence: Evidence) -> Iterator[Finding]:
        body = evidence.body
        unvetted, name, place = body.get("unvetted"), body.get("global"), body.get("place")
        if isinstance(unvetted, str):
            self._blind[f"{unvetted[:500]}: could not be vetted: {str(body.get('why'))[:200]}"] = None
        if not isinstance(name, str) or not (place is None or isinstance(place, str)):
            return
        if (name, place) in self._named or len(self._named) >= FINDINGS_LIMIT:
            return
        self._named.add((name, place))
        if place is not None and self._policy.approves(self.name, place):
            self._explained.add(f"{place} reads pickles that name {name}")
            return
        self._broken += 1
        refused = "; it was refused" if body.get("refused") is True else ""
        yield finding_from(
            self.name,
            "suspicious",
            f"a pickle read at {place or 'an unknown line'} names {name}, which runs code{refused}",
            evidence,
            run=self._run,
            techniques=("E1",),
            path=place,
            expected="names of data and of classes that hold it",
            found=name,
        )
