"""Rules of the inputs check that need no process: caches, addresses, malformed frames."""

from __future__ import annotations

from typing import Any

import pytest

from trainguard.appraise.inputs import Inputs
from trainguard.appraise.interface import Context
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.policy import Policy

CACHED = "/tmp/torchinductor_victim-a/fxgraph/x"


def judged(*bodies: dict[str, Any], uid: int = 1000, step: int | None = None) -> list[Finding]:
    check = Inputs(Context(run="r", policy=Policy(), blob=lambda digest: b""))
    found: list[Finding] = []
    for n, body in enumerate(bodies):
        record = Evidence(n=n, at=0, source="process", kind="open", body=body, process=0, uid=uid, step=step)
        found += list(check.see(record))
    return found + [end for end in check.end() if isinstance(end, Finding)]


def test_a_compilers_cache_of_another_account_is_named_and_our_own_is_not() -> None:
    """Whoever owns the file can put code into the job."""
    line = {"path": CACHED, "mode": "r", "sha256": "a" * 64, "size": 1, "place": "/job/train.py:3", "step": None}
    assert judged({"files": [line | {"uid": 1000}]}) == []
    (found,) = judged({"files": [line | {"uid": 1001}]})
    assert (found.outcome, found.techniques) == ("suspicious", ("A8",))


@pytest.mark.parametrize("address", ["127.0.0.1:29500", "localhost:80", "::1:80"])
def test_addresses_of_this_machine_are_the_jobs_own(address: str) -> None:
    """Rendezvous and local services."""
    body = {"outside": {"way": "connect", "what": address, "place": "/job/train.py:3", "times": 1}}
    assert judged(body, step=3) == []


@pytest.mark.parametrize(
    "body",
    [
        {"files": 5},
        {"files": [5, {"path": 7}, {"path": "/x", "mode": None, "polled": 3, "size": "big"}]},
        {"outside": {"way": 1, "what": None}},
        {"files": [{"path": "/x", "changed": True}]},
        {"skipped": "many"},
    ],
)
def test_malformed_frames_never_raise(body: dict[str, Any]) -> None:
    """A judge reads what an attacker may have sent."""
    assert all(isinstance(finding, Finding) for finding in judged(body, step=2))
