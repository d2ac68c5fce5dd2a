"""Two runs side by side: equal ones are equal, different ones part at the step and layer where they were made to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import told

from trainguard.appraise.difference import Comparison, compare_runs
from trainguard.home import Home
from trainguard.lockfile import Code, Interpreter, Launch, Measurement, Tree

STEPS = 12


def measurement(**files: str) -> Measurement:
    """A job of a few files."""
    listed = {f"{name}.py": f"{digest * 32} 10" for name, digest in (files or {"train": "aa"}).items()}
    return Measurement(
        cwd="/home/u",
        launch=Launch(argv=("python", "train.py"), kind="script", script="train.py"),
        interpreter=Interpreter(
            executable="/usr/bin/python3",
            version="3.11.7",
            implementation="cpython",
            cache_tag="cpython-311",
            prefix="/usr",
            base_prefix="/usr",
            path=(),
            user_site=False,
        ),
        code=Code(root="/home/u"),
        trees={"code": Tree(name="code", root="/home/u", files=listed)},
        distributions={},
    )


def frames(change: Callable[[int, dict[str, Any]], None] = lambda _n, _links: None) -> list[told.Told]:
    """Steps with a schedule, a moving torch stream, a numpy stream that nobody uses and a gradient norm."""
    listed = []
    for number in range(1, STEPS + 1):
        rate = 0.1 - 0.001 * number
        links: dict[str, Any] = {
            "rng": {"torch": f"{number:016x}", "numpy": "5eed"} | ({"seed": 7} if number == 1 else {}),
            "gradients": {"norm": 1.0 / number},
            "hyperparameters": {"groups": [{"lr": rate, "eps": 1e-8}]}
            if number == 1
            else {"changed": [[0, "lr", rate]]},
            "weights": {"after": f"w{number}"},
        }
        change(number, links)
        listed.append(told.step(number, **links))
    return listed


def store(home: Home, run: str, steps: list[told.Told], made_of: Measurement | None = None, **start: Any) -> None:
    home.prepare()
    blob = home.store_blob((made_of or measurement()).encode())
    measured = ("measurement", {"blob": blob, "lock": None, "attempt": 0}, {})
    key = {"key": start.pop("key", run)}
    told.record(home, run, [told.start(**start), measured, told.process(), *steps, *told.leave(), told.end(**key)])


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def compared(home: Home, steps: list[told.Told], made_of: Measurement | None = None, **start: Any) -> Comparison:
    """The usual run against one with `steps`."""
    store(home, "a", frames())
    store(home, "b", steps, made_of, **start)
    return compare_runs(home, "a", "b")


def test_two_runs_that_did_the_same_are_equal(home: Home):
    """Another run id, other times, other secret places: nothing of it is a difference."""
    comparison = compared(home, frames())
    assert comparison.equal is True
    assert comparison.exit_status == 0
    assert comparison.differences == ()
    assert comparison.steps_compared == STEPS
    assert any("secret places" in note for note in comparison.notes)


def at_step(step: int, link: str, name: str, value: Any) -> Callable[[int, dict[str, Any]], None]:
    def change(number: int, links: dict[str, Any]) -> None:
        if number >= step:
            links[link][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "layer", "step"),
    [
        (at_step(5, "rng", "torch", "ffff"), "rng", 5),
        (at_step(7, "gradients", "norm", 3.5), "gradients", 7),
        (at_step(4, "hyperparameters", "changed", [[0, "lr", 0.07]]), "hyperparameters", 4),
    ],
)
def test_runs_part_at_the_step_and_in_the_layer_where_one_was_changed(
    home: Home, change: Callable[[int, dict[str, Any]], None], layer: str, step: int
):
    """Random stream, gradient, learning rate: each is named, with the sentence that says where to look."""
    comparison = compared(home, frames(change))
    assert comparison.equal is False
    assert comparison.likeliest == layer
    assert [d.step for d in comparison.differences if d.layer == layer] == [step]
    assert f"step {step}" in comparison.sentence


def test_the_earliest_step_decides_and_its_consequences_do_not(home: Home):
    """A rate changed at step 3 moves gradients from step 4 on; the rate is the likeliest cause."""

    def change(number: int, links: dict[str, Any]) -> None:
        if number == 3:
            links["hyperparameters"] = {"changed": [[0, "lr", 0.05]]}
        if number >= 4:
            links["gradients"]["norm"] = 9.0 / number

    comparison = compared(home, frames(change))
    assert comparison.likeliest == "hyperparameters"
    assert {d.layer: d.step for d in comparison.differences} == {"hyperparameters": 3, "gradients": 4}


def test_different_code_comes_before_any_step(home: Home):
    """Files are named with both digests; what happened later is told as its first effect."""
    comparison = compared(home, frames(at_step(2, "gradients", "norm", 9.0)), measurement(train="bb"))
    assert comparison.likeliest == "environment"
    (difference,) = [d for d in comparison.differences if d.layer == "environment"]
    assert difference.what == "train.py"
    assert re.match("bb", difference.second or "")
    assert "gradient norm at step 2" in comparison.sentence


def test_another_seed_is_named_as_such(home: Home):
    """Streams that part at step 1 because they were seeded otherwise."""

    def change(number: int, links: dict[str, Any]) -> None:
        links["rng"]["torch"] = f"{number + 100:016x}"
        if number == 1:
            links["rng"]["seed"] = 8

    comparison = compared(home, frames(change))
    assert comparison.likeliest == "seeds"
    assert ("7", "8") in [(d.first, d.second) for d in comparison.differences]


def test_a_stream_nobody_seeded_and_nobody_used_is_no_difference(home: Home):
    """NumPy seeds itself from the machine at import: it differs in honest runs, and is said, not counted."""
    comparison = compared(home, frames(at_step(1, "rng", "numpy", "0ther")))
    assert comparison.equal is True
    assert any(note.startswith("rng numpy: never seeded") for note in comparison.notes)


def test_a_stream_that_moves_is_compared(home: Home):
    """The same stream counts as soon as something draws from it."""

    def change(number: int, links: dict[str, Any]) -> None:
        links["rng"]["numpy"] = f"moved {number}"

    comparison = compared(home, frames(change))
    assert comparison.likeliest == "rng"


@pytest.mark.parametrize(("keys", "equal"), [(("k", "k"), False), (("k", "l"), True)])
def test_sampled_weights_are_compared_only_where_both_drew_the_same_places(
    home: Home, keys: tuple[str, str], equal: bool
):
    """A digest of other elements says nothing."""
    store(home, "a", frames(), key=keys[0])
    store(home, "b", frames(at_step(6, "weights", "after", "other")), key=keys[1])
    comparison = compare_runs(home, "a", "b")
    assert comparison.equal is equal
    assert comparison.likeliest == (None if equal else "weights")


def test_a_run_that_stopped_early_is_different(home: Home):
    """Equal as far as both went is not equal."""
    comparison = compared(home, frames()[:9])
    assert comparison.equal is False
    assert comparison.likeliest == "end"


def test_another_command_is_told_first(home: Home):
    """They were never meant to be equal."""
    comparison = compared(home, frames(), command=["python", "train.py", "--lr", "1"])
    assert comparison.likeliest == "command"


def test_without_steps_or_a_measurement_nothing_is_called_equal(home: Home):
    """Too little recorded is said, with exit status 3."""
    told.record(home, "a", [told.start(), told.process(), *told.leave(), told.end()])
    comparison = compare_runs(home, "a", "a")
    assert comparison.equal is None
    assert comparison.exit_status == 3
    assert any("not measured" in note for note in comparison.notes)


def test_an_edited_record_is_not_called_equal(home: Home):
    """What does not verify is not compared further, and equality is not claimed."""
    store(home, "a", frames())
    store(home, "b", frames())
    spool = told.spool(home, "b")
    data = bytearray(spool.read_bytes())
    data[-300] ^= 1
    spool.write_bytes(data)
    comparison = compare_runs(home, "a", "b")
    assert comparison.equal is not True
    assert any("not the ones that were sealed" in note for note in comparison.notes)
