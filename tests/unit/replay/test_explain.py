"""Estimating a number from recorded values, and what a search says when nothing gives the recorded bytes."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from trainguard.errors import MalformedEvidence
from trainguard.replay.causes import Scalar
from trainguard.replay.committed import Account
from trainguard.replay.explain import Search, fit, rounded


def vector(*numbers: int) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}I", *numbers)).decode()


def lanes(*numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def account(**changed: Any) -> Account:
    taken = Account()
    for number in (1, 2, 3):
        value: dict[str, Any] = {"rng": [f"t{number}", None, None], "modes": "m", "groups": "g", "tensors": ["a", "b"]}
        value |= {"raw": vector(1, 2), "used": vector(3, 4), "weights": vector(5, 6)}
        value |= changed if number == 3 else {}
        taken.take(number, {"opt": 0, "index": number, "commits": value})
    return taken


class Trial:
    def __init__(self, account: Account, failure: str = "") -> None:
        self.account, self.failure, self.facts = account, failure, {}


class Bench:
    """Gives the clean step for no act, and `made(acts)` for others."""

    step = 3

    def __init__(self, made: Any = None) -> None:
        self.made = made
        self.tried: list[Sequence[Mapping[str, Any]]] = []

    def attempt(self, acts: Sequence[Mapping[str, Any]], until: int) -> Trial:
        self.tried.append(acts)
        return Trial(account()) if not acts or self.made is None else self.made(acts)

    def ask(self, what: str, **details: Any) -> Any:
        return []


def search(bad: Account) -> Search:
    return Search(bad, account(), frozenset())


def test_what_gives_the_recorded_bytes_is_the_cause() -> None:
    """Only the act that turns the sign gives them; it is named, with what else would."""

    def made(acts: Sequence[Mapping[str, Any]]) -> Trial:
        hit = any(act.get("op") == "negate" for act in acts)
        return Trial(account(used=vector(9, 9), weights=vector(7, 7)) if hit else account(used=vector(1, 1)))

    cause = search(account(used=vector(9, 9), weights=vector(7, 7))).at(Bench(made), 3)
    assert (cause.kind, cause.confidence, cause.step) == ("gradient sign", "reproduced", 3)
    assert cause.techniques == ("C1",)


def test_where_only_one_link_is_alike_nothing_is_said() -> None:
    """A hypothesis that gives the gradient but not the weights is none."""
    made = lambda acts: Trial(account(used=vector(9, 9)))  # noqa: E731
    cause = search(account(used=vector(9, 9), weights=vector(7, 7))).at(Bench(made), 3)
    assert (cause.kind, cause.confidence) == ("unknown", "none")
    assert "between backward and update" in cause.words


def test_a_process_whose_trials_are_not_its_replay_explains_nothing() -> None:
    """The trial without any act must give what the replay gave."""
    bench = Bench()
    bench.attempt = lambda acts, until: Trial(account(raw=vector(0, 0)))  # type: ignore[method-assign]
    cause = search(account(used=vector(9, 9))).at(bench, 3)
    assert (cause.confidence, cause.tried) == ("none", 1)
    assert "without any act" in cause.reason


def test_trials_that_fail_are_no_answer() -> None:
    """Each ends, and the search goes on to say that it knows no cause."""
    cause = search(account(raw=vector(9, 9))).at(Bench(lambda acts: Trial(account(), "it crashed")), 3)
    assert cause.confidence == "none"


def test_a_search_keeps_to_its_time() -> None:
    """Time is up after the first hypothesis."""
    clock = iter(range(0, 10_000, 60))
    bench = Bench(lambda acts: Trial(account()))
    Search(account(raw=vector(9, 9)), account(), frozenset(), seconds=100, clock=lambda: float(next(clock))).at(
        bench, 3
    )
    assert len(bench.tried) < 5


LINEAR = Scalar(make=lambda x: [], probes=(1.0, 1.25), neutral=1.0)


def test_a_number_is_found_from_two_trials_where_values_are_linear_in_it() -> None:
    """And is rounded to what somebody would have written."""
    estimate, left = fit(lambda x: [0.5 * x, -2.0 * x, 3.0], [0.85, -3.4, 3.0], [1.0, 1.0, 1.0], LINEAR)
    assert estimate == pytest.approx(1.7)
    assert left < 1e-6
    assert rounded(float(estimate or 0), LINEAR)[0] == 1.7


def test_a_number_is_found_where_values_are_not_linear_in_it() -> None:
    """A few more trials."""
    estimate, left = fit(lambda x: [x * x, 1 / x], [1.21, 1 / 1.1], [1.0, 1.0], LINEAR)
    assert estimate == pytest.approx(1.1, rel=1e-4)
    assert left < 1e-3


def test_values_that_no_number_gives_are_left_over() -> None:
    """Other directions stay what they are."""
    _, left = fit(lambda x: [x, 0.0], [1.0, 5.0], [1.0, 1.0], LINEAR)
    assert left > 0.9


def test_a_number_that_moves_nothing_is_no_answer() -> None:
    """No direction, no estimate."""
    assert fit(lambda _x: [1.0], [2.0], [1.0], LINEAR) == (None, 1.0)


@pytest.mark.parametrize(
    ("near", "base", "wanted"), [(0.00315004, 0.003, 0.00315), (0.33333, None, 1 / 3), (1e-12, None, 0.0)]
)
def test_round_numbers_near_an_estimate(near: float, base: float | None, wanted: float) -> None:
    """As it is, as a multiple of the clean value, as an inverse, as nothing."""
    assert wanted in rounded(near, Scalar(make=lambda x: [], probes=(0.0, 1.0), base=base))


def test_what_an_estimate_leaves_over_widens_the_search_for_a_round_number() -> None:
    """A step in 16 bits does not follow its number smoothly: 0.2007 with half a percent left over may be 0.2."""
    smoothing = Scalar(make=lambda x: [], probes=(0.0, 0.1), low=0.0, high=1.0)
    assert 0.2 not in rounded(0.200706, smoothing)
    assert rounded(0.200706, smoothing, 0.005)[0] == 0.2
    assert 0.2 not in rounded(0.21, smoothing, 0.005)


@pytest.mark.parametrize("changed", [
    {"lanes": {"raw": "!!!"}}, {"lanes": {"raw": lanes(*range(65))}}, {"edited": [[0, "x", "1", []]]},
    {"edited": [[0, "1" * 30, "1", []]]}, {"places": [[1, 2]]}, {"edited": [[0]]},
])  # fmt: skip
def test_values_that_are_not_as_specified_are_refused(changed: dict[str, Any]) -> None:
    """Bounded and strictly read, as all a process says."""
    with pytest.raises(MalformedEvidence):
        account(**changed)


def test_values_are_read_as_they_were_said() -> None:
    """Float32 by kind, with the places they are of."""
    taken = account(
        lanes={"raw": lanes(0.5, -1.0)}, places=[[1, 3, 2]], edited=[[1, "18446744073709551615", "", [1.5]]]
    )
    assert taken.steps[3].lanes == {"raw": (0.5, -1.0)}
    assert taken.places == {0: ((1, 3, 2),)}
    assert taken.steps[3].edited == ((1, "18446744073709551615", "", (1.5,)),)
