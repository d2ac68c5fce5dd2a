"""What a run told of itself is held to two clean replays with different clocks: C10 with no check in the process."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from trainguard.finding import Finding
from trainguard.replay.committed import Account, Step
from trainguard.replay.files import Kept
from trainguard.replay.rerun import Rerun, Saved
from trainguard.replay.told import departures, findings, written_texts

BEGAN, ENDED = 1_000_000_000, 9_000_000_000
LAST = 8


def step(number: int) -> Step:
    return Step(number=number, opt=0, rng=(), modes=None, groups=None, hyper={}, vectors={}, lean=True)


def replay(texts: dict[str, str] | None = None, *, reached: int = LAST, saves: tuple[int, ...] = ()) -> Rerun:
    account = Account()
    account.steps = {number: step(number) for number in range(1, reached + 1)}
    made = [
        Saved(process=0, number=n, step=at, path="/box/work/best.pt", aside=False) for n, at in enumerate(saves)
    ]  # fmt: skip
    return Rerun(account=account, accounts={0: account}, texts=texts or {}, saved=made, root="/box")


def judged(folder: Path, one: Rerun, two: Rerun, files: tuple[Kept, ...] = ()) -> list[Finding]:
    first, second = (
        departures(each, last=LAST, cwd=str(folder), began_ns=BEGAN, ended_ns=ENDED, files=files) for each in (one, two)
    )
    return list(findings("r", first, second))


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """A file as the run left it, changed while it ran."""
    path = tmp_path / "metrics.json"
    path.write_text('{"accuracy": 0.7644, "loss": 1.25, "seconds": 3.0}\n')
    return path


def within(path: Path, monkeypatch: pytest.MonkeyPatch, changed: int = BEGAN + 1) -> None:
    """No test can set the time at which a file's own entry was changed: it is told instead."""
    real = os.fstat

    class Status:
        def __init__(self, descriptor: int) -> None:
            self.st_size = real(descriptor).st_size
            self.st_mtime_ns = self.st_ctime_ns = changed

    monkeypatch.setattr("trainguard.replay.told.os.fstat", Status)


def text(accuracy: str = "0.78", seconds: str = "3.0") -> dict[str, str]:
    return {"metrics.json": f'{{"accuracy": {accuracy}, "loss": 1.25, "seconds": {seconds}}}\n'}


def test_a_metric_times_098_is_found_with_its_place(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C10: both clean replays wrote 0.78 where the run has 0.7644; seconds are other in each and do not matter."""
    within(metrics, monkeypatch)
    (finding,) = judged(metrics.parent, replay(text(seconds="2.5")), replay(text(seconds="7.9")))
    assert (finding.outcome, finding.techniques, finding.expected, finding.found) == (
        "suspicious",
        ("C10",),
        "0.78",
        "0.7644",
    )
    assert finding.subject.path == str(metrics)
    assert "number 1" in finding.message
    assert "accuracy" in finding.message


def test_numbers_that_hang_on_the_clock_are_held_against_nobody(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal texts, other times, other words around: nothing is said."""
    within(metrics, monkeypatch)
    honest = text(accuracy="0.7644")
    assert judged(metrics.parent, replay(honest), replay(honest)) == []
    slow, slower = text("0.7644", "2.0"), text("0.7644", "6.0")
    assert judged(metrics.parent, replay(slow), replay(slower)) == []
    other = {"metrics.json": '{"accuracy": 0.78}\n'}
    assert judged(metrics.parent, replay(other), replay(other)) == []


@pytest.mark.parametrize("day", ["2026-11-23", "23/11/2026", "20261123", "2026-11-23T09:41:07"])
def test_a_date_is_held_against_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """The run was yesterday, both replays are today; a number beside the date still counts."""
    path = tmp_path / "log.txt"
    path.write_text(f"{day.replace('23', '22')} loss 1.25\n")
    within(path, monkeypatch)
    honest, other = {"log.txt": f"{day} loss 1.25\n"}, {"log.txt": f"{day} loss 1.50\n"}
    assert judged(tmp_path, replay(honest), replay(honest)) == []
    assert [found.found for found in judged(tmp_path, replay(other), replay(other))] == ["1.25"]


def test_a_file_that_was_changed_after_the_run_is_not_its_own(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody rounded the numbers next morning."""
    within(metrics, monkeypatch, changed=ENDED + 60_000_000_000)
    assert judged(metrics.parent, replay(text()), replay(text())) == []


def test_a_run_that_ended_before_its_command_would_is_said(tmp_path: Path) -> None:
    """C10: early stop by an altered metric; a limit of time ends the replay with the fast clock too, and is honest."""
    (finding,) = judged(tmp_path, replay(reached=LAST + 1), replay(reached=LAST + 1))
    assert (finding.subject.step, finding.techniques) == (LAST, ("C10",))
    assert judged(tmp_path, replay(reached=LAST + 1), replay(reached=LAST)) == []


def kept(step: int) -> Kept:
    return Kept(path="/run/best.pt", step=step, since=step, form="torch", storages={}, names={})


def test_a_best_checkpoint_of_another_step_is_said() -> None:
    """C10: the command keeps the model of step 4, the run kept that of step 7. By time it may be any step."""
    folder = Path("/run")
    (finding,) = judged(folder, replay(saves=(2, 4)), replay(saves=(2, 4)), (kept(7),))
    assert (finding.subject.path, finding.expected, finding.found) == (
        "/run/best.pt",
        "after step 2, 4",
        "after step 7",
    )
    assert judged(folder, replay(saves=(2, 4)), replay(saves=(2, 4)), (kept(4),)) == []
    assert judged(folder, replay(saves=(2, 4)), replay(saves=(3, 6)), (kept(7),)) == []
    assert judged(folder, replay(), replay(), (kept(7),)) == []  # a path that the replay never saves is not judged


def test_a_file_seen_before_its_step_was_told_is_not_of_another_step() -> None:
    """On a busy machine steps are told late: a file seen after step 5 may be that of step 7, not 9."""
    late = msgspec.structs.replace(kept(5), until=7)
    assert judged(Path("/run"), replay(saves=(7,)), replay(saves=(7,)), (late,)) == []
    assert judged(Path("/run"), replay(saves=(9,)), replay(saves=(9,)), (late,))


def test_only_small_texts_that_the_replay_wrote_are_taken(tmp_path: Path) -> None:
    """No links, no models, nothing from before, nothing large."""
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.bin").write_text("{}")
    (tmp_path / "c.csv").write_text("1" * (65 << 10))
    (tmp_path / "d.log").symlink_to("/etc/hostname")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe")
    assert written_texts(tmp_path, 0) == {"a.json": "{}"}
    assert written_texts(tmp_path, 1 << 62) == {}
