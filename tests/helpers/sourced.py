"""Questions about data sources put to made-up runs: real log, register and records; the verdict is given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tests.helpers import told

from trainguard.appraise.order import chained
from trainguard.appraise.verdict import Verdict, decide
from trainguard.finding import Finding, LinkState
from trainguard.home import Home
from trainguard.incident.graph import Graph, Node
from trainguard.incident.lineage import Lineage, run_key
from trainguard.sources.answer import Answer, ask
from trainguard.sources.register import add

LOCK = "ab" * 32
CLEAN = tuple(LinkState(link=name, held=1) for name in ("code", "inputs", "environment", "processes"))


def digest(data: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


def shard(home: Home, folder: Path, source: str, name: str, data: bytes, **more: Any) -> Path:
    """Write a file and register it as of `source`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    add(home, source=source, path=path, licence="CC-BY-4.0", use="training", name=name, **more)
    return path


def opened(path: str, data: bytes | None, /, *, step: int | None = None, process: int = 0, **line: Any) -> told.Told:
    """A process read a file."""
    known = {"path": path, "mode": "r", "sha256": digest(data) if data is not None else None, "step": step}
    body = {"files": [known | {"size": len(data or b""), "uid": 1000, "place": "train.py:3"} | line]}
    return ("open", body, {"process": process, "pid": 800 + process, "source": "process", "step": step})


def loader(layout: dict[str, Any], length: int, batch: int = 4, **body: Any) -> told.Told:
    """A pass over `length` samples in their order begins."""
    inner = {"class": "torch.utils.data.sampler.SequentialSampler", "length": length}
    samplers = {"class": "torch.utils.data.sampler.BatchSampler", "batch": batch, "drop_last": False, "of": inner}
    whole = {"loader": 0, "epoch": 0, "samplers": samplers, "kind": "map", "data": layout} | body
    return ("loader", whole, {"process": 0, "pid": 800, "source": "process"})


def delivered(count: int, batch: int = 4) -> told.Told:
    """Step `count`: so many batches of the pass above were handed over."""
    chain = b"\0" * 8
    for number in range(count):
        chain = chained(chain, tuple(range(number * batch, (number + 1) * batch)))
    return told.step(count, order=[[0, 0, count, chain.hex(), ""]])


def leaf(number: int) -> dict[str, Any]:
    """A data set that hands over rows itself."""
    return {"class": "job.Rows", "number": number}


def both(first: int, second: int) -> dict[str, Any]:
    """Data set 0 with `first` rows and data set 1 with `second`, one after the other."""
    return {"class": "ConcatDataset", "ends": [first, first + second], "of": [leaf(0), leaf(1)]}


def record(home: Home, run: str, *middle: told.Told, **start: Any) -> None:
    """A run of one process, under a lock, with no standard input."""
    begin = told.start(**({"lock": LOCK, "stdin": "/dev/null"} | start))
    told.record(home, run, [begin, told.at_work(), told.process(), *middle, *told.leave(), told.end()])


def lineage(*runs: str, findings: Sequence[Finding] = (), links: Sequence[LinkState] = CLEAN) -> Lineage:
    """A lineage in which these runs stand alone."""
    graph = Graph()
    verdicts: dict[str, Verdict] = {}
    for run in runs:
        verdicts[run] = decide(findings, links, run=run, steps=4, watched_steps=4, lock=LOCK)
        graph.add(Node(key=f"start:{run}", kind="start", label=f"start of run {run}", run=run))
        graph.add(Node(key=run_key(run), kind="run", label=f"run {run}", run=run))
        graph.join(f"start:{run}", run_key(run), witnessed=True)
    return Lineage(graph=graph, verdicts=verdicts, seals=())


def asked(home: Home, source: str, run: str, known: Lineage | None = None, **more: Any) -> Answer:
    """The answer, which must survive its own encoding."""
    answer = ask(home, source=source, run=run, lineage=known if known is not None else lineage(run), **more)
    if msgspec.json.decode(answer.encode(), type=Answer) != answer:
        raise AssertionError("an answer does not decode to itself")
    return answer
