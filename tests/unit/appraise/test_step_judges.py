"""The judges of step frames: whatever a frame says, the answer is a finding or a state, never an exception."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from tests.helpers.recorded import judge
from tests.helpers.training import train

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.hyperparameters import Hyperparameters
from trainguard.appraise.interface import Check
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.rng import Rng
from trainguard.appraise.steps import number, parse_blob, unpack
from trainguard.appraise.weights import Weights
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence

CHECKS: tuple[type[Check], ...] = (Rng, Gradients, Hyperparameters, Optimizer, Weights)
WRONG: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, "x", [], {}, [[]], [{}], [1, "a", None], {"a": {"b": []}})


@pytest.fixture(scope="module")
def honest() -> list[Evidence]:
    """Six steps, with a departure in the weights so that every part of a frame is there."""
    import torch

    def scale(run: Any) -> None:
        if run.step == 3:
            with torch.no_grad():
                run.net[0].weight.mul_(1.5)

    return train(6, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2), clip=0.1, after_step=scale).records


@pytest.mark.torch
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_no_wrong_value_anywhere_in_a_frame_raises(check: type[Check], honest: list[Evidence]) -> None:
    """Every field of the frame, and every field of each link's value, replaced by everything it should not be."""
    for n, record in enumerate(honest):
        if record.kind != "step":
            continue
        if n % 2 and check is Optimizer:
            continue  # it unpacks every blob; half the frames say as much
        paths: list[tuple[str, ...]] = [(key,) for key in record.body]
        value = record.body.get(check.name)
        if isinstance(value, dict):
            paths += [(check.name, key) for key in value]
        for path in paths:
            for wrong in WRONG:
                body = copy.deepcopy(record.body)
                place = body
                for key in path[:-1]:
                    place = place[key]
                place[path[-1]] = wrong
                changed = [*honest[:n], msgspec.structs.replace(record, body=body), *honest[n + 1 :]]
                _, states = judge(check, changed)
                assert check.name in states


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_run_without_steps_is_blind_with_a_reason(check: type[Check]) -> None:
    """Nothing seen is nothing held."""
    findings, states = judge(check, [])
    assert findings == []
    assert states[check.name].state == "blind"
    assert states[check.name].blind


def test_blobs_are_parsed_strictly() -> None:
    """Format, base64, whole values, size."""
    assert unpack("<f", "AACAPwAAAMA=") == [1.0, -2.0]
    for kind, text in (
        ("<q", "AACAPw=="),
        ("<f", "AACAPw"),
        ("<f", "AACA"),
        ("<f", "A" * (1 << 24)),
        ("<d", "AACAPw=="),
    ):
        with pytest.raises(MalformedEvidence):
            unpack(kind, text)
    for value in (None, [], {"f": "<f"}, {"f": 1, "b": ""}, {"f": "<f", "b": "", "c": 1}):
        with pytest.raises(MalformedEvidence):
            parse_blob(value)


def test_numbers_are_numbers() -> None:
    """Booleans are not; the words for what JSON cannot write are."""
    assert number(1) == 1.0
    assert number("-inf") == float("-inf")
    assert [number(value) for value in (True, None, "1.0", [], {})] == [None] * 5
