"""Rules of the inputs check that need no process: caches, addresses, malformed frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.appraise.inputs import Inputs
from trainguard.appraise.interface import Context
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.lockfile import Code, Distribution, Launch, Measurement, Tree, make_lock
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


SITE = "/env/lib/python3.11/site-packages"
FONTS = "/home/victim-a/.cache/matplotlib/fontlist.json"


def locked() -> tuple[dict[str, Any], dict[str, bytes]]:
    """A measurement record of a run under its lock, and the blobs it names."""
    package = Distribution(name="m", version="1", tree="site-packages", files={"matplotlib/fonts.py": "a" * 64 + " 1"})
    made = Measurement(
        cwd="/job",
        launch=Launch(argv=(), kind="script"),
        interpreter=None,
        code=Code(root="/job"),
        trees={
            "code": Tree(name="code", root="/job", files={"train.py": "a" * 64 + " 1"}),
            "site-packages": Tree(name="site-packages", root=SITE),
        },
        distributions={"m": package},
    )
    lock = make_lock(made, ec.generate_private_key(ec.SECP256R1()), made="", approvals=()).data
    return {"blob": made.digest, "lock": "lock", "attempt": 0}, {made.digest: made.encode(), "lock": lock}


def of_the_locked_run(*lines: dict[str, Any], first: Sequence[dict[str, Any]] = ()) -> list[Finding]:
    body, blobs = locked()
    check = Inputs(Context(run="r", policy=Policy(), blob=blobs.__getitem__))
    found = list(check.see(Evidence(n=0, at=0, source="supervisor", kind="start", body={"cwd": "/job", "command": []})))
    found += check.see(Evidence(n=0, at=0, source="supervisor", kind="measurement", body=body))
    for each in first:
        found += check.see(Evidence(n=0, at=0, source="process", kind="open", body=each, process=0, uid=1000))
    for n, line in enumerate(lines, 1):
        given = {"sha256": "b" * 64, "size": 9, "place": "/job/train.py:3", "step": None, "uid": 1000} | line
        record = Evidence(n=n, at=n, source="process", kind="open", body={"files": [given]}, process=0, uid=1000)
        found += list(check.see(record))
    return found


def test_a_cache_built_in_a_folder_that_was_renamed_since_is_the_jobs_own() -> None:
    """Data sets are prepared in a folder of another name; a file that was put into the folder afterwards is named."""
    made = (
        {"path": "/c/a.incomplete/x/t.arrow", "mode": "w"},
        {"path": "/c/a", "mode": "moved", "of": "/c/a.incomplete"},
    )
    read = {"path": "/c/a/x/t.arrow", "mode": "r"}
    assert of_the_locked_run(*made, read) == []
    (found,) = of_the_locked_run(*made, read | {"path": "/c/a/x/planted.arrow"})
    assert (found.outcome, found.techniques) == ("suspicious", ("B2",))
    assert [each.outcome for each in of_the_locked_run(made[0], read)] == ["suspicious"]


@pytest.mark.parametrize(
    ("made", "other", "outcomes"),
    [
        ("/job/tok", {}, []),
        ("/job", {}, []),
        (None, {}, ["suspicious"]),
        ("/job/to", {}, ["suspicious"]),
        ("/job/tok", {"uid": 1001}, ["suspicious"]),
        ("/job/tok", {"mtime_ns": -1}, ["suspicious"]),
    ],
)
def test_what_native_code_wrote_into_a_folder_that_the_job_made_is_its_own(
    made: str | None, other: dict[str, Any], outcomes: list[str]
) -> None:
    """Nobody sees such a file being written. One of another account, or from before the run, is no output."""
    folders = [{"made": made}] if made is not None else []
    read = {"path": "/job/tok/words.json", "mode": "r", "mtime_ns": 5, "uid": 1000} | other
    assert [each.outcome for each in of_the_locked_run(read, first=folders)] == outcomes


@pytest.mark.parametrize(
    ("path", "by", "outcomes"),
    [
        (FONTS, f"{SITE}/matplotlib/fonts.py", []),
        (FONTS, f"{SITE}/matplotlib/other.py", ["suspicious"]),
        (FONTS, "/job/train.py", ["suspicious"]),
        (FONTS, None, ["suspicious"]),
        ("/home/victim-a/.cache/other/x.json", f"{SITE}/matplotlib/fonts.py", ["suspicious"]),
        ("/home/victim-a/.cache/matplotlib/start.pt", f"{SITE}/matplotlib/fonts.py", ["suspicious"]),
        ("/home/victim-a/.cache/matplotlib/rows.csv", f"{SITE}/matplotlib/fonts.py", ["suspicious"]),
    ],
)
def test_what_a_locked_package_keeps_for_itself_is_no_input(path: str, by: str | None, outcomes: list[str]) -> None:
    """Read by its own code, from its own folder of the cache, and neither weights nor data."""
    body, blobs = locked()
    check = Inputs(Context(run="r", policy=Policy(), blob=blobs.__getitem__))
    line = {"path": path, "mode": "r", "sha256": "b" * 64, "size": 1, "place": "/job/train.py:3", "by": by, "uid": 1000}
    records = [
        Evidence(n=0, at=0, source="supervisor", kind="measurement", body=body),
        Evidence(n=1, at=0, source="process", kind="open", body={"files": [line]}, process=0, uid=1000),
    ]
    found = [finding for record in records for finding in check.see(record)]
    found += [outcome for outcome in check.end() if isinstance(outcome, Finding)]
    assert [finding.outcome for finding in found] == outcomes


@pytest.mark.parametrize(
    ("sealed", "late", "outcomes"),
    [
        ({"run": "before", "step": 5, "lock": "a" * 64}, False, []),
        ({"run": "before", "step": 5, "lock": "a" * 64}, True, []),
        ({"run": "before", "step": 5, "lock": "c" * 64}, False, ["suspicious"]),
        ({"run": "before", "step": 5, "lock": None}, False, ["suspicious"]),
        (None, False, ["suspicious"]),
        ("yes", False, ["suspicious"]),
    ],
)
def test_a_checkpoint_that_the_lock_does_not_list_is_held_where_its_own_runs_sealed_it(
    sealed: object, late: bool, outcomes: list[str]
) -> None:
    """Whether the supervisor looked at the file before the job told of it or after; another lock's says nothing."""
    body, blobs = locked()
    check = Inputs(Context(run="r", policy=Policy(), blob=blobs.__getitem__))
    line = {"path": "/job/last.pt", "mode": "r", "sha256": "b" * 64, "size": 1, "place": "/job/train.py:3", "uid": 1000}
    opened = Evidence(
        n=2, at=1, source="supervisor", kind="opened", body={"path": "/job/last.pt", "sealed": sealed, "findings": []}
    )
    told = Evidence(n=3, at=2, source="process", kind="open", body={"files": [line]}, process=0, uid=1000)
    records = [
        Evidence(n=0, at=0, source="supervisor", kind="start", body={"lock": "a" * 64}),
        Evidence(n=1, at=0, source="supervisor", kind="measurement", body=body),
        *((told, opened) if late else (opened, told)),
        Evidence(n=4, at=3 * 10**9, source="supervisor", kind="heartbeat", body={}),
    ]
    found = [finding for record in records for finding in check.see(record)]
    assert [finding.outcome for finding in found] == outcomes


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
