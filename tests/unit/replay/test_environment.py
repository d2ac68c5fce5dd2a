"""Environments that replay: measured where they are, held against the lock, and apart from the run's own."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import sha256_hex
from trainguard.errors import Misuse
from trainguard.lockfile import Lock, make_lock
from trainguard.measure import measure
from trainguard.replay.environment import Refused, Rule, Wanted, wanted
from trainguard.replay.tasks import Place
from trainguard.testing.installed import InstalledEnvironment

HERE = {"host": platform.node(), "boot_id": "b", "lock": "x"}
ELSEWHERE = "another-host"


class Stand:
    """An environment, its lock, and a clean copy of it beside it."""

    def __init__(self, folder: Path) -> None:
        self.own = InstalledEnvironment(folder)
        self.own.install("tinyoptim", "1.0", {"tinyoptim.py": "RATE = 0.1\n"})
        (self.own.job / "train.py").write_text("import tinyoptim\n")
        self.copy = folder / "clean"
        shutil.copytree(self.own.prefix, self.copy, symlinks=True)
        self.blobs: dict[str, bytes] = {}
        self.lock: Lock = make_lock(
            self.measured(self.own.prefix), ec.generate_private_key(ec.SECP256R1()), made="2026"
        )

    def measured(self, prefix: Path) -> Any:
        environment = self.own.environment | {"PATH": f"{prefix / 'bin'}:/usr/bin:/bin"}
        return measure([str(prefix / "bin" / "python"), "train.py"], cwd=self.own.job, env=environment)

    def stored(self, prefix: Path) -> str:
        data = self.measured(prefix).encode()
        self.blobs[sha256_hex(data)] = data
        return sha256_hex(data)

    def rule(self, lock: Lock | None) -> Rule:
        return Rule(lock, str(self.own.prefix), HERE, self.blobs.__getitem__)

    def place(self, where: Path, **changed: Any) -> Place:
        told = {"host": HERE["host"], "boot_id": "b", "python": str(where / "bin" / "python"), "prefix": str(where)}
        return Place(**(told | changed))


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(tmp_path_factory.mktemp("stand"))


def test_a_copy_that_is_as_the_lock_approves_counts(stand: Stand) -> None:
    """Another folder on the same host, every file as approved: apart and approved, so the level may rise."""
    rule = stand.rule(stand.lock)
    rule.admit(stand.place(stand.copy), stand.stored(stand.copy), None)
    told = rule.told
    assert (told["apart"], told["approved"], told["reason"], told["differences"]) == (True, True, "", [])
    assert told["places"][0]["prefix"] == str(stand.copy)


def edited(site: Path) -> None:
    (site / "tinyoptim.py").write_text("RATE = 0.2\n")


def hooked(site: Path) -> None:
    (site / "zz.pth").write_text("import os\n")


def added(site: Path) -> None:
    (site / "extra.py").write_text("pass\n")


@pytest.mark.parametrize(("act", "name"), [(edited, "tinyoptim.py"), (hooked, "zz.pth"), (added, "extra.py")])
def test_a_copy_that_differs_is_refused_and_its_files_are_named(
    stand: Stand, tmp_path: Path, act: Callable[[Path], None], name: str
) -> None:
    """Nothing that it gives counts, whichever way it would have come out."""
    copy = tmp_path / "changed"
    shutil.copytree(stand.copy, copy, symlinks=True)
    act(next((copy / "lib").glob("*/site-packages")))
    rule = stand.rule(stand.lock)
    with pytest.raises(Refused, match=name):
        rule.admit(stand.place(copy), stand.stored(copy), None)
    assert rule.told["approved"] is False
    assert any(name in line for line in rule.told["differences"])


def test_one_bad_place_among_good_ones_keeps_the_level_down(stand: Stand, tmp_path: Path) -> None:
    """Of many machines every one that was used has to be as approved."""
    copy = tmp_path / "changed"
    shutil.copytree(stand.copy, copy, symlinks=True)
    edited(next((copy / "lib").glob("*/site-packages")))
    rule = stand.rule(stand.lock)
    rule.admit(stand.place(stand.copy), stand.stored(stand.copy), None)
    with pytest.raises(Refused):
        rule.admit(stand.place(copy, host=ELSEWHERE, boot_id="c"), stand.stored(copy), None)
    assert rule.told["approved"] is False


def test_what_could_not_be_measured_is_refused(stand: Stand) -> None:
    """Not measured is not approved."""
    rule = stand.rule(stand.lock)
    with pytest.raises(Refused, match="is not measured: no such interpreter"):
        rule.admit(stand.place(stand.copy), None, "no such interpreter")
    assert rule.told["approved"] is False


def test_without_a_lock_it_counts_and_raises_nothing(stand: Stand) -> None:
    """There is nothing to hold it against, and that is said."""
    rule = stand.rule(None)
    rule.admit(stand.place(stand.copy), stand.stored(stand.copy), None)
    assert rule.told["approved"] is False
    assert rule.told["reason"] == "the run has no lock to measure the environment against"


def test_the_runs_own_environment_named_again_is_not_apart(stand: Stand, tmp_path: Path) -> None:
    """By its own path, by a link to it, and by the same folder under another name."""
    link = tmp_path / "link"
    link.symlink_to(stand.own.prefix)
    site = next((stand.own.prefix / "lib").glob("*/site-packages")).stat()
    places = [
        stand.place(stand.own.prefix),
        stand.place(link),
        stand.place(Path("/mounted/elsewhere"), site=f"{site.st_dev}:{site.st_ino}"),
        stand.place(stand.copy, prefix=None),
    ]
    for place in places:
        rule = stand.rule(stand.lock)
        rule.admit(place, stand.stored(stand.own.prefix), None)
        assert (rule.told["apart"], rule.told["approved"]) == (False, False), place


def test_another_host_is_apart_by_its_boot_and_not_by_its_name(stand: Stand) -> None:
    """A host's name can be set by anyone on it; where the kernel's boot id is known it decides."""
    rule = stand.rule(stand.lock)
    rule.admit(stand.place(stand.own.prefix, host="renamed"), stand.stored(stand.own.prefix), None)
    assert rule.told["apart"] is False
    other = stand.rule(stand.lock)
    other.admit(stand.place(stand.own.prefix, boot_id="c"), stand.stored(stand.own.prefix), None)
    assert other.told["approved"] is True


@pytest.mark.parametrize(
    ("text", "python", "words", "image"),
    [
        (None, None, (), None),
        ("/opt/job/bin/python", "/opt/job/bin/python", (), None),
        ("ssh verifier /opt/job/bin/python", "/opt/job/bin/python", ("ssh", "verifier"), None),
        ("image:registry/job@sha256:00", "python", (), "registry/job@sha256:00"),
    ],
)
def test_the_three_ways_to_name_an_environment(
    text: str | None, python: str | None, words: tuple[str, ...], image: str | None
) -> None:
    assert wanted(text) == Wanted(python=python, words=words, image=image)


@pytest.mark.parametrize("text", ["image:", "image:-v/:/host", "image:a b", "'", " "])
def test_an_environment_that_cannot_be_meant_is_misuse(text: str) -> None:
    with pytest.raises(Misuse, match="--env"):
        wanted(text)
