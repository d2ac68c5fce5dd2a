"""Not used, used, cannot tell: each from the records that make it so, and never beside a reason against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers import told
from tests.helpers.sourced import (
    CLEAN,
    asked,
    both,
    delivered,
    digest,
    leaf,
    lineage,
    loader,
    opened,
    record,
    shard,
)

from trainguard.envelope import load_public_key
from trainguard.errors import Misuse, VerificationError
from trainguard.finding import Finding, LinkState
from trainguard.home import Home
from trainguard.lockfile import Code, Distribution, Launch, Measurement, Tree, make_lock
from trainguard.sources.answer import recheck, sign_answer, verify_answer
from trainguard.sources.register import withdraw

A, B = b"rows of alice", b"rows of bob"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Two sources, one file each."""
    made = Home(tmp_path / "state")
    shard(made, tmp_path, "alice", "a.bin", A)
    shard(made, tmp_path, "bob", "b.bin", B)
    return made


def honest() -> list[told.Told]:
    """Four steps over alice's file only."""
    return [opened("/d/a.bin", A, data=0), loader(leaf(0), 16), *(delivered(n) for n in range(1, 5))]


def two() -> list[told.Told]:
    """Four steps over both files, bob's from sample 8 on."""
    files = [opened("/d/a.bin", A, data=0), opened("/d/b.bin", B, data=1)]
    return [*files, loader(both(8, 8), 16), *(delivered(n) for n in range(1, 5))]


def test_a_run_that_read_only_registered_data_of_others_is_proved_not_to_have_used_it(home: Home) -> None:
    """The plain case, with the rows it rests on."""
    record(home, "r", *honest())
    answer = asked(home, "bob", "r")
    assert (answer.answer, answer.exit_status, answer.reasons) == ("not_used", 0, ())
    assert any("read /d/a.bin" in row.what for row in answer.evidence)


def test_a_run_that_read_it_is_told_with_steps_and_rows(home: Home) -> None:
    """Bob's rows are samples 8 to 15: steps 3 and 4."""
    record(home, "r", *two())
    answer = asked(home, "bob", "r")
    [used] = answer.used
    assert (answer.answer, answer.exit_status) == ("used", 1)
    assert (used.basis, used.steps, used.batches, used.samples) == ("rows", (3, 4), 2, 8)
    assert (used.rows, used.rows_total) == (((0, 8),), 8)


@pytest.mark.parametrize(
    "line",
    [{"path": "/tmp/innocent.txt"}, {"path": "/d/a.bin"}, {"mode": "alias", "of": "/d/b.bin"}, {"mode": "mapped"}],
)
def test_the_same_content_under_any_other_name_is_found(home: Home, line: dict[str, Any]) -> None:
    """A copy, another file's name, a link that the job made, a mapped file: content decides."""
    record(home, "r", *honest(), opened("/tmp/x", B, **line))
    answer = asked(home, "bob", "r")
    assert (answer.answer, answer.used[0].basis, answer.used[0].sha256) == ("used", "opened", digest(B))


def test_content_of_no_source_cannot_be_told(home: Home) -> None:
    """A copy with one byte changed is of no source: it could be anything, and is a reason."""
    record(home, "r", *honest(), opened("/d/b.bin", B + b" "))
    answer = asked(home, "bob", "r")
    assert (answer.answer, answer.exit_status) == ("cannot_tell", 3)
    assert "/d/b.bin, opened before the first step" in answer.reasons[0]
    assert "registered as of no source" in answer.reasons[0]


def test_content_that_was_not_hashed_cannot_be_told(home: Home) -> None:
    """A file too large to be hashed while it was read, and not measured before."""
    record(home, "r", *honest(), opened("/d/big.bin", None, size=1 << 40))
    assert "its content is not on record" in asked(home, "bob", "r").reasons[0]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("open", {"outside": {"way": "connect", "what": "10.1.2.3:443"}}, {}), "came by the network"),
        (("open", {"skipped": 3}, {}), "more files than are listed"),
        (("spawn", {"program": "/usr/bin/tar", "args": ["tar", "x"]}, {}), "started tar"),
        (("code", {"files": [["/v/pyarrow/lib.so", None, "pyarrow.lib", "extension"]]}, {}), "pyarrow was loaded"),
        (("code", {"files": [["/p/lib-dynload/_sqlite3.so", None, "_sqlite3", "extension"]]}, {}), "_sqlite3 was"),
    ],
)
def test_every_way_around_the_record_is_a_reason(home: Home, more: told.Told, why: str) -> None:
    """What could have come in unseen is named; it is never taken for nothing."""
    kind, body, _ = more
    record(home, "r", *honest(), (kind, body, {"process": 0, "pid": 800, "source": "process"}))
    answer = asked(home, "bob", "r")
    assert answer.answer == "cannot_tell"
    assert any(why in reason for reason in answer.reasons)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("open", {"outside": {"way": "connect", "what": "127.0.0.1:29500"}}),
        ("code", {"files": [["/v/numpy/_core.so", None, "numpy._core", "extension"]]}),
        ("code", {"files": [["/p/lib-dynload/_json.so", None, "_json", "extension"]]}),
        ("spawn", {"program": "/v/bin/python3.11", "args": ["python3.11", "-c", ""]}),
        ("open", {"files": [{"path": "/etc/mime.types", "mode": "r", "sha256": "00" * 32, "size": 9, "uid": 0}]}),
        ("open", {"files": [{"path": "/o/log", "mode": "w"}, {"path": "/o/log", "mode": "r", "sha256": "11" * 32}]}),
    ],
)
def test_what_every_honest_run_does_is_no_reason(home: Home, kind: str, body: dict[str, Any]) -> None:
    """Its ranks meet, torch loads numpy, it reads what it wrote and what the system has."""
    record(home, "r", *honest(), (kind, body, {"process": 0, "pid": 800, "source": "process"}))
    assert asked(home, "bob", "r").answer == "not_used"


def test_a_package_can_be_taken_for_granted_and_the_answer_says_so(home: Home) -> None:
    """An assumption is part of what is signed."""
    files = [["/v/pyarrow/lib.so", None, "pyarrow.lib", "extension"]]
    record(home, "r", *honest(), ("code", {"files": files}, {"process": 0, "pid": 800, "source": "process"}))
    answer = asked(home, "bob", "r", assume_native=["pyarrow"])
    assert answer.answer == "not_used"
    assert answer.assumes == ("the native code of pyarrow read no training data by itself",)


@pytest.mark.parametrize(
    ("stdin", "answer", "assumes"),
    [("/dev/null", "not_used", 0), ("pipe:[7]", "not_used", 1), (None, "not_used", 1), ("/d/b.bin", "cannot_tell", 0)],
)
def test_standard_input_counts(home: Home, stdin: str | None, answer: str, assumes: int) -> None:
    """A file there is a reason, a pipe is an assumption."""
    record(home, "r", *honest(), stdin=stdin)
    found = asked(home, "bob", "r")
    assert (found.answer, len(found.assumes)) == (answer, assumes)


def test_without_a_lock_nothing_is_proved(home: Home) -> None:
    """What code would read the data was not approved."""
    record(home, "r", *honest(), lock=None)
    assert any("no lock" in reason for reason in asked(home, "bob", "r").reasons)


@pytest.mark.parametrize(
    ("check", "answer"), [("inputs", "cannot_tell"), ("weights", "cannot_tell"), ("kills", "not_used")]
)
def test_a_run_that_something_speaks_against_proves_nothing(home: Home, check: str, answer: str) -> None:
    """Unless what was found says nothing about data."""
    record(home, "r", *honest())
    found = Finding(check=check, outcome="suspicious", techniques=("B2",), message="odd")
    assert asked(home, "bob", "r", lineage("r", findings=[found])).answer == answer


def test_a_blind_link_is_a_reason(home: Home) -> None:
    """Blind is never green."""
    record(home, "r", *honest())
    links = [*CLEAN[:1], LinkState(link="inputs", blind=("not there",)), *CLEAN[2:]]
    assert any("link inputs is blind" in why for why in asked(home, "bob", "r", lineage("r", links=links)).reasons)


def test_a_record_without_an_end_or_cut_short_is_a_reason(home: Home) -> None:
    """What came after is not known."""
    told.record(home, "r", [told.start(lock="ab" * 32), told.at_work(), told.process(), *honest()], final=False)
    assert any("has no end" in reason for reason in asked(home, "bob", "r").reasons)
    record(home, "s", *honest())
    spool = told.spool(home, "s")
    spool.write_bytes(spool.read_bytes()[:-40])
    assert any("does not verify" in reason for reason in asked(home, "bob", "s").reasons)


# -- the order of batches ---------------------------------------------------------------------------------------------


def test_a_file_that_was_opened_and_of_which_the_order_drew_nothing_is_not_used(home: Home) -> None:
    """A subset takes alice's samples only; bob's file lies behind the same loader."""
    subset = {"class": "Subset", "runs": [[0, 8]], "of": [both(8, 8)]}
    files = [opened("/d/a.bin", A, data=0), opened("/d/b.bin", B, data=1)]
    record(home, "r", *files, loader(subset, 8), delivered(1), delivered(2))
    answer = asked(home, "bob", "r")
    assert (answer.answer, answer.reasons) == ("not_used", ())
    assert "drew none of its rows" in answer.excluded[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kind": "iterable"}, "chooses its samples itself"),
        ({"data": None}, "did not say how"),
        ({"samplers": {"class": "job.OwnSampler"}}, "not committed"),
    ],
)
def test_an_order_that_is_not_committed_leaves_it_used_with_the_reason_for_missing_rows(
    home: Home, change: dict[str, Any], why: str
) -> None:
    """It was read; which batches it went into is not on record."""
    files = [opened("/d/a.bin", A, data=0), opened("/d/b.bin", B, data=1)]
    record(home, "r", *files, loader(both(8, 8), 16, **change), *(delivered(n) for n in range(1, 5)))
    [used] = asked(home, "bob", "r").used
    assert (used.basis, used.steps, used.rows_total) == ("opened", (1, 4), None)
    assert why in str(used.why)


def test_an_order_other_than_the_committed_one_proves_nothing_about_rows(home: Home) -> None:
    """The job delivered other batches than its sampler draws: the plan is void."""
    subset = {"class": "Subset", "runs": [[0, 8]], "of": [both(8, 8)]}
    files = [opened("/d/a.bin", A, data=0), opened("/d/b.bin", B, data=1)]
    record(home, "r", *files, loader(subset, 8), told.step(1, order=[[0, 0, 1, "00" * 8, ""]]))
    answer = asked(home, "bob", "r")
    assert answer.answer == "used"
    assert "are not those its sampler draws" in str(answer.used[0].why)


def test_rows_of_one_file_are_told_apart_by_the_order(tmp_path: Path) -> None:
    """Alice's are rows 0 to 7 of the file, bob's the rest; a loader over the first half uses none of bob's."""
    home = Home(tmp_path / "state")
    path = shard(home, tmp_path, "alice", "all.bin", A, rows=(0, 8))
    shard(home, tmp_path, "bob", "all.bin", A, rows=(8, 16))
    read = opened(str(path), A, data=0)
    record(home, "half", read, loader(leaf(0), 8), delivered(1), delivered(2))
    record(home, "whole", read, loader(leaf(0), 16), *(delivered(n) for n in range(1, 5)))
    record(home, "none", read, told.step(1))
    assert asked(home, "bob", "half").answer == "not_used"
    [used] = asked(home, "bob", "whole").used
    assert (used.steps, used.rows) == ((3, 4), ((8, 16),))
    assert asked(home, "alice", "whole").used[0].rows == ((0, 8),)
    assert asked(home, "bob", "none").answer == "cannot_tell"


def test_a_worker_reads_for_its_parents_data_set(home: Home) -> None:
    """Numbers of data sets are kept through forks, so a file read in a worker belongs to the loader's rows."""
    hello = {"hello": {"version": "3.11.7", "forked_from": 800}, "of_the_job": True}
    worker = ("process", hello, {"process": 1, "pid": 801, "uid": 1000})
    layout = both(8, 8)
    files = [opened("/d/a.bin", A, data=0, process=1), opened("/d/b.bin", B, data=1, process=1)]
    record(home, "r", loader(layout, 16), worker, *files, *(delivered(n) for n in range(1, 5)))
    [used] = asked(home, "bob", "r").used
    assert (used.basis, used.steps) == ("rows", (3, 4))


# -- withdrawal -------------------------------------------------------------------------------------------------------


def test_use_before_the_withdrawal_is_told_apart_from_use_after_it(home: Home) -> None:
    """By the order of the log where a run was over before, else by the supervisor's clock."""
    record(home, "before", *two())
    entry = withdraw(home, source="bob", reason="consent withdrawn")
    record(home, "after", *two())
    record(home, "clean", *honest())
    known = lineage("before", "after", "clean")
    found = {run: asked(home, "bob", run, known) for run in ("before", "after", "clean")}
    words = {run: (answer.answer, answer.after_withdrawal) for run, answer in found.items()}
    assert words == {
        "before": ("used", "not_used"),
        "after": ("used", "used"),
        "clean": ("not_used", "not_used"),
    }
    assert found["after"].withdrawn == entry.when
    assert asked(home, "bob", "before", known, since_withdrawal=True).exit_status == 0
    with pytest.raises(Misuse, match="found it in use"):
        asked(home, "alice", "clean", known, since_withdrawal=True)


def test_a_model_made_from_one_that_used_it_has_used_it(home: Home) -> None:
    """Through lineage: the second run read only alice's data, and went on from the first one's weights."""
    record(home, "first", *two())
    withdraw(home, source="bob", reason="consent withdrawn")
    record(home, "second", *honest())
    known = lineage("first", "second")
    known.used = {"first": {digest(A): None, digest(B): 3}, "second": {digest(A): None}}
    known.graph.join("start:first", "checkpoint:c", witnessed=True)
    known.graph.join("checkpoint:c", "start:second", witnessed=True)
    answer = asked(home, "bob", "second", known)
    assert (answer.answer, answer.after_withdrawal, answer.runs) == ("used", "not_used", ("second", "first"))
    told_of = {(model.key, model.by, model.read_in_step) for model in answer.earlier}
    assert ("run:first", "read", 3) in told_of
    assert ("run:second", "descends", None) in told_of
    assert asked(home, "alice", "second", known).answer == "used"


# -- lock and measurement ------------------------------------------------------------------------


def measured(home: Home, **more: Any) -> tuple[str, told.Told]:
    """A lock over a job in /job with a configuration and an unregistered file, and the record of measuring it."""
    files = {"train.py": f"{'aa' * 32} 10", "config.json": f"{'bb' * 32} 20", "corpus.txt": f"{'cc' * 32} 30"}
    trees = {
        "code": Tree(name="code", root="/job", files=files),
        "data:data": Tree(name="data:data", root="/job/data", files={"big.bin": f"{digest(A)} 5000000000"}),
        "site-packages": Tree(name="site-packages", root="/v/site-packages"),
    }
    whole = {"trees": trees, "distributions": {}} | more
    value = Measurement(
        cwd="/job", launch=Launch(argv=("python",), kind="script"), interpreter=None, code=Code(root="/job"), **whole
    )
    from trainguard.envelope import load_or_create_key

    lock = make_lock(value, load_or_create_key(home.keys / "attestation.pem"), made="2026-11-22T00:00:00Z")
    digest_of = home.store_blob(lock.data)
    body = {"blob": home.store_blob(value.encode()), "lock": digest_of, "signed": True, "attempt": 0}
    return digest_of, ("measurement", body, {})


@pytest.mark.parametrize(
    ("name", "sha256", "size", "answer"),
    [
        ("config.json", "bb" * 32, 20, "not_used"),
        ("config.json", "dd" * 32, 20, "cannot_tell"),
        ("config.json", "bb" * 32, 1 << 20, "cannot_tell"),
        ("corpus.txt", "cc" * 32, 30, "cannot_tell"),
    ],
)
def test_small_approved_configuration_is_code_and_a_text_beside_it_is_data(
    home: Home, name: str, sha256: str, size: int, answer: str
) -> None:
    """In the lock is not enough for what can be training data."""
    lock, measurement = measured(home)
    line = {"path": f"/job/{name}", "mode": "r", "sha256": sha256, "size": size, "uid": 1000}
    read = ("open", {"files": [line]}, {"process": 0, "pid": 800, "source": "process"})
    record(home, "r", measurement, *honest(), read, lock=lock)
    assert asked(home, "bob", "r").answer == answer


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ({"ctime_ns": 5, "size": 5_000_000_000}, "not_used"),
        ({"ctime_ns": 5, "size": 5_000_000_001}, "cannot_tell"),
        ({"ctime_ns": 1 << 62, "size": 5_000_000_000}, "cannot_tell"),
        ({"ctime_ns": 5, "size": 5_000_000_000, "changed": True}, "cannot_tell"),
    ],
)
def test_a_large_file_counts_as_measured_before_only_where_nothing_touched_it_since(
    home: Home, line: dict[str, Any], answer: str
) -> None:
    """Changed after the lock is found by size and by times that cannot be set back."""
    lock, measurement = measured(home)
    record(home, "r", measurement, *honest(), opened("/job/data/big.bin", None, **line), lock=lock)
    assert asked(home, "bob", "r").answer == answer


def test_content_among_installed_packages_is_a_reason(home: Home) -> None:
    """What is read there is not on record."""
    package = Distribution(
        name="innocent", version="1", tree="site-packages", files={"innocent/d.bin": f"{digest(B)} {len(B)}"}
    )
    lock, measurement = measured(home, distributions={"innocent": package})
    record(home, "r", measurement, *honest(), lock=lock)
    assert any("site-packages/innocent/d.bin" in reason for reason in asked(home, "bob", "r").reasons)


# -- the signed answer ------------------------------------------------------------------------------------------------


def test_a_signed_answer_verifies_and_any_change_to_it_does_not(home: Home) -> None:
    """Signature, document and cited rows."""
    record(home, "r", *honest())
    answer = asked(home, "bob", "r")
    data = sign_answer(home, answer)
    key = load_public_key(home.keys / "attestation.pub")
    assert verify_answer(data, [key]) == answer
    assert recheck(home, answer)
    value = json.loads(data)
    value["answer"]["answer"] = "used"
    with pytest.raises(VerificationError, match="another answer"):
        verify_answer(json.dumps(value).encode(), [key])
    for broken in (b"", b"[]", b"{}", data[:-20], b"[" * 100_000):
        with pytest.raises(VerificationError):
            verify_answer(broken, [key])


def test_an_answer_whose_rows_are_not_in_the_log_does_not_hold(home: Home, tmp_path: Path) -> None:
    """A cited row that was made up, and a log that is another."""
    record(home, "r", *honest())
    answer = asked(home, "bob", "r")
    wrong = msgspec.structs.replace(answer.evidence[-1], hash="00" * 32)
    with pytest.raises(VerificationError, match="does not hold the cited row"):
        recheck(home, msgspec.structs.replace(answer, evidence=(wrong,)))
    other = Home(tmp_path / "other")
    shard(other, tmp_path, "alice", "a.bin", A)
    with pytest.raises(VerificationError, match="is another or was rewritten"):
        recheck(other, answer)
    assert not recheck(Home(tmp_path / "none"), answer)


def test_a_source_that_nobody_registered_is_a_usage_error(home: Home) -> None:
    """Not a proof of anything."""
    record(home, "r", *honest())
    with pytest.raises(Misuse, match="found alice, bob"):
        asked(home, "carol", "r")


def test_a_source_whose_manifest_was_altered_is_never_said_to_be_unused(home: Home) -> None:
    """Its content is not known any more."""
    record(home, "r", *honest())
    [blob] = [path for path in home.blobs.iterdir() if digest(B).encode() in path.read_bytes()]
    blob.write_bytes(b"{}")
    answer = asked(home, "bob", "r")
    assert answer.answer == "cannot_tell"
    assert "gone or were altered" in answer.reasons[0]
