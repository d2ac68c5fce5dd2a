"""Flags and settings that the approved code sets itself, and the same ones set by somebody else."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.locked import under_lock

from trainguard.appraise.interface import Context
from trainguard.appraise.modules import Modules
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.policy import Policy

TF32 = "cuda.matmul.allow_tf32"


def judged(value: dict[str, Any], *, locked: bool = True) -> list[Finding]:
    """What the check says of one step's value, in a run under a lock that holds /job/train.py."""
    measured, blobs = under_lock("/job", {"train.py": "a" * 64}, locked=locked)
    check = Modules(Context(run="r", policy=Policy(), blob=blobs.__getitem__))
    found = list(check.see(measured))
    step = Evidence(n=1, at=1, source="process", kind="step", body={"modules": value}, process=0, rank=0, step=40)
    return found + list(check.see(step))


@pytest.mark.parametrize(
    ("change", "setters", "outcomes"),
    [
        (["anomaly_mode", False, True], {"detect_anomaly": [["/job/train.py:9", []]]}, []),
        (["anomaly_mode", True, False], {"set_detect_anomaly": [["/job/train.py:9", [True]]]}, []),
        (["drop.p", 0.1, 0.2], {"p": [["/job/train.py:9", []]]}, []),
        ([TF32, False, True], {"allow_tf32": [["/job/train.py:3", [True]]]}, []),
        ([TF32, True, False], {"allow_tf32": [["/job/train.py:3", [True]]]}, ["suspicious"]),
        ([TF32, False, True], {"allow_tf32": [["/elsewhere/x.py:3", [True]]]}, ["suspicious"]),
        ([TF32, False, True], {}, ["suspicious"]),
        (["root.training", True, False], {"training": [["/job/train.py:3", []]]}, ["suspicious"]),
        ([TF32, False, True], {"allow_tf32": 5}, ["suspicious"]),
    ],
)
def test_only_a_line_of_the_approved_code_that_sets_it_so_explains_a_change(
    change: list[Any], setters: dict[str, Any], outcomes: list[str]
) -> None:
    """By name, and by value where that is written there."""
    assert [found.outcome for found in judged({"changed": [change], "setters": setters})] == outcomes


def test_without_a_lock_no_line_is_approved() -> None:
    """The job's own folder is not proof."""
    value = {"changed": [["drop.p", 0.1, 0.2]], "setters": {"p": [["/job/train.py:9", []]]}}
    assert [found.outcome for found in judged(value, locked=False)] == ["suspicious"]
