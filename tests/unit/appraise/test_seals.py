"""What of a run's saves has no seal, and whether that matters."""

from __future__ import annotations

from typing import Any

from trainguard.appraise.interface import Context
from trainguard.appraise.seals import Seals
from trainguard.evidence import Evidence
from trainguard.finding import LinkState
from trainguard.policy import Policy

OVER = "/job/net.pt: changed while it was read"


def balance(*bodies: dict[str, Any]) -> LinkState:
    """Of a run whose supervisor recorded these `seal` records, one after the other."""
    check = Seals(Context(run="r", policy=Policy(), blob={}.__getitem__))
    for n, body in enumerate(bodies):
        assert (
            list(check.see(Evidence(n=n, at=n, source="supervisor", kind="seal", body=body, leaf=1, hash="cc" * 32)))
            == []
        )
    (state,) = check.end()
    return state


def unsealed(path: str, reason: str = OVER) -> dict[str, Any]:
    return {"path": path, "unsealed": reason}


def sealed(path: str) -> dict[str, Any]:
    return {"path": path, "leaf": 7, "findings": [], "prints": None}


def test_a_version_that_was_written_over_does_not_count_once_a_later_one_is_sealed() -> None:
    """A small script that saves its best model every few milliseconds: the file that is left has its seal."""
    state = balance(unsealed("/job/net.pt"), unsealed("/job/net.pt"), sealed("/job/net.pt"))
    assert (state.state, state.held, state.blind) == ("held", 1, ())


def test_the_last_version_of_a_file_without_a_seal_is_blind() -> None:
    """Neither an earlier version of it nor another file makes up for it."""
    state = balance(sealed("/job/net.pt"), unsealed("/job/net.pt"), sealed("/job/other.pt"))
    assert (state.state, state.required, state.blind) == ("blind", True, (OVER,))


def test_a_run_that_saves_nothing_has_nothing_to_seal() -> None:
    assert (balance().state, balance().required) == ("held", False)
