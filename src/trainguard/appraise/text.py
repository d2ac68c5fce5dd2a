"""Check *text*: machine instructions in memory are those of the files they were mapped from (docs/checks/text.md).

The supervisor compares, from outside, every page of program text that the kernel says is no longer its file's. A byte
that differs is proof that somebody wrote to it (A3, B8): loaders do not write to text, but where a file says so, and
such files are left out. Breakpoints of a debugger and of kernel probes do write there, so with either present it is a
suspicion. Pages that were written and put back are counted.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import dicts, text
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState

FINDING_LIMIT = 100


class Text:
    """See the module."""

    name = "text"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._policy = context.policy
        self._held = 0
        self._broken = 0
        self._blind: dict[str, None] = {}
        self._explained: dict[str, None] = {}
        self._told: set[tuple[int | None, str, object]] = set()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        if evidence.kind != "text" or evidence.source != "supervisor":
            return
        body = evidence.body
        if (error := text(body.get("error"))) is not None:
            self._blind[f"process {evidence.pid} could not be read from outside: {error}"] = None
            return
        unread = body.get("unread")
        if isinstance(unread, list) and unread:
            self._blind[f"changed pages of {len(unread)} files that are gone could not be compared: {unread[0]}"] = None
        lines = dicts(body.get("differ"))
        for line in lines:
            yield from self._differs(evidence, line)
        if not lines:
            self._held += 1

    def _differs(self, evidence: Evidence, line: dict[str, object]) -> Iterator[Finding]:
        path, offset = text(line.get("path"), 4096) or "?", line.get("offset")
        key = (evidence.process, path, offset)
        if key in self._told or len(self._told) >= FINDING_LIMIT:
            return
        self._told.add(key)
        if self._policy.approves(self.name, path):
            self._explained[path] = None
            return
        self._broken += 1
        tracer, probes = evidence.body.get("tracer"), evidence.body.get("probes") is True
        because = f"; process {tracer} is attached to it as a debugger" if tracer else ""
        because += "; kernel probes are set in it" if probes else ""
        yield finding_from(
            self.name,
            "suspicious" if because else "violated",
            f"program text of {path} was changed in the memory of process {evidence.pid}, at offset {offset}{because}",
            evidence,
            run=self._run,
            techniques=("B8", "A3"),
            path=path,
            expected=f"the bytes of the file: {text(line.get('expected'), 64)}",
            found=text(line.get("found"), 64),
        )

    def end(self) -> Iterator[Finding | LinkState]:
        if not self._held and not self._broken:
            self._blind.setdefault(
                "no process was looked at from outside: the run was too short, or it is switched off"
            )
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(self._blind),
            explained=tuple(self._explained),
            required=False,
        )
