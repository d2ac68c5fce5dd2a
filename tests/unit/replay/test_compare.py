"""Two accounts of the same steps: the first step, link and tensor in which they part."""

from __future__ import annotations

import base64
import struct
from typing import Any

import msgspec
import pytest

from trainguard.errors import MalformedEvidence
from trainguard.replay.committed import Account
from trainguard.replay.compare import first_difference, idle, incomparable

BUILD = {"torch": "2", "capability": "X", "mkldnn": True, "devices": [], "threads": 1, "deterministic": False}


def vector(*numbers: int) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}I", *numbers)).decode()


def frame(number: int, **changed: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "rng": [f"t{number}", "n", "p"],
        "modes": "m",
        "groups": "g",
        "before": vector(number, number + 1),
        "raw": vector(1, 2),
        "used": vector(3, 4),
        "state": vector(5, 6),
        "weights": vector(number + 1, number + 2),
    }
    if number == 1:
        value |= {"build": BUILD, "tensors": ["a", "b"], "hyper": {"0": {"lr": 0.1, "momentum": 0.9}}}
    value |= {name: item for name, item in changed.items() if item is not None}
    for name in [name for name, item in changed.items() if item is None]:
        value.pop(name, None)
    return {"opt": 0, "index": number, "commits": value}


def account(steps: int = 5, **at: dict[str, Any]) -> Account:
    """An account of `steps` steps; `at` gives changes as s3={"used": …}."""
    taken = Account()
    for number in range(1, steps + 1):
        taken.take(number, frame(number, **at.get(f"s{number}", {})))
    return taken


def test_equal_accounts_have_no_difference() -> None:
    """Every step that both have is compared."""
    assert first_difference(account(), account(), first=1, last=5) == (None, 5)


def test_the_first_tensor_that_differs_is_named() -> None:
    """Step, link and tensor, how many tensors differ, and which side had what."""
    found, compared = first_difference(account(s3={"used": vector(3, 9)}), account(), first=1, last=5)
    assert found is not None
    assert (found.step, found.link, found.tensor, found.tensors, found.of) == (3, "used", "b", 1, 2)
    assert (found.expected, found.found, found.since) == ("00000004", "00000009", 2)
    assert compared == 3


def test_links_of_one_step_are_compared_in_causal_order() -> None:
    """Where the gradient and what follows from it differ, the gradient is the first."""
    bad = {"weights": vector(0, 0), "state": vector(0, 0), "raw": vector(9, 9), "used": vector(9, 9)}
    found, _ = first_difference(account(s2=bad), account(), first=1, last=5)
    assert found is not None
    assert found.link == "raw"


def test_a_setting_is_named_with_both_values() -> None:
    """The learning rate of group 0 was another one in step 4."""
    run = account(s4={"groups": "other", "changed": [["0", "lr", 0.105]]})
    found, _ = first_difference(run, account(), first=1, last=5)
    assert found is not None
    assert (found.step, found.link, found.setting, found.expected, found.found) == (
        4, "groups", "lr of group 0", "0.1", "0.105",
    )  # fmt: skip


def test_what_a_lean_step_leaves_out_is_not_a_difference() -> None:
    """A step that could afford only weights is compared by those, and the step before bounds the act."""
    run = account(s3={"used": None, "raw": None, "state": None, "lean": True}, s4={"used": vector(0, 0)})
    found, _ = first_difference(run, account(), first=1, last=5)
    assert found is not None
    assert (found.step, found.link, found.since) == (4, "used", 2)


def test_a_stream_that_nobody_seeded_proves_nothing() -> None:
    """numpy's stream differs from the first step on: it is left out; torch's never is."""
    run, clean = account(), account()
    for number, step in run.steps.items():
        run.steps[number] = msgspec.structs.replace(step, rng=(f"t{number}", "other", "p"))
    assert idle(run, clean) == {1}
    assert first_difference(run, clean, first=1, last=5, idle_streams=idle(run, clean)) == (None, 5)
    run.steps[1] = msgspec.structs.replace(run.steps[1], rng=("other", "other", "p"))
    found, _ = first_difference(run, clean, first=1, last=5, idle_streams=idle(run, clean))
    assert found is not None
    assert (found.step, found.link, found.setting) == (1, "rng", "torch")


@pytest.mark.parametrize("name", ["torch", "capability", "threads", "devices"])
def test_another_build_is_not_comparable(name: str) -> None:
    """Bits are only expected to be equal on the same build; the reason names what is another."""
    assert incomparable(BUILD, BUILD) is None
    assert str(incomparable(BUILD, BUILD | {name: "other"})).startswith(f"{name}: ")
    assert incomparable(None, BUILD) is not None


@pytest.mark.parametrize(
    "commits",
    [
        {"rng": 5},
        {},
        {"rng": [], "used": "!!!"},
        {"rng": [], "used": base64.b64encode(b"abc").decode()},
        {"rng": [], "changed": [["0"]]},
    ],
)
def test_commits_that_are_not_as_specified_are_refused(commits: dict[str, Any]) -> None:
    """A frame is an attacker's: it is parsed strictly, with one typed error."""
    with pytest.raises(MalformedEvidence, match="step 1: commits are not as specified"):
        Account().take(1, {"opt": 0, "commits": commits})


@pytest.mark.parametrize("number", [None, 0, -1, 1 << 60, "1"])
def test_a_step_number_that_cannot_be_is_refused(number: Any) -> None:
    """Steps count from 1."""
    with pytest.raises(MalformedEvidence, match="expected a step number"):
        Account().take(number, frame(1))
