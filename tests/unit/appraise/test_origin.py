"""Whose file a path is, with a lock, with a measurement alone, and with neither."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard import __version__
from trainguard.appraise.interface import Context
from trainguard.appraise.origin import Origins
from trainguard.errors import Unavailable
from trainguard.evidence import Evidence
from trainguard.lockfile import Code, Declared, Distribution, Interpreter, Launch, Measurement, Tree, make_lock
from trainguard.policy import Approval, Policy

A, B = "a" * 64, "b" * 64


def measurement(**files: dict[str, str]) -> Measurement:
    trees = {
        "code": Tree(name="code", root="/job", files=files.get("code", {"train.py": f"{A} 1"})),
        "site-packages": Tree(name="site-packages", root="/env/lib/site-packages"),
    }
    torch = Distribution(name="torch", version="1", tree="site-packages", files={"torch/__init__.py": f"{A} 1"})
    return Measurement(
        cwd="/job",
        launch=Launch(argv=(), kind="script"),
        interpreter=Interpreter(
            executable="/env/bin/python",
            version="",
            implementation="",
            cache_tag="",
            prefix="/env",
            base_prefix="/usr",
            path=(),
            user_site=False,
        ),
        code=Code(root="/job"),
        trees=trees,
        distributions={"torch": torch},
        declared=Declared(outputs=("out",)),
    )


def origins(*records: tuple[str, dict[str, Any]], approve: tuple[Approval, ...] = (), **blobs: bytes) -> Origins:
    def blob(digest: str) -> bytes:
        if digest not in blobs:
            raise Unavailable(f"{digest}: not there")
        return blobs[digest]

    made = Origins(Context(run="r", policy=Policy(approve=approve), blob=blob))
    for n, (kind, body) in enumerate(records):
        made.see(Evidence(n=n, at=0, source="process", kind=kind, body=body, process=0))
    return made


START = ("start", {"command": ["python", "train.py"], "cwd": "/job"})


def with_lock(measured: Measurement, locked: Measurement, *records: tuple[str, dict[str, Any]]) -> Origins:
    lock = make_lock(
        locked,
        ec.generate_private_key(ec.SECP256R1()),
        made="",
        approvals=(Approval(check="hooks", place="train.py:3"),),
    )
    name = "l" + hashlib.sha256(lock.data).hexdigest()
    taken = "m" + measured.digest
    body = {"blob": taken, "lock": name, "attempt": 0}
    return origins(START, ("measurement", body), *records, **{taken: measured.encode(), name: lock.data})


def test_files_named_one_by_one_are_found_wherever_they_lie() -> None:
    """Alone or together in one folder, beside the script or not: their folder is the code's, or each other's."""
    named = {
        f"data:{path}": Tree(name=f"data:{path}", root=root, files={path.rsplit("/", 1)[-1]: f"{digest} 1"})
        for path, root, digest in (("names.txt", "/job", A), ("d/a.bin", "/job/d", A), ("d/b.bin", "/job/d", B))
    }
    beside = {"rows.csv": f"{A} 1", "words.txt": f"{B} 1"}
    named["data:beside the code"] = Tree(name="data:beside the code", root="/job", files=beside)
    measured = measurement()
    whole = msgspec.structs.replace(measured, trees=measured.trees | named)
    found = with_lock(whole, whole)
    alone = (("/job/names.txt", A), ("/job/d/a.bin", A), ("/job/d/b.bin", B), ("/job/train.py", A))
    for path, digest in (*alone, ("/job/rows.csv", A), ("/job/words.txt", B)):
        assert (found.locked(path), found.taken(path)) == (digest, digest), path
    assert found.locked("/job/d/c.bin") is None


@pytest.mark.parametrize(
    ("place", "standing"),
    [
        ("/job/train.py:7", "approved"),
        ("/job/new.py:1", "planted"),
        ("/env/lib/site-packages/torch/__init__.py:3", "library"),
        ("/env/lib/site-packages/planted.py:3", "planted"),
        ("/env/bin/torchrun:5", "library"),
        ("/tmp/x.py:1", "planted"),
        ("/tmp/torchinductor_a/x.py:1", "cache"),
        ("<string>:1", "generated"),
        ("<frozen runpy>:88", "library"),
    ],
)
def test_with_a_lock_what_it_does_not_hold_is_planted(place: str, standing: str) -> None:
    """Wherever it lies."""
    assert with_lock(measurement(), measurement()).standing(place) == standing


@pytest.mark.parametrize(
    ("by", "standing"),
    [
        ("/env/lib/site-packages/torch/__init__.py", "library"),
        ("/env/lib/site-packages/planted.py", "planted"),
        ("/job/train.py", "planted"),
        (None, "planted"),
    ],
)
def test_source_that_a_locked_package_wrote_in_this_run_is_its_own_business(by: str | None, standing: str) -> None:
    """Templates that a library fills in and imports. Written by anything else it is not."""
    line = {"path": "/tmp/propagate_x1.py", "mode": "w", "by": by}
    found = with_lock(measurement(), measurement(), ("open", {"files": [line]}))
    assert found.standing("/tmp/propagate_x1.py:3") == standing
    assert found.standing("/tmp/propagate_x2.py:3") == "planted"


def test_a_file_that_was_compiled_from_other_bytes_is_planted() -> None:
    """The hash of what ran outweighs the name."""
    files = ("code", {"files": [["/job/train.py", B, "__main__", "main"]]})
    assert with_lock(measurement(), measurement(), files).standing("/job/train.py:1") == "planted"


def test_a_measurement_alone_makes_own_code_own_and_unmeasured_files_foreign() -> None:
    """Without a lock nothing is approved."""
    taken = measurement()
    known = origins(START, ("measurement", {"blob": "m", "lock": None}), m=taken.encode())
    assert known.standing("/job/train.py:1") == "own"
    assert known.standing("/job/new.py:1") == "foreign"
    assert known.standing("/elsewhere/x.py:1") == "foreign"
    assert known.standing("/env/lib/site-packages/planted.py:1") == "planted"


def test_with_neither_the_process_is_taken_at_its_word() -> None:
    """Folders are its claims; the judge says elsewhere that the link is blind."""
    where = {"roots": {"stdlib": "/py/lib", "prefix": "/env", "guard": "/g"}, "site": ["/env/site"], "real": {}}
    known = origins(START, ("code", {"where": where}))
    found = [known.standing(p) for p in ("/py/lib/os.py:1", "/env/site/x.py:1", "/job/a.py:1", "/tmp/a.py:1")]
    assert found == ["library", "library", "own", "foreign"]


def test_aliases_of_an_environment_lead_to_one_place() -> None:
    """A symbolic link to the environment, as the process resolved it."""
    where = ("code", {"where": {"roots": {}, "site": [], "real": {"/alias": "/env"}}})
    known = with_lock(measurement(), measurement(), where)
    assert known.standing("/alias/lib/site-packages/torch/__init__.py:1") == "library"


def test_approvals_of_the_lock_and_of_the_policy_both_count() -> None:
    """By a path below the code root or by the absolute one."""
    known = with_lock(measurement(), measurement())
    assert known.approves("hooks", "/job/train.py:3")
    assert not known.approves("hooks", "/job/train.py:4")
    assert not known.approves("surface", "/job/train.py:3")


def test_declared_outputs_are_known_below_the_working_folder() -> None:
    """Folders and files the lock says the job writes."""
    known = with_lock(measurement(), measurement())
    assert known.declared_output("/job/out/ck.pt")
    assert not known.declared_output("/job/output")


@pytest.mark.parametrize(
    "record",
    [
        ("measurement", {"blob": "missing", "lock": None}),
        ("measurement", {"blob": 5, "lock": ["x"]}),
        ("code", {"where": {"roots": [1], "site": "x", "real": {"a": 1}}}),
        ("code", {"files": [["a"], 1, [None, None, None, None]]}),
        ("start", {"command": "x", "cwd": 7}),
    ],
)
def test_malformed_records_are_passed_over(record: tuple[str, dict[str, Any]]) -> None:
    """A judge never raises for bad evidence."""
    known = origins(record)
    assert known.standing("/x.py:1") == "foreign"


def guard_records(version: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """A run of trainguard `version` whose supervisor had client.py with hash A, as had the process."""
    start = ("start", {"command": [], "cwd": "/job", "trainguard": version, "guard": "then"})
    where = ("code", {"where": {"roots": {"guard": "/guard/watch"}}})
    return start, where, ("code", {"files": [["/guard/watch/client.py", A, "_trainguard.client", "source"]]})


def test_a_run_of_another_version_is_held_to_the_guard_its_supervisor_had() -> None:
    """A judge that was updated since must not call every earlier run suspicious."""
    made = origins(*guard_records("0.0.1"), then=b'{"client.py": "' + A.encode() + b'"}')
    assert made.standing("/guard/watch/client.py") == "guard"
    altered = origins(*guard_records("0.0.1"), then=b'{"client.py": "' + B.encode() + b'"}')
    assert altered.standing("/guard/watch/client.py") == "planted"


def test_a_run_of_our_own_version_is_held_to_our_own_guard() -> None:
    made = origins(*guard_records(__version__), then=b'{"client.py": "' + A.encode() + b'"}')
    assert made.standing("/guard/watch/client.py") == "planted"


def test_a_guard_that_was_not_recorded_readably_is_held_to_our_own() -> None:
    made = origins(*guard_records("0.0.1"), then=b"[]")
    assert made.standing("/guard/watch/client.py") == "planted"
    assert "cannot be read" in made.problems[0]
