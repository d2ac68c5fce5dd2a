"""The small words: findings, link states, policy, digests, home."""

import os
from pathlib import Path

import pytest

from trainguard.digest import file_sha256, parse_sha256, sha256_hex, write_durably
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.finding import Finding, LinkState, Subject, worst_first
from trainguard.home import Home
from trainguard.policy import Approval, Policy, load_policy, parse_policy


def test_a_link_nobody_looked_at_is_blind_not_held() -> None:
    """Blind is never green."""
    assert LinkState(link="x").state == "blind"
    assert LinkState(link="x", held=3).state == "held"
    assert LinkState(link="x", held=3, blind=("why",)).state == "blind"
    assert LinkState(link="x", held=3, explained=("a.py:1",)).state == "explained"
    assert LinkState(link="x", held=3, broken=1, blind=("why",)).state == "broken"
    assert LinkState(link="x", required=False).state == "held"


def test_findings_read_worst_first() -> None:
    """Violated before suspicious before not checked, then by step."""
    made = [
        Finding(check="a", outcome=outcome, message="", subject=Subject(step=step))
        for outcome, step in (("not_checked", 1), ("violated", 9), ("suspicious", 2), ("violated", 3))
    ]
    assert [(f.outcome, f.subject.step) for f in worst_first(made)] == [
        ("violated", 3),
        ("violated", 9),
        ("suspicious", 2),
        ("not_checked", 1),
    ]


def test_a_policy_reads_from_toml() -> None:
    """Every field by its own name; approvals as a table array."""
    text = b'links = "all"\n[[approve]]\ncheck = "weights"\nplace = "train.py:45"\n'
    policy = parse_policy(text, where="p")
    assert policy.links == "all"
    assert policy.approves("weights", "/home/victim-a/train.py:45")
    assert not policy.approves("weights", "train.py:46")
    assert not policy.approves("optimizer", "train.py:45")


def test_a_whole_file_can_be_approved() -> None:
    """A place without a line covers every line of that file, and no other file's."""
    policy = Policy(approve=(Approval(check="weights", place="clip.py"),))
    assert policy.approves("weights", "/x/clip.py:3")
    assert not policy.approves("weights", "/x/eclip.py:3")


@pytest.mark.parametrize("text", [b"unknown = 1", b"links = 3", b"links = 'some'", b"=", b"\xff"])
def test_a_policy_with_anything_unknown_is_refused(text: bytes) -> None:
    """A misspelt setting must not silently keep its default."""
    with pytest.raises(Misuse, match="p: "):
        parse_policy(text, where="p")


def test_an_organisation_that_stops_unvetted_loads_cannot_be_loosened() -> None:
    """Neither to log, nor by more trust, nor by a wider tier; where it only logs, a project may stop."""
    organisation = Policy(load="stop", load_trust=("a.B instance",))
    assert Policy(load="stop", load_trust=("a.B instance",)).tightened(organisation).load == "stop"
    assert Policy(load="stop", load_tier="weights").tightened(organisation).load_tier == "weights"
    assert Policy(load="stop", load_trust=("c.D call",)).tightened(Policy()).load == "stop"
    for looser in (Policy(), Policy(load="stop", load_trust=("c.D call",)), Policy(load="stop", load_tier="framework")):
        with pytest.raises(Misuse, match="load"):
            looser.tightened(organisation)
    for text in ('load = "maybe"', 'load_tier = "all"', "load_trust = 3"):
        with pytest.raises(Misuse, match="load"):
            parse_policy(text.encode(), where="policy.toml")


def test_a_policy_can_only_be_tightened() -> None:
    """A project may ask for more than the organisation, not for less."""
    organisation = Policy(links="governed", update_tolerance_ulp=16)
    assert Policy(links="all", update_tolerance_ulp=8).tightened(organisation).links == "all"
    with pytest.raises(Misuse, match="links, update_tolerance_ulp"):
        Policy(links="none", update_tolerance_ulp=1e6).tightened(organisation)


def test_the_policy_digest_shows_a_widened_tolerance() -> None:
    """Two policies that differ in one limit have different digests (G6)."""
    assert Policy().digest == Policy().digest != Policy(update_tolerance_ulp=17).digest


def test_a_missing_policy_is_unavailable(tmp_path: Path) -> None:
    """One sentence with the path."""
    with pytest.raises(Unavailable, match="cannot be read"):
        load_policy(tmp_path / "none.toml")


def test_a_digest_is_exactly_64_lower_case_hex_digits() -> None:
    """Nothing else names a blob: no path, no upper case."""
    assert parse_sha256("0" * 64, where="x") == "0" * 64
    for bad in ("0" * 63, "A" * 64, "../" + "0" * 61, None, 5):
        with pytest.raises(MalformedEvidence, match="x: expected 64 hex digits"):
            parse_sha256(bad, where="x")


def test_file_digests_refuse_what_is_no_plain_file(tmp_path: Path) -> None:
    """A FIFO would block, a symbolic link may point anywhere, a large file costs time: each is one sentence."""
    (tmp_path / "f").write_bytes(b"abc")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("f")
    assert file_sha256(tmp_path / "f") == sha256_hex(b"abc")
    with pytest.raises(Unavailable, match="regular file"):
        file_sha256(tmp_path / "fifo")
    with pytest.raises(Unavailable, match="cannot be opened"):
        file_sha256(tmp_path / "link")
    with pytest.raises(Unavailable, match="at most 2 bytes, found 3"):
        file_sha256(tmp_path / "f", limit_bytes=2)


def test_durable_writes_leave_no_temporary_file(tmp_path: Path) -> None:
    """The file is replaced whole; a failure leaves the old one and nothing else."""
    write_durably(tmp_path / "f", b"one")
    write_durably(tmp_path / "f", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with pytest.raises(Unavailable):
        write_durably(tmp_path / "none" / "f", b"x")


def test_run_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    """A run id is a file name."""
    home = Home(tmp_path)
    for bad in ("", "..", "a/b", "/etc", "a b", ".hidden", "x" * 101):
        with pytest.raises(Misuse):
            home.run(bad)


def test_runs_are_found_by_unique_beginning(tmp_path: Path) -> None:
    """An id, a beginning that fits one run, or `latest`."""
    home = Home(tmp_path)
    for run in ("abc1", "abd2"):
        (home.runs / run).mkdir(parents=True)
    assert home.find_run("abc") == "abc1"
    with pytest.raises(Misuse, match="2 begin with it"):
        home.find_run("ab")
    with pytest.raises(Misuse, match="no such run"):
        home.find_run("x")


def test_a_blob_that_was_altered_is_refused(tmp_path: Path) -> None:
    """Content is checked against the name it is stored under, at every read."""
    home = Home(tmp_path)
    home.prepare()
    digest = home.store_blob(b"evidence")
    assert home.blob(digest) == b"evidence"
    (home.blobs / digest).write_bytes(b"evidencE")
    with pytest.raises(VerificationError, match="altered"):
        home.blob(digest)
