"""From findings to incidents: what belongs together by run, kind of act and window of steps.

    for incident in incidents(home): …

An incident is a pure function of log and policy: its id is a digest of what it is made of, so two people with the same
log see the same incidents under the same names. What people decide about it is kept apart and never changes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from trainguard.appraise.verdict import Verdict
from trainguard.archive import LogLeaves, RunReader
from trainguard.digest import canonical_json, sha256_hex
from trainguard.errors import Misuse, VerificationError
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.incident.attribute import JOB_KINDS, Attribution, attribute, facts_of
from trainguard.incident.lineage import Lineage, read_lineage, run_key
from trainguard.incident.traces import HERE, Sources

Severity = Literal["critical", "high", "medium", "low"]
SCHEMA = "trainguard/incident/v1"
WINDOW_STEPS = 200
"""Findings of one kind in one run that lie no further apart belong together."""


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """Findings that belong together, and what follows from them."""

    schema: str = SCHEMA
    id: str
    """`inc-` and ten hex digits of a digest over run, kind and findings."""
    run: str
    kind: str
    """First letter and title of the group of techniques."""
    severity: Severity
    first_step: int | None
    last_step: int | None
    ranks: tuple[int, ...]
    findings: tuple[Finding, ...]
    techniques: tuple[str, ...]
    attribution: Attribution
    affected: tuple[str, ...] = ()
    """Labels of what was made from this run."""


def incidents(
    home: Home, *, lineage: Lineage | None = None, sources: Sources = HERE, lifted: bool = False
) -> list[Incident]:
    """Every incident of the log, worst first. Raises as `read_lineage` does.

    sources: who owns files and who committed lines. lifted: what is muted too.
    """
    lineage = lineage if lineage is not None else read_lineage(home, lifted=lifted)
    leaves = LogLeaves(home)
    found = [
        incident
        for run, verdict in lineage.verdicts.items()
        if any(finding.outcome != "not_checked" for finding in verdict.findings)
        for incident in _of_run(run, verdict, _records(home, run, leaves, verdict), lineage, sources)
    ]
    order = ("critical", "high", "medium", "low")
    return sorted(found, key=lambda one: (order.index(one.severity), one.run, one.first_step or 0, one.id))


def find(known: Sequence[Incident], name: str) -> Incident:
    """The one whose id is or begins with `name`. Raises Misuse."""
    matches = [one for one in known if one.id == name] or [one for one in known if one.id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    said = "no incident of that name" if not matches else f"{len(matches)} incidents begin with it"
    raise Misuse(f"incident {name[:60]!r}: {said}", next_step="trainguard incident list")


def _records(home: Home, run: str, leaves: LogLeaves, verdict: Verdict) -> list[Evidence]:
    """The supervisor's records, those that attribution reads, and all that are cited; up to where a record breaks."""
    cited = {citation.hash for finding in verdict.findings for citation in finding.evidence}
    kept: list[Evidence] = []
    try:
        for record in RunReader(home, run, leaves=leaves).records():
            if record.source == "supervisor" or record.kind in JOB_KINDS or record.hash in cited:
                kept.append(record)
    except VerificationError:
        pass  # the verdict has it as a finding
    return kept


def _of_run(
    run: str, verdict: Verdict, records: list[Evidence], lineage: Lineage, sources: Sources
) -> Iterator[Incident]:
    bad = [finding for finding in verdict.findings if finding.outcome != "not_checked"]
    facts = facts_of(records, bad)
    affected = [lineage.graph.nodes.get(key) for key in lineage.graph.descendants(run_key(run))]
    affected += [lineage.graph.nodes.get(key) for key in lineage.graph.descendants(f"start:{run}")]
    labels = tuple(dict.fromkeys(node.label for node in affected if node is not None and node.key != run_key(run)))
    for group in grouped(bad):
        told = group[0]
        steps = [finding.subject.step for finding in group if finding.subject.step is not None]
        yield Incident(
            id=_id(run, group),
            run=run,
            kind=told.techniques[0][:1] if told.techniques else "?",
            severity=severity(group),
            first_step=min(steps, default=None),
            last_step=max(steps, default=None),
            ranks=tuple(sorted({f.subject.rank for f in group if f.subject.rank is not None})),
            findings=tuple(group),
            techniques=tuple(dict.fromkeys(technique for finding in group for technique in finding.techniques)),
            attribution=attribute(group, facts, sources=sources),
            affected=labels,
        )


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one group of techniques whose steps lie within WINDOW_STEPS of the next; worst and earliest first."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.techniques[0][:1] if finding.techniques else "?", []).append(finding)
    groups: list[list[Finding]] = []
    for members in kinds.values():
        members.sort(key=lambda f: f.subject.step if f.subject.step is not None else -1)
        current: list[Finding] = []
        for finding in members:
            if current and _apart(current[-1], finding):
                groups.append(current)
                current = []
            current.append(finding)
        groups.append(current)
    for group in groups:
        group.sort(key=lambda f: (f.outcome != "violated", f.subject.step or 0))
    return groups


def _apart(a: Finding, b: Finding) -> bool:
    first, second = a.subject.step, b.subject.step
    return first is not None and second is not None and second - first > WINDOW_STEPS


def severity(group: Sequence[Finding]) -> Severity:
    """Proved acts on weights, code or evidence outrank proved rest; suspicion alone is at most medium."""
    if not any(finding.outcome == "violated" for finding in group):
        return "medium" if len(group) > 1 else "low"
    kinds = {finding.techniques[0][:1] for finding in group if finding.outcome == "violated" and finding.techniques}
    return "critical" if kinds & {"B", "C", "E", "G"} else "high"


def _id(run: str, group: Sequence[Finding]) -> str:
    made_of = [[f.check, f.outcome, list(f.techniques), f.subject.step, f.subject.rank, f.message] for f in group]
    return "inc-" + sha256_hex(canonical_json([run, made_of]))[:10]
