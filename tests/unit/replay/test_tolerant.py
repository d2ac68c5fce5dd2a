"""A segment on another build, end to end over made-up replays: within, beyond, or could not tell."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trainguard.digest import file_sha256, sha256_hex
from trainguard.home import Home
from trainguard.replay import numerics
from trainguard.replay.committed import Account, Committed, Point
from trainguard.replay.plan import Segment
from trainguard.replay.points import seal_point
from trainguard.replay.rerun import Rerun
from trainguard.replay.tasks import Task
from trainguard.replay.tolerance import Calibration, Variation
from trainguard.replay.tolerant import Told, Tolerant

BUILD = {"torch": "2", "capability": "AVX2", "mkldnn": True, "devices": [], "threads": 1, "deterministic": False}
SEGMENT = Segment(number=1, first=11, last=20)
NUMBER = base64.b64encode(struct.pack("<I", 1)).decode()


def account(lr: float = 0.1, *, cpu: str = "here", rng: str = "t") -> Account:
    """Twenty steps: streams, settings and one vector."""
    taken = Account()
    for number in range(1, 21):
        value: dict[str, Any] = {"rng": [rng], "modes": "m", "groups": f"g{lr}", "weights": NUMBER}
        if number == 1:
            value |= {"build": BUILD | {"cpu": cpu}, "tensors": ["w"], "hyper": {"0": {"lr": lr}}}
        taken.take(number, {"opt": 0, "index": number, "commits": value})
    return taken


class Stand:
    """A run with sealed states after steps 10 and 20, and replays that answer as told."""

    def __init__(self, folder: Path, *, run: Account) -> None:
        self.home = Home(folder / "home")
        self.points = [self._point(step) for step in (10, 20)]
        self.committed = Committed(
            run="r", start={}, key=None, account=run, points=tuple(self.points), process=0, alarms=(), last=20
        )
        self.asked: list[Task] = []
        self.answers: Callable[[Task], float] = lambda _task: 0.0
        self.account = account()
        self.folder = folder

    def _point(self, step: int) -> Point:
        name = f"p0-step-{step:08d}"
        folder = self.home.root / "runs" / "r" / "points" / name
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(bytes(64))
        index = {"version": 1, "step": step, "tensors": [["param/0/w", "float32", [4], 0, 16]]}
        (folder / "index.json").write_text(json.dumps(index))
        return msgspec.convert({**seal_point(folder), "step": step}, Point)

    def calibrated(self) -> None:
        told = {"transformer": {"1": 1e-7, "10": 1e-6}}
        variation = Variation(
            name="2", kind="threads", settings={"OMP_NUM_THREADS": "2"}, changes=True, weights=told, gradients=told
        )
        machine = {"cpu": "here", "torch": "2"}
        numerics.store(self.home, Calibration(machine=machine, made="2026", steps=(1, 10), variations=(variation,)))

    def rerun(self, task: Task) -> Rerun:
        self.asked.append(task)
        found = Rerun(account=self.account, accounts={0: self.account}, landed=True, trained=1)
        found.distances = {(0, 20): {"param/0/w": (self.answers(task), 1.0, 1.0)}}
        return found

    def told(self) -> Told:
        def task(segment: Segment) -> Task:
            return Task(
                run="r", command=("python", "t.py"), cwd="/job", state=str(self.home.root), began="1", environment={},
                key="00", begin=10, until=segment.last, points=(self.points[0],),
            )  # fmt: skip

        self.tolerant = Tolerant(
            self.home, "r", self.committed, self.folder / "states", task=task, rerun=self.rerun,
            unfinished=lambda _found, _last: None, store=sha256_hex,
        )  # fmt: skip
        return self.tolerant.segment(SEGMENT, ("threads",))


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    made = Stand(tmp_path, run=account(cpu="there"))
    made.calibrated()
    return made


def answers(run: float, *, planted: float = 0.2, spread: float = 1e-6) -> Callable[[Task], float]:
    """How far the first replay lies from the run, the planted one from the first, and variations from the first."""
    return lambda task: planted if task.plant else spread if task.numeric else run


def test_an_honest_segment_is_within_its_class(stand: Stand) -> None:
    """One replay, and one with our own planted fault, which is beyond."""
    stand.answers = answers(2e-6)
    told = stand.told()
    assert told.outcome == "within"
    assert told.reading is not None
    assert told.reading.by == "class"
    assert [task.plant for task in stand.asked] == [None, 20]
    assert stand.tolerant.calibration is not None
    assert not (stand.folder / "states").exists()


def test_a_tampered_segment_is_beyond_it_and_beyond_the_jobs_own_spread(stand: Stand) -> None:
    stand.answers = answers(1e-3)
    told = stand.told()
    assert told.outcome == "beyond"
    assert told.reading is not None
    assert (told.reading.by, told.reading.tensor) == ("own spread", "param/0/w")
    assert [task.numeric for task in stand.asked] == [{}, {"OMP_NUM_THREADS": "2"}, {}]


def test_a_job_whose_own_replays_part_as_far_is_not_accused(stand: Stand) -> None:
    """Its own spread is asked where the class does not do."""
    stand.answers = answers(1e-3, spread=1e-3)
    told = stand.told()
    assert told.outcome == "within"
    assert told.reading is not None
    assert told.reading.by == "own spread"
    assert told.reading.undetectable > 0.01


def test_a_tolerance_that_hides_everything_tells_nothing(stand: Stand) -> None:
    """A job whose replays part by a tenth of its movement: could not tell."""
    stand.answers = answers(0.1, spread=0.1)
    told = stand.told()
    assert told.outcome == "not told"
    assert "too wide to mean anything" in str(told.reason)


def test_a_tolerance_that_would_hide_our_own_fault_tells_nothing(stand: Stand) -> None:
    """The verifier proves itself in tolerance too."""
    stand.answers = answers(1e-6, planted=1e-6)
    told = stand.told()
    assert told.outcome == "not told"
    assert "a gradient's sign turned in one step on our own side" in str(told.reason)


def test_without_a_calibration_it_could_not_tell(tmp_path: Path) -> None:
    """And it is said what to run, and where."""
    stand = Stand(tmp_path, run=account(cpu="there"))
    stand.answers = answers(0.2)
    told = stand.told()
    assert told.outcome == "not told"
    assert "is not calibrated" in str(told.reason)
    assert "trainguard doctor --numerics" in str(told.reason)


def test_an_altered_calibration_is_not_used(stand: Stand) -> None:
    """A wider class would hide an act: the file is signed."""
    path = numerics.path_of(stand.home, {"cpu": "here", "torch": "2"})
    path.write_text(path.read_text().replace("1e-6", "1e-1").replace("1e-06", "1e-1"))
    stand.answers = answers(0.01)
    told = stand.told()
    assert told.outcome == "not told"
    assert "altered since it was signed" in str(told.reason)


def test_a_calibration_of_another_machine_is_not_used(stand: Stand) -> None:
    """Copied under this machine's name."""
    here = numerics.path_of(stand.home, {"cpu": "here", "torch": "2"})
    there = numerics.path_of(stand.home, {"cpu": "elsewhere", "torch": "2"})
    there.write_bytes(here.read_bytes())
    stand.account = account(cpu="elsewhere")
    told = stand.told()
    assert told.outcome == "not told"
    assert "the calibration of another machine" in str(told.reason)


def test_settings_are_compared_exactly_on_every_build(stand: Stand) -> None:
    """A learning rate one per cent higher is in no arithmetic, however small its effect."""
    stand.committed = msgspec.structs.replace(stand.committed, account=account(0.101, cpu="there"))
    stand.answers = answers(0.0)
    told = stand.told()
    assert told.outcome == "beyond"
    assert told.difference is not None
    assert (told.difference.link, told.difference.setting) == ("groups", "lr of group 0")


def test_the_last_bits_of_a_schedule_are_no_difference(stand: Stand) -> None:
    """Another C library's cosine."""
    stand.committed = msgspec.structs.replace(stand.committed, account=account(0.1 * (1 + 1e-15), cpu="there"))
    stand.answers = answers(1e-6)
    assert stand.told().outcome == "within"


def test_a_stream_that_hangs_on_the_machine_is_not_told(stand: Stand) -> None:
    """Two clean replays under different arithmetic draw differently: nothing follows."""
    stand.committed = msgspec.structs.replace(stand.committed, account=account(cpu="there", rng="other"))
    plain = stand.rerun

    def rerun(task: Task) -> Rerun:
        found = plain(task)
        if task.numeric:
            found.accounts = {0: account(rng="third")}
        return found

    stand.rerun = rerun  # type: ignore[method-assign]
    told = stand.told()
    assert told.outcome == "not told"
    assert "depends on the arithmetic of the machine" in str(told.reason)


def test_without_a_sealed_end_there_is_nothing_to_compare_by_size(stand: Stand) -> None:
    stand.committed = msgspec.structs.replace(stand.committed, points=(stand.points[0],))
    told = stand.told()
    assert told.outcome == "not told"
    assert "no sealed state after step 20" in str(told.reason)


def test_an_altered_end_is_not_compared_with(stand: Stand) -> None:
    folder = stand.home.root / "runs" / "r" / "points" / stand.points[1].name
    (folder / "data").write_bytes(bytes(63) + b"\1")
    assert file_sha256(folder / "data")
    told = stand.told()
    assert told.outcome == "not told"
    assert "altered after it was sealed" in str(told.reason)
