"""Findings and incidents as OCSF 1.7.0 events: Detection Finding (2004) and Incident Finding (2005).

Times are milliseconds since the epoch, as OCSF has them. What OCSF has no place for goes into `unmapped` under our own
names. A finding's `uid` is a digest of what it says, so sending it again is the same finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from trainguard import __version__
from trainguard.appraise.verdict import Verdict
from trainguard.digest import canonical_json, sha256_hex
from trainguard.finding import Finding
from trainguard.incident.correlate import Incident
from trainguard.incident.facts import RunFacts
from trainguard.render.attacks import outside
from trainguard.render.techniques import labelled

VERSION = "1.7.0"
FINDINGS = 2
DETECTION, INCIDENT = 2004, 2005
CREATE = 1
INFORMATIONAL, LOW, MEDIUM, HIGH, CRITICAL = 1, 2, 3, 4, 5
SEVERITIES = {
    "violated": (HIGH, "High"),
    "suspicious": (MEDIUM, "Medium"),
    "not_checked": (INFORMATIONAL, "Informational"),
}
INCIDENT_SEVERITIES = {
    "critical": (CRITICAL, "Critical"),
    "high": (HIGH, "High"),
    "medium": (MEDIUM, "Medium"),
    "low": (LOW, "Low"),
}
CONFIDENCES = {"violated": (3, "High"), "suspicious": (2, "Medium"), "not_checked": (1, "Low")}
REGULAR_FILE, RULE, UNKNOWN_DEVICE = 1, 1, 0
EVIDENCE_LIMIT = 64


def detection_events(verdict: Verdict, facts: RunFacts) -> Iterator[dict[str, Any]]:
    """One Detection Finding for each finding of a run's verdict."""
    for finding in verdict.findings:
        severity, word = SEVERITIES[finding.outcome]
        confidence, sure = CONFIDENCES[finding.outcome]
        yield {
            "activity_id": CREATE,
            "activity_name": "Create",
            "category_uid": FINDINGS,
            "category_name": "Findings",
            "class_uid": DETECTION,
            "class_name": "Detection Finding",
            "type_uid": DETECTION * 100 + CREATE,
            "type_name": "Detection Finding: Create",
            "time": milliseconds(seen_at(finding, facts)),
            "severity_id": severity,
            "severity": word,
            "confidence_id": confidence,
            "confidence": sure,
            "status_id": 1,
            "status": "New",
            "message": finding.message,
            "finding_info": finding_info(finding, facts),
            "evidences": list(_evidences(finding, facts)),
            "metadata": metadata(finding.check, correlation=facts.run),
            "unmapped": _unmapped(finding, verdict),
        }


def incident_event(incident: Incident, facts: RunFacts) -> dict[str, Any]:
    """An incident as Incident Finding. It is assigned to nobody: who takes it is not the log's to say."""
    severity, word = INCIDENT_SEVERITIES[incident.severity]
    times = [seen_at(finding, facts) for finding in incident.findings] or [facts.ended_ns]
    return {
        "activity_id": CREATE,
        "activity_name": "Create",
        "category_uid": FINDINGS,
        "category_name": "Findings",
        "class_uid": INCIDENT,
        "class_name": "Incident Finding",
        "type_uid": INCIDENT * 100 + CREATE,
        "type_name": "Incident Finding: Create",
        "time": milliseconds(max(times)),
        "start_time": milliseconds(min(times)),
        "end_time": milliseconds(max(times)),
        "severity_id": severity,
        "severity": word,
        "status_id": 1,
        "status": "New",
        "assignee_group": {"name": "unassigned"},
        "message": f"{incident.kind}: {len(incident.findings)} findings in run {incident.run}",
        "desc": incident.attribution.sentence,
        "attacks": attacks(incident.techniques),
        "finding_info_list": [finding_info(finding, facts) for finding in incident.findings],
        "metadata": metadata("incident", correlation=incident.run) | {"uid": incident.id},
        "unmapped": {
            "run": incident.run,
            "first_step": incident.first_step,
            "last_step": incident.last_step,
            "techniques": list(incident.techniques),
            "candidates": [msgspec.to_builtins(one) for one in incident.attribution.candidates],
            "affected": list(incident.affected),
        },
    }


def finding_info(finding: Finding, facts: RunFacts) -> dict[str, Any]:
    """What the finding is, apart from the event that tells of it."""
    first = labelled(finding.techniques[0]) if finding.techniques else finding.outcome.replace("_", " ")
    info: dict[str, Any] = {
        "uid": finding_uid(finding, facts.run),
        "title": f"{finding.check}: {first}",
        "desc": finding.message,
        "types": [finding.check],
        "created_time": milliseconds(seen_at(finding, facts)),
        "analytic": {"name": finding.check, "type_id": RULE, "type": "Rule", "version": __version__},
        "data_sources": ["trainguard transparency log"],
    }
    near = attacks(finding.techniques)
    return info | ({"attacks": near} if near else {})


def finding_uid(finding: Finding, run: str) -> str:
    """SHA-256 over what the finding says, of which run."""
    return sha256_hex(canonical_json({"run": run, "finding": msgspec.to_builtins(finding)}))


def attacks(techniques: Iterable[str]) -> list[dict[str, Any]]:
    """Near techniques of ATLAS and ATT&CK, with the releases that their ids are of."""
    found = []
    for one in outside(techniques):
        parent, _, sub = one.uid.rpartition(".")
        named = {"name": one.name} if one.name is not None else {}
        if sub.isdigit() and parent not in ("", "AML"):
            told = {"technique": {"uid": parent}, "sub_technique": {"uid": one.uid, **named}}
        else:
            told = {"technique": {"uid": one.uid, **named}}
        found.append({"version": one.framework, **told})
    return found


def metadata(code: str, *, correlation: str) -> dict[str, Any]:
    """Who made the event."""
    return {
        "version": VERSION,
        "product": {"name": "trainguard", "vendor_name": "trainguard", "version": __version__},
        "event_code": code,
        "correlation_uid": correlation,
    }


def seen_at(finding: Finding, facts: RunFacts) -> int:
    """When the last record it rests on arrived, nanoseconds; the end of the run where it cites none."""
    times = [facts.times[citation.hash] for citation in finding.evidence if citation.hash in facts.times]
    return max(times, default=facts.ended_ns or facts.began_ns)


def milliseconds(ns: int) -> int:
    """Nanoseconds since the epoch as OCSF's milliseconds."""
    return ns // 1_000_000


def _evidences(finding: Finding, facts: RunFacts) -> Iterator[dict[str, Any]]:
    if finding.subject.path is not None:
        path, _, line = finding.subject.path.rpartition(":")
        whole = path if path and line.isdigit() else finding.subject.path
        name = whole.rsplit("/", 1)[-1] or whole
        yield {"file": {"name": name, "path": whole, "type_id": REGULAR_FILE}}
    if facts.host is not None:
        yield {"device": {"hostname": facts.host, "type_id": UNKNOWN_DEVICE}}
    for citation in finding.evidence[:EVIDENCE_LIMIT]:
        yield {"data": {"leaf": citation.leaf, "sha256": citation.hash}}


def _unmapped(finding: Finding, verdict: Verdict) -> Mapping[str, Any]:
    return {
        "outcome": finding.outcome,
        "techniques": list(finding.techniques),
        "subject": msgspec.to_builtins(finding.subject),
        "expected": finding.expected,
        "found": finding.found,
        "verdict": verdict.verdict,
        "level": verdict.level,
    }


def as_lines(events: Sequence[Mapping[str, Any]]) -> bytes:
    """One event a line, canonical JSON."""
    return b"".join(canonical_json(event) + b"\n" for event in events)
