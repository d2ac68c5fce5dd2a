"""Everyone the evidence names is found, with why; framing is told from proof; strangers are left alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers.cases import Site, incident
from tests.helpers.told import at_work, end, leave, process, record, start

from trainguard.cases.identity import new_identity
from trainguard.cases.people import blamed, named, process_accounts, subjects_of
from trainguard.cases.records import Subject
from trainguard.finding import Citation
from trainguard.incident.attribute import Attribution, Candidate


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A file of three lines by three authors."""
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "-q")
    for at, who in enumerate(("ann", "ben", "insider")):
        with (folder / "train.py").open("a") as file:
            file.write(f"line_{at} = {at}\n")
        git(folder, "add", "train.py")
        git(folder, "-c", f"user.name={who}", "-c", f"user.email={who}@example.org", "commit", "-qm", who)
    return folder


def git(folder: Path, *words: str) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", *words], cwd=folder, env=environment, check=True, timeout=30)


def test_the_author_of_a_named_line_is_found_and_can_be_lifted(tmp_path: Path, repository: Path):
    """And not the authors of other lines; who wrote a line is what somebody typed, so never firm."""
    found = subjects_of(Site(tmp_path).home, [incident(path=f"{repository}/train.py:3")])
    authors = {one.value: one.firm for one in found if one.kind == "author"}
    assert authors == {"insider": False, "insider@example.org": False}


def test_a_line_that_was_never_committed_has_the_authors_of_its_file(repository: Path):
    """Better one too many, who can be lifted, than the one who is looked for."""
    assert blamed(repository / "train.py", "9,9") == (
        "ann",
        "ann@example.org",
        "ben",
        "ben@example.org",
        "insider",
        "insider@example.org",
    )
    assert blamed(repository / "other.py", None) == ()


def test_a_repository_cannot_make_git_run_a_program(repository: Path, tmp_path: Path):
    """File-system monitor, text conversion, content filter: none is started."""
    mark = tmp_path / "ran"
    program = tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    program.chmod(0o755)
    for key in ("core.fsmonitor", "diff.evil.textconv", "filter.evil.clean", "filter.evil.smudge"):
        git(repository, "config", key, str(program))
    (repository / ".gitattributes").write_text("*.py diff=evil filter=evil\n")
    assert blamed(repository / "train.py", "1,1") == ("ann", "ann@example.org")
    assert not mark.exists()


def test_accounts_in_cited_records_are_firm_and_the_owner_of_the_run_is_not(tmp_path: Path):
    """The kernel said who it was; that somebody's run was harmed is no reason by itself."""
    site = Site(tmp_path)
    kernel = ("signalled", {"sender": {"pid": 9, "uid": 54242, "loginuid": "54243"}, "target": 1}, {})
    account = {"uid": 1000, "name": "victim-a", "loginuid": "1000"}
    record(site.home, "job-7", [start(account=account), at_work(), process(), kernel, *leave(), end()])
    from trainguard.archive import RunReader

    cited = [each for each in RunReader(site.home, "job-7").records() if each.kind in ("signalled", "process")]
    bare = incident()
    finding = replace(bare.findings[0], evidence=tuple(Citation(leaf=2, hash=str(one.hash)) for one in cited))
    found = subjects_of(
        site.home, [replace(bare, findings=(finding,), attribution=Attribution(candidates=(), sentence=""))]
    )
    assert {one.value: one.firm for one in found} == {"uid 54242": True, "uid 54243": True, "uid 1000": False}


def test_an_account_that_the_session_contradicts_can_be_lifted(tmp_path: Path):
    """That is what framing a colleague looks like (G9)."""
    framed = Candidate(
        level="A3", what="account victim-b (uid 54300)", uid=54300, score=0.3, confidence=0.3, supports=(),
        alternatives=("session and account contradict each other",),
    )  # fmt: skip
    session = Candidate(
        level="A3", what="login session 7 of account insider (uid 54242)", uid=54242, score=0.8, confidence=0.8,
        supports=("git: the line comes from commit 0123456789ab by A Nother <nother@example.org>, signed",),
    )  # fmt: skip
    told = Attribution(candidates=(session, framed), excluded=("account victim-b (uid 54300): x",), sentence="")
    found = {one.value: one.firm for one in subjects_of(Site(tmp_path).home, [replace(incident(), attribution=told)])}
    assert found["insider"] is found["uid 54242"] is True
    assert found["victim-b"] is found["uid 54300"] is False
    assert found["nother@example.org"] is found["A Nother"] is False


@pytest.mark.parametrize(
    ("card", "also", "hit"),
    [
        ({"accounts": ("insider",)}, (), True),
        ({"accounts": ("54242",)}, (), True),
        ({"accounts": ("uid 54242",)}, (), True),
        ({"accounts": ("INSIDER",)}, (), True),
        ({"accounts": ("somebody",)}, ("uid 54242",), True),
        ({"accounts": ("somebody", "5424")}, ("uid 1",), False),
    ],
)
def test_a_card_is_known_by_any_form_of_its_account(card: dict[str, tuple[str, ...]], also: tuple[str, ...], hit: bool):
    """Name, number, case, or what the process acts under whatever the card says."""
    subjects = [Subject(kind="account", value=value, why="x", firm=True) for value in ("insider", "uid 54242")]
    assert bool(named(new_identity("x", **card).card, subjects, also=also)) is hit


def test_a_card_is_known_by_its_key_and_by_what_its_owner_commits_under():
    """Mail addresses in any case, and the name itself."""
    made = new_identity("Mara", authors=("Mara@Example.org",))
    for kind, value in (("key", made.key), ("author", "mara@example.ORG"), ("author", "mara")):
        assert named(made.card, [Subject(kind=kind, value=value, why="x", firm=True)])  # type: ignore[arg-type]
    assert not named(made.card, [Subject(kind="account", value="mara@example.org", why="x", firm=True)])


def test_accounts_of_the_system_are_nobody():
    """Else whoever works as root would be everybody."""
    assert all(int(account.removeprefix("uid ")) >= 1000 for account in process_accounts())
