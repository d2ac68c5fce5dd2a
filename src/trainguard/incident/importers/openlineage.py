"""OpenLineage events, one JSON object a line (spec 2-0-2).

A job's inputs are what its outputs were made from, through the run. Our own exports come back to the same nodes: a data
set `trainguard / checkpoint:<root>` is that checkpoint, a run with our facet is that run. They are claims all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainguard.errors import MalformedEvidence
from trainguard.home import RUN_NAME
from trainguard.incident.claims import Claims
from trainguard.incident.importers.gather import Gathered, parse_json, read_bounded

LINES_LIMIT = 1_000_000
LINE_BYTES = 16 << 20
SETS_LIMIT = 100_000
OWN = "trainguard"
ROOT = re.compile(r"checkpoint:[0-9a-f]{64}")


def read(path: Path) -> Claims:
    """The claims of the events in `path`. Raises Unavailable or MalformedEvidence, naming the line."""
    made = Gathered(f"OpenLineage events in {path.name}", str(path))
    seen = 0
    for number, line in enumerate(read_bounded(path, 256 << 20).splitlines(), 1):
        where = f"{path}: line {number}"
        if number > LINES_LIMIT or len(line) > LINE_BYTES:
            raise MalformedEvidence(f"{where}: expected at most {LINES_LIMIT} lines of {LINE_BYTES} bytes, found more")
        if line.strip():
            seen += 1
            _take(made, parse_json(line, where), where)
    if not seen:
        raise MalformedEvidence(f"{path}: expected events, found an empty file")
    return made.claims


def _take(made: Gathered, event: Any, where: str) -> None:
    if not isinstance(event, dict) or "producer" not in event:
        raise MalformedEvidence(f"{where}: expected an OpenLineage event with a producer, found none")
    run, job = event.get("run"), event.get("job")
    if run is None:
        return  # about a job or a data set alone
    if not isinstance(run, dict) or not isinstance(run.get("runId"), str) or not isinstance(job, dict):
        raise MalformedEvidence(f"{where}: expected a run with runId and a job")
    key = _run(made, run, str(job.get("name"))[:150])
    inputs = [_set(made, one, where) for one in _sets(event.get("inputs"), where)]
    outputs = [_set(made, one, where) for one in _sets(event.get("outputs"), where)]
    for source in inputs:
        made.edge(source, key)
    for target in outputs:
        if target not in inputs:  # a table that is read and written is not made from itself
            made.edge(key, target)


def _run(made: Gathered, run: dict[str, Any], job: str) -> str:
    facets = run.get("facets")
    own = facets.get("trainguard_run") if isinstance(facets, dict) else None
    name = own.get("run") if isinstance(own, dict) else None
    if isinstance(name, str) and RUN_NAME.fullmatch(name):
        return made.node("run", name, f"run {name}")
    return made.node("artifact", f"openlineage/run/{run['runId']}", f"OpenLineage run of {job}")


def _sets(value: Any, where: str) -> Iterator[dict[str, Any]]:
    if value is None:
        return
    if not isinstance(value, list) or len(value) > SETS_LIMIT:
        raise MalformedEvidence(f"{where}: expected a list of at most {SETS_LIMIT} data sets")
    for one in value:
        if not isinstance(one, dict) or not all(isinstance(one.get(name), str) for name in ("namespace", "name")):
            raise MalformedEvidence(f"{where}: expected data sets with namespace and name")
        yield one


def _set(made: Gathered, one: dict[str, Any], where: str) -> str:
    name, namespace = str(one["name"]), str(one["namespace"])
    if namespace == OWN and ROOT.fullmatch(name):
        return made.node("checkpoint", name.partition(":")[2], f"checkpoint {name[11:27]}…")
    return made.node("data", f"openlineage/{namespace}/{name}", f"{namespace}: {name}")
