"""Record a training function in this very process, through the real engine, and judge the frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trainguard.appraise.interface import Check, Context
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Finding, LinkState
from trainguard.policy import Policy

SETTINGS: dict[str, Any] = {
    "key": "5a" * 32,
    "links": "all",
    "budget_percent": 1.0,
    "credit_seconds": 1.0,
    "always_steps": 20,
    "tensors": 4,
    "elements": 32,
    "process": 0,
    "truth_every": 0,
}


class Recorder:
    """Stands in for watch.client.Client: keeps frames as records, and raises what the guard would only count."""

    def __init__(self, **settings: Any) -> None:
        self.settings = {**SETTINGS, **settings}
        self.alive = True
        self.records: list[Evidence] = []
        """What arrived, with unchecked steps one by one, as judges take them."""
        self.frames = 0
        self.faults: dict[str, int] = {}
        self.errors: list[BaseException] = []

    def send(self, kind: str, body: Any, step: int | None = None) -> None:
        """Keep one frame, as it would arrive."""
        body = json.loads(json.dumps(body, default=str))
        n = len(self.records)
        record = Evidence(n=n, at=n, source="process", kind=kind, body=body, process=0, rank=0, seq=n, step=step)
        self.frames += 1
        self.records.extend(unfold(record))

    def fault(self, place: str, error: BaseException) -> None:
        """An exception inside the guard."""
        self.faults[place] = self.faults.get(place, 0) + 1
        self.errors.append(error)


@contextmanager
def recording(**settings: Any) -> Iterator[Recorder]:
    """Every optimizer step inside the block is recorded by an engine of its own."""
    from trainguard.watch import engine

    recorder = Recorder(**settings)
    engine._engine = None
    engine.attach(recorder)  # type: ignore[arg-type]  # the stand-in has what the engine uses
    try:
        yield recorder
    finally:
        ours, engine._engine = engine._engine, None
        if ours is not None:
            ours.flush()
        for link in ours.links if ours is not None else ():
            if hasattr(link, "forked"):
                link.forked()
    if recorder.errors:
        raise AssertionError(f"the guard failed inside: {recorder.faults}") from recorder.errors[0]


def context(policy: Policy | None = None) -> Context:
    """What a check is given, without blobs."""

    def blob(digest: str) -> bytes:
        raise KeyError(digest)

    return Context(run="test", policy=policy or Policy(), blob=blob)


def judge(
    check: Callable[[Context], Check], records: list[Evidence], policy: Policy | None = None
) -> tuple[list[Finding], dict[str, LinkState]]:
    """Findings, and the state of each link, of one check over all records."""
    made = check(context(policy))
    findings: list[Finding] = []
    states: dict[str, LinkState] = {}
    for record in records:
        for each in unfold(record):
            findings.extend(made.see(each))
    for outcome in made.end():
        if isinstance(outcome, LinkState):
            states[outcome.link] = outcome
        else:
            findings.append(outcome)
    return findings, states
