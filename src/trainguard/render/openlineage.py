"""A run as OpenLineage run events (spec 2-0-2): START, and COMPLETE, FAIL or ABORT, with what it read and sealed.

A data set is named by its content: namespace `trainguard`, name `sha256:<hex>`, or `checkpoint:<root>` for a sealed
checkpoint. Paths, sources and licences are facets. Every edge is witnessed by the log, at the leaf named.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from trainguard import __version__
from trainguard.appraise.verdict import Verdict
from trainguard.incident.facts import Read, RunFacts
from trainguard.incident.outward import Terms
from trainguard.seal.ledger import SealLeaf

SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
VERSION_FACET = (
    "https://openlineage.io/spec/facets/1-0-1/DatasetVersionDatasetFacet.json#/$defs/DatasetVersionDatasetFacet"
)
JOB_TYPE_FACET = "https://openlineage.io/spec/facets/2-0-4/JobTypeJobFacet.json#/$defs/JobTypeJobFacet"
ERROR_FACET = "https://openlineage.io/spec/facets/1-0-1/ErrorMessageRunFacet.json#/$defs/ErrorMessageRunFacet"
PRODUCER = f"https://trainguard.dev/openlineage/{__version__}"
OWN_FACETS = "https://trainguard.dev/openlineage/facets/1-0-0/trainguard.json#/$defs/"
NAMESPACE = "trainguard"
RUNS = uuid.UUID("6b7a3c0e-5a0f-5d1c-9f57-0a4d8d7f2c11")
"""Namespace of run ids: the same run has the same id in every export."""


def run_events(facts: RunFacts, verdict: Verdict, *, origin: str, terms: Terms | None = None) -> list[dict[str, Any]]:
    """START and the event that ends it. origin: the log's name, which makes run ids unique between logs."""
    job = {"namespace": NAMESPACE, "name": _job(facts), "facets": {"jobType": _job_type()}}
    run = {"runId": str(uuid.uuid5(RUNS, f"{origin}/{facts.run}")), "facets": {"trainguard_run": _run(facts, verdict)}}
    inputs = [_input(read, terms or {}) for read in facts.reads]
    outputs = [_output(seal) for seal in facts.seals]
    start = _event("START", facts.began_ns, run, job, inputs, [])
    if not facts.ended:
        return [start]
    kind = "COMPLETE" if facts.status == 0 else "ABORT" if facts.status is None else "FAIL"
    ended = {**run, "facets": {**run["facets"], **_error(facts)}}  # type: ignore[dict-item]
    return [start, _event(kind, facts.ended_ns, ended, job, inputs, outputs)]


def _event(
    kind: str, at_ns: int, run: Mapping[str, Any], job: Mapping[str, Any], inputs: list[Any], outputs: list[Any]
) -> dict[str, Any]:
    return {
        "eventType": kind,
        "eventTime": time_text(at_ns),
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
        "run": dict(run),
        "job": dict(job),
        "inputs": inputs,
        "outputs": outputs,
    }


def time_text(ns: int) -> str:
    """UTC, RFC 3339, to the microsecond."""
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _job(facts: RunFacts) -> str:
    script = next((word for word in facts.command[1:] if word.endswith(".py")), None)
    return (script or (facts.command[0] if facts.command else facts.run))[:500]


def _job_type() -> dict[str, Any]:
    return _facet(JOB_TYPE_FACET) | {"processingType": "BATCH", "integration": "TRAINGUARD", "jobType": "TRAINING"}


def _run(facts: RunFacts, verdict: Verdict) -> dict[str, Any]:
    return _own("TrainguardRunFacet") | {
        "run": facts.run,
        "host": facts.host,
        "steps": facts.steps,
        "verdict": verdict.verdict,
        "level": verdict.level,
        "lock": facts.lock,
        "leaf": facts.leaf,
        "inputs_left_out": facts.reads_left_out,
    }


def _error(facts: RunFacts) -> dict[str, Any]:
    if facts.status in (0, None):
        return {}
    told = {"message": f"the command ended with status {facts.status}", "programmingLanguage": "PYTHON"}
    return {"errorMessage": _facet(ERROR_FACET) | told}


def _input(read: Read, terms: Terms) -> dict[str, Any]:
    content = _own("TrainguardContentDatasetFacet") | {
        "path": read.path,
        "sha256": read.sha256,
        "size": read.size,
        "first_step": read.step,
        "leaf": read.leaf,
        "witnessed": True,
        "sources": [dict(one) for one in terms.get(read.sha256, ())],
    }
    return {"namespace": NAMESPACE, "name": f"sha256:{read.sha256}", "facets": {"trainguard_content": content}}


def _output(seal: SealLeaf) -> dict[str, Any]:
    version = _facet(VERSION_FACET) | {"datasetVersion": seal.root}
    own = _own("TrainguardSealDatasetFacet") | {
        "name": seal.name,
        "place": seal.place,
        "step": seal.step,
        "leaf": seal.leaf,
    }
    facets = {"version": version, "trainguard_seal": own}
    return {"namespace": NAMESPACE, "name": f"checkpoint:{seal.root}", "facets": facets}


def _own(name: str) -> dict[str, Any]:
    return _facet(OWN_FACETS + name)


def _facet(schema: str) -> dict[str, Any]:
    return {"_producer": PRODUCER, "_schemaURL": schema}


def names_of(events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names of every data set in these events."""
    for event in events:
        for side in ("inputs", "outputs"):
            yield from (str(one["name"]) for one in event[side])
