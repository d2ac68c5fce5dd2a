"""The newest checkpoint that is good in itself and in all it came from; what is set aside is moved, never deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.family import Family, finding

from trainguard.errors import Misuse
from trainguard.home import Home
from trainguard.incident.recover import NOTE, compare_ends, plan_recovery, quarantine, shell


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    family = Family(Home(tmp_path / "home"), tmp_path / "models")
    family.judged(monkeypatch)
    return family


SAVES = {3: "a-3.pt", 5: "a-5.pt", 8: "a-8.pt", 10: "a-10.pt"}


def test_the_last_one_before_the_first_bad_step_is_chosen(made: Family) -> None:
    made.run("a", finding(6), finding(9), saves=SAVES)
    plan = plan_recovery(made.home, "a")
    assert (plan.verdict, plan.first_bad_step, plan.exit_status) == ("TAINTED", 6, 0)
    assert plan.checkpoint is not None
    assert (plan.checkpoint.step, Path(plan.checkpoint.place).name) == (5, "a-5.pt")
    assert [candidate.step for candidate in plan.later] == [8, 10]


def test_a_checkpoint_of_the_bad_step_itself_is_not_good(made: Family) -> None:
    made.run("a", finding(5), saves=SAVES)
    plan = plan_recovery(made.home, "a")
    assert plan.checkpoint is not None
    assert plan.checkpoint.step == 3


def test_an_edited_or_missing_checkpoint_is_passed_over_with_the_reason(made: Family) -> None:
    three, five, *_ = made.run("a", finding(6), saves=SAVES)
    five.write_text("edited")
    plan = plan_recovery(made.home, "a")
    assert plan.checkpoint is not None
    assert plan.checkpoint.step == 3
    (passed,) = plan.passed_over
    assert (passed.step, passed.intact) == (5, "no")
    assert passed.why
    three.unlink()
    plan = plan_recovery(made.home, "a")
    assert plan.checkpoint is None
    assert plan.exit_status == 3
    assert {(each.step, each.intact) for each in plan.passed_over} == {(3, "gone"), (5, "no")}


def test_a_finding_without_a_step_spoils_the_whole_run(made: Family) -> None:
    made.run("a", finding(None), saves=SAVES)
    plan = plan_recovery(made.home, "a")
    assert (plan.checkpoint, plan.first_bad_step) == (None, None)
    assert [candidate.step for candidate in plan.later] == [3, 5, 8, 10]


def test_a_run_made_from_a_tainted_base_has_nothing_to_go_on_from(made: Family) -> None:
    (bad,) = made.run("bad", finding(1), saves={10: "bad.pt"})
    made.run("child", opens=[bad], saves={10: "child.pt"})
    plan = plan_recovery(made.home, "child")
    assert plan.checkpoint is None
    assert "bad.pt" in plan.later[0].why


def test_a_place_that_was_written_over_counts_with_its_last_content(made: Family) -> None:
    made.run("a", finding(6))
    made.save("a", 5, "latest.pt", "five")
    made.save("a", 8, "latest.pt", "eight")
    plan = plan_recovery(made.home, "a")
    assert plan.checkpoint is None
    assert [candidate.step for candidate in plan.later] == [8]


def test_the_command_is_one_that_was_seen_to_resume_from_that_folder(made: Family) -> None:
    five, *_ = made.run("a", finding(6), saves={5: "a-5.pt", 10: "a-10.pt"}, command=("python", "train.py"))
    plan = plan_recovery(made.home, "a")
    assert plan.command == ("python", "train.py")
    assert "add how" in plan.command_from
    other = made.folder / "a-4.pt"
    made.save("a", 4, "a-4.pt")
    made.run("b", opens=[other], command=("python", "train.py", "--resume", "a-4.pt"))
    plan = plan_recovery(made.home, "a")
    assert plan.command == ("python", "train.py", "--resume", str(five))
    assert shell(plan.command).endswith(str(five))


def test_what_is_set_aside_is_moved_with_a_note_and_nothing_is_overwritten(made: Family) -> None:
    made.run("a", finding(6), saves=SAVES)
    plan = plan_recovery(made.home, "a")
    moved = quarantine(plan)
    folder = made.folder / "quarantine" / "a"
    assert sorted(path.name for path in folder.iterdir()) == [NOTE, "a-10.pt", "a-8.pt"]
    assert [Path(each.place).name for each in moved] == ["a-8.pt", "a-10.pt"]
    notes = [json.loads(line) for line in (folder / NOTE).read_text().splitlines()]
    assert [(note["step"], note["verdict"]) for note in notes] == [(8, "TAINTED"), (10, "TAINTED")]
    assert quarantine(plan) == (), "again: nothing is left to move"
    (made.folder / "a-8.pt").write_text("written anew")
    quarantine(plan)
    assert (folder / "a-8.pt").read_text() == "a 8"
    assert (folder / "a-8.pt.1").read_text() == "written anew"
    assert (made.folder / "a-5.pt").exists()


def test_two_ends_are_compared_by_tensors_and_differences_are_named(made: Family) -> None:
    import struct

    def tensors(values: dict[str, float]) -> bytes:
        """A safetensors file of one float each (format 0.4: length, JSON header, bytes)."""
        entries = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(values)
        }
        header = json.dumps(entries).encode()
        return struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}f", *values.values())

    from trainguard.seal.write import seal_path

    for run, values in (
        ("one", {"w": 1.0, "b": 2.0}),
        ("same", {"w": 1.0, "b": 2.0}),
        ("other", {"w": 1.0, "b": 2.5}),
    ):
        made.run(run)
        path = made.folder / run / "model.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(tensors(values))
        seal_path(made.home, path, run=run, step=10, source="run")
    same, other = compare_ends(made.home, "one", "same"), compare_ends(made.home, "one", "other")
    assert (same.equal, same.exit_status, same.tensors) == (True, 0, 2)
    assert (other.differing, other.exit_status) == (("b",), 1)


def test_a_run_that_saved_nothing_or_is_not_known_is_said(made: Family) -> None:
    made.run("a")
    with pytest.raises(Misuse, match="nothing it saved was sealed"):
        plan_recovery(made.home, "a")
    with pytest.raises(Misuse, match="no statement of this run"):
        plan_recovery(made.home, "b")
