"""What a file says of who made it: owner, modes, the commit of the very line; and git runs nothing of others."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trainguard.incident.traces import Inode, look_at, who_wrote
from trainguard.measure.submitter import submitter

git_and_keys = pytest.mark.skipif(
    shutil.which("git") is None or shutil.which("ssh-keygen") is None, reason="needs git and ssh-keygen"
)


def git(folder: Path, *words: str, author: str = "victim-b") -> str:
    identity = {"AUTHOR": author, "COMMITTER": author}
    env = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    for role, name in identity.items():
        env |= {f"GIT_{role}_NAME": name, f"GIT_{role}_EMAIL": f"{name}@lab.example"}
    done = subprocess.run(["git", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "train.py").write_text("one\ntwo\n")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


@git_and_keys
def test_the_commit_of_the_very_line_is_found_and_an_unsigned_author_is_only_a_name(repository: Path) -> None:
    (repository / "train.py").write_text("one\nTWO\n")
    git(repository, "commit", "-q", "-a", "-m", "second", author="insider")
    first, second = (who_wrote(repository / "train.py", line) for line in (1, 2))
    assert first is not None
    assert second is not None
    assert (first.identity, first.signed, first.key) == ("victim-b <victim-b@lab.example>", "none", None)
    assert second.identity == "insider <insider@lab.example>"
    assert first.commit != second.commit


@git_and_keys
def test_a_signature_that_holds_names_its_key_whoever_the_repository_says_to_trust(repository: Path) -> None:
    key = repository / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=30)
    (repository / "train.py").write_text("one\ntwo\nthree\n")
    git(repository, "config", "gpg.ssh.allowedSignersFile", str(repository / "of-the-attacker"))
    git(
        repository,
        *("-c", "gpg.format=ssh", "-c", f"user.signingkey={key}.pub", "commit", "-q", "-S", "-a", "-m", "signed"),
    )
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", f"{key}.pub"], capture_output=True, text=True, timeout=30, check=True
    )
    wrote = who_wrote(repository / "train.py", 3)
    assert wrote is not None
    assert wrote.signed == "good"
    assert wrote.key == shown.stdout.split()[1]


@git_and_keys
def test_who_committed_another_ones_line_is_told_apart_from_its_author(repository: Path) -> None:
    """As after a rebase: the author stays, the committer is another, and a signature would be the committer's."""
    (repository / "train.py").write_text("one\ntwo\nthree\nfour\n")
    git(repository, "add", "train.py")
    git(repository, "commit", "-q", "-m", "x", "--author=victim-b <b@example.org>", author="insider")
    wrote = who_wrote(repository / "train.py", 4)
    assert wrote is not None
    assert (wrote.identity, wrote.committer) == ("victim-b <b@example.org>", "insider <insider@lab.example>")


@git_and_keys
def test_a_line_that_is_not_as_committed_has_no_author(repository: Path) -> None:
    (repository / "train.py").write_text("one\nedited\n")
    wrote = who_wrote(repository / "train.py", 2)
    assert wrote is not None
    assert (wrote.commit, wrote.identity) == ("", "")


@git_and_keys
@pytest.mark.parametrize("setting", ["gpg.program", "gpg.ssh.program", "diff.external", "core.fsmonitor", "core.pager"])
def test_nothing_that_the_repository_names_is_run(repository: Path, setting: str) -> None:
    marker = repository / "ran"
    program = repository / "program"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    git(repository, "config", setting, str(program))
    git(repository, "config", "filter.x.clean", str(program))
    (repository / ".gitattributes").write_text("*.py filter=x diff=x\n")
    git(repository, "config", "diff.x.textconv", str(program))
    assert who_wrote(repository / "train.py", 1) is not None
    assert not marker.exists()


def test_without_a_repository_there_is_no_author(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("x\n")
    assert who_wrote(tmp_path / "x.py", 1) is None
    assert who_wrote(tmp_path / "gone" / "x.py", 1) is None


def test_owner_and_modes_are_read_without_following_links(tmp_path: Path) -> None:
    path, link = tmp_path / "f", tmp_path / "l"
    path.write_text("x")
    path.chmod(0o664)
    link.symlink_to("/etc/hostname")
    found = look_at(path)
    assert found is not None
    assert (found.uid, found.mode, found.writable_by_others) == (os.getuid(), 0o664, True)
    pointed = look_at(link)
    assert pointed is not None
    assert (pointed.mode, pointed.writable_by_others) == (None, False), "every link has mode 0777"
    assert look_at(tmp_path / "gone") is None
    assert look_at(Path("a\0b")) is None


@pytest.mark.parametrize(("mode", "others"), [(0o755, False), (0o777, True), (0o1777, False), (0o775, True)])
def test_a_sticky_folder_keeps_others_files_from_being_replaced(mode: int, others: bool) -> None:
    assert Inode(uid=1, mode=0o644, folder_uid=1, folder_mode=mode).replaceable_by_others is others


def test_what_a_scheduler_says_is_taken_with_a_limit(tmp_path: Path) -> None:
    found = submitter({"SLURM_JOB_ID": "42", "SLURM_JOB_USER": "victim-a", "PATH": "/bin", "SLURM_JOB_UID": "1" * 999})
    assert found == {"slurm": {"SLURM_JOB_ID": "42", "SLURM_JOB_USER": "victim-a", "SLURM_JOB_UID": "1" * 200}}
    (tmp_path / "namespace").write_text("team-a\n")
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "job-0"}
    told = submitter(pod, namespace=tmp_path / "namespace")
    assert told == {"kubernetes": {"HOSTNAME": "job-0", "namespace": "team-a"}}
    assert submitter({"TORCHELASTIC_RUN_ID": "r", "GROUP_RANK": "0"}) == {
        "torchrun": {"TORCHELASTIC_RUN_ID": "r", "GROUP_RANK": "0"}
    }
    assert submitter({"SLURM_JOB_USER": "victim-a", "HOSTNAME": "node-3"}) == {}
