"""Tasks: an id by content, a strict reader on either side, and nothing done twice."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trainguard.digest import sha256_hex
from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.replay.tasks import (
    Desk,
    NotPerformed,
    Outcome,
    Place,
    Task,
    outcome_path,
    parse_outcome,
    parse_task,
    perform,
    write_outcome,
)
from trainguard.replay.worker import main

PLACE = Place(host="h", python="/p/bin/python")


def task(**changed: Any) -> Task:
    told = {"run": "r", "command": ("python", "train.py"), "cwd": "/job", "state": "/state", "began": "1"}
    return Task(**(told | {"environment": {}, "key": "00", "until": 5} | changed))  # type: ignore[arg-type]


class Engine:
    """Performs by saying where it was; counts what it was asked."""

    name = "engine"

    def __init__(self, *, ahead: bool = True, leaves: bool = True) -> None:
        self.ahead = ahead
        self.leaves = leaves
        self.asked: list[list[str]] = []

    def perform(self, tasks: Sequence[Task], folder: Path) -> None:
        self.asked.append([each.until for each in tasks])  # type: ignore[misc]
        for each in tasks if self.leaves else ():
            write_outcome(outcome_path(folder, each), Outcome(task=each.id, place=PLACE, measurement="{}"))


def test_an_id_is_by_content() -> None:
    """The same task has the same id; anything that decides its outcome makes another."""
    assert task().id == task().id == parse_task(msgspec.json.encode(task())).id
    others = [
        task(until=6),
        task(numeric={"OMP_NUM_THREADS": "2"}),
        task(command=("python3", "train.py")),
        task(plant=3),
    ]
    assert len({each.id for each in (task(), *others)}) == 5


def test_a_task_tells_nothing_of_how_it_must_come_out() -> None:
    """No fingerprint of the run's crosses over: who performs it cannot answer with what is expected."""
    assert not {"weights", "steps", "frames", "states", "expected"} & set(Task.__struct_fields__)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", msgspec.json.encode(task(version=2)), msgspec.json.encode(task(began="x"))]
)
def test_what_is_no_task_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedEvidence, match="task: "):
        parse_task(data)


def test_an_unknown_field_is_refused() -> None:
    """What a worker does not understand it must not pass over."""
    value = msgspec.to_builtins(task()) | {"shell": "x"}
    with pytest.raises(MalformedEvidence, match="shell"):
        parse_task(msgspec.json.encode(value))


def test_the_outcome_of_another_task_is_refused() -> None:
    """Outcomes cannot be swapped between tasks."""
    data = msgspec.json.encode(Outcome(task=task(until=4).id, place=PLACE))
    with pytest.raises(MalformedEvidence, match="expected the outcome of task"):
        parse_outcome(data, task().id)


def test_the_desk_asks_once_also_when_it_is_opened_again(tmp_path: Path) -> None:
    """What came back is kept by content, with the digest of the place's measurement."""
    engine, blobs = Engine(), []

    def store(data: bytes) -> str:
        blobs.append(data)
        return sha256_hex(data)

    desk = Desk(tmp_path, engine, store)
    desk.expect([task(), task(until=7)])
    assert desk.outcome(task()).task == task().id
    assert Desk(tmp_path, engine, store).outcome(task(until=7)).task == task(until=7).id
    assert engine.asked == [[5, 7]]
    assert desk.places[task().id] == (PLACE, sha256_hex(b"{}"), None)


def test_the_desk_hands_out_one_by_one_where_together_is_of_no_use(tmp_path: Path) -> None:
    engine = Engine(ahead=False)
    desk = Desk(tmp_path, engine, sha256_hex)
    desk.expect([task(), task(until=7)])
    assert engine.asked == []
    desk.outcome(task())
    assert engine.asked == [[5]]


def test_an_engine_that_leaves_nothing_is_no_word_on_the_run(tmp_path: Path) -> None:
    """It is said which engine, and the audit can go on later."""
    with pytest.raises(NotPerformed, match="executor engine left no outcome"):
        Desk(tmp_path, Engine(leaves=False), sha256_hex).outcome(task())


def test_a_forged_outcome_file_is_not_taken(tmp_path: Path) -> None:
    """A file that is not the outcome of this task, whatever its name."""
    outcome_path(tmp_path, task()).write_bytes(msgspec.json.encode(Outcome(task="0" * 32, place=PLACE)))
    with pytest.raises(NotPerformed, match="expected the outcome of task"):
        Desk(tmp_path, Engine(), sha256_hex).outcome(task())


def test_frames_are_heard_as_they_were_where_it_ran() -> None:
    """The auditor's account is made from frames by the same reader, bounds included."""
    vector = base64.b64encode(b"\1\0\0\0").decode()
    commits = {"rng": ["t"], "modes": "m", "groups": "g", "weights": vector, "build": {"torch": "2"}}
    frames = ((0, "step", 1, {"opt": 0, "index": 1, "commits": commits}), (0, "replay", 1, {"stopped": 1}))
    facts = {"status": 0, "left_out": ["a"], "tape": "not one of them"}
    found = Outcome(task="x", place=PLACE, frames=frames, facts=facts, states={"0/1": {"param/0/w": "d"}}).rerun()
    assert found.reached == 1
    assert found.account.build == {"torch": "2"}
    assert (found.left_out, found.states, found.tape) == (["a"], {(0, 1): {"param/0/w": "d"}}, [])
    bad = Outcome(task="x", place=PLACE, frames=((0, "step", 1, {"opt": 0, "commits": {"rng": 5}}),)).rerun()
    assert bad.malformed is not None
    with pytest.raises(Unavailable, match="nothing there"):
        Outcome(task="x", place=PLACE, unavailable="nothing there").rerun()


def test_another_script_on_the_machine_that_replays_is_said(tmp_path: Path) -> None:
    """A node that sees another file under the same path proves nothing."""
    script = tmp_path / "train.py"
    script.write_text("pass\n")
    told = perform(task(cwd=str(tmp_path), inputs={str(script): "0" * 64}), root=tmp_path)
    assert told.unavailable is not None
    assert "train.py is another file there" in told.unavailable
    gone = perform(task(cwd=str(tmp_path / "none")), root=tmp_path)
    assert gone.unavailable is not None


def test_the_worker_leaves_an_outcome_or_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0 with an outcome, also one of a task that could not be done; 2 for what is no task."""
    given, wanted = tmp_path / "t", tmp_path / "o"
    given.write_bytes(msgspec.json.encode(task(cwd=str(tmp_path / "none"))))
    assert main([str(given), str(wanted)]) == 0
    assert parse_outcome(wanted.read_bytes(), task(cwd=str(tmp_path / "none")).id).unavailable
    given.write_bytes(b"{")
    assert main([str(given), str(tmp_path / "p")]) == 2
    assert main([]) == 2
    assert not (tmp_path / "p").exists()
    assert "task: not as specified" in capsys.readouterr().err
