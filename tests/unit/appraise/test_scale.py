"""Check *scale* on observations made by hand: what differs by size is named, what differs by nature only listed."""

from dataclasses import replace
from typing import Any

import pytest

from trainguard.appraise.scale import Observation, compare, observe
from trainguard.evidence import Evidence
from trainguard.finding import Finding, Subject
from trainguard.policy import Approval, Policy

BASE = Observation(world=2, lines={"/job/train.py": {1: 0, 2: 0}}, code={"/job/train.py"}, steps=40, stopped="steps")
BIG = replace(BASE, world=256, steps=5)


def test_the_same_at_every_size_is_verified() -> None:
    """Nothing differs; the reasons say what was compared."""
    verdict = compare(BASE, [BIG, replace(BIG, world=4096)], Policy())
    assert (verdict.verdict, verdict.findings) == ("VERIFIED", ())
    assert verdict.reasons[0] == "compared world size 256, world size 4096 with world size 2, 5 steps each"


def test_a_line_that_runs_only_there_is_suspicious_with_place_and_step() -> None:
    """Steps made before it ran: 2, so it belongs to step 3."""
    other = replace(BIG, lines={"/job/train.py": {1: 0, 2: 0, 7: 2, 8: 2}})
    (finding,) = compare(BASE, [other], Policy()).findings
    assert (finding.outcome, finding.techniques) == ("suspicious", ("F4",))
    assert (finding.subject.path, finding.subject.step) == ("/job/train.py:7", 3)


def test_an_approved_place_is_explained() -> None:
    """`if world_size >= 64: …` may be what the team wants."""
    other = replace(BIG, lines={"/job/train.py": {7: 0}})
    policy = Policy(approve=(Approval(check="scale", place="/job/train.py:7"),))
    verdict = compare(BASE, [other], policy)
    assert verdict.findings == ()
    assert verdict.links[0].explained == ("/job/train.py:7",)


def test_torchs_own_distributed_code_is_only_listed() -> None:
    """It pads, buckets and groups by size."""
    other = replace(BIG, lines={"/x/site-packages/torch/distributed/c10d.py": {9: 0}})
    verdict = compare(BASE, [other], Policy())
    assert verdict.verdict == "VERIFIED"
    assert any("torch's distributed code" in reason for reason in verdict.reasons)


def test_what_the_jobs_own_line_called_in_a_package_is_listed() -> None:
    """One finding, where the decision is made; a package that decides by itself is accused itself."""
    package = {"/x/site-packages/torch/nn/modules/module.py": {9: 2}}
    both = replace(BIG, lines={"/job/train.py": {7: 2}, **package})
    assert [f.subject.path for f in compare(BASE, [both], Policy()).findings] == ["/job/train.py:7"]
    alone = compare(BASE, [replace(BIG, lines=package)], Policy()).findings
    assert [f.subject.path for f in alone] == ["/x/site-packages/torch/nn/modules/module.py:9"]
    approved = Policy(approve=(Approval(check="scale", place="/job/train.py:7"),))
    assert len(compare(BASE, [both], approved).findings) == 1


def test_a_link_that_breaks_only_there_is_as_grave_as_it_is_there() -> None:
    """The finding of the other check, with the code that ran only then as its likeliest place."""
    broken = Finding(check="optimizer", outcome="violated", techniques=("C4",), subject=Subject(step=3), message="m")
    other = replace(BIG, findings=[broken], lines={"/job/train.py": {7: 2}})
    verdict = compare(BASE, [other], Policy())
    assert verdict.verdict == "TAINTED"
    assert verdict.findings[0].techniques == ("F4", "C4")
    assert verdict.findings[0].subject.path == "/job/train.py:7"
    assert compare(replace(BASE, findings=[broken]), [replace(BIG, findings=[broken])], Policy()).findings == ()


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"opened": {"/etc/flag": ("/job/a.py:3", 2)}}, "/etc/flag was read"),
        ({"spawned": {"sh -c x": ("/job/a.py:3", 2)}}, "a program was started: sh -c x"),
        ({"sleeps": {"/job/a.py:3": (0.5, 2)}}, "it slept 0.5 s at /job/a.py:3"),
        ({"code": {"/job/train.py", "/job/extra.py"}}, "/job/extra.py was loaded"),
        ({"signal": 9}, "ended by SIGKILL after 5 steps"),
    ],
)
def test_other_differences_are_suspicious(difference: dict[str, Any], words: str) -> None:
    """Files, programs, sleeps, modules, ends."""
    (finding,) = compare(BASE, [replace(BIG, **difference)], Policy()).findings
    assert finding.outcome == "suspicious"
    assert words in finding.message


def test_an_assumed_identity_is_another_technique() -> None:
    """The same size as somebody else: F5, and not F4."""
    other = replace(BASE, identity={"host": "gpu-17"}, opened={"/etc/flag": (None, None)})
    (finding,) = compare(BASE, [other], Policy()).findings
    assert finding.techniques == ("F5",)
    assert "only at world size 2 as host=gpu-17" in finding.message


def test_what_could_not_be_probed_is_not_clean() -> None:
    """No steps: UNKNOWN with the reason, whether at the base or above."""
    for base, other in ((replace(BASE, steps=0), BIG), (BASE, replace(BIG, steps=0, status=1, tail="boom"))):
        verdict = compare(base, [other], Policy())
        assert verdict.verdict == "UNKNOWN"
        assert any("could not be probed" in reason for reason in verdict.reasons)


def test_what_comes_only_once_in_two_probes_is_neither_found_nor_clean() -> None:
    """Chance differs between two probes of one size; a trigger on the size does not."""
    chance = replace(BIG, lines={"/job/train.py": {1: 0, 40: 3}})
    verdict = compare(BASE, [chance], Policy(), again=[BIG])
    assert verdict.verdict == "UNKNOWN"
    assert verdict.findings[0].message.startswith("in one of two probes only at world size 256")
    assert compare(BASE, [chance], Policy(), again=[chance]).findings[0].outcome == "suspicious"
    other = replace(BIG, world=512)
    assert compare(BASE, [chance, other], Policy(), again=[other]).findings[0].outcome == "suspicious"


def test_hostile_records_are_passed_over() -> None:
    """Any JSON in any place; nothing raises."""
    bodies: list[dict[str, Any]] = []
    for junk in (None, 3, "x", [], [[1]], {"a": 1}, {"1": "x"}):
        bodies.append(dict.fromkeys(("lines", "sleeps", "stopped", "files", "args", "place", "status"), junk))
        bodies.append({"hyperparameters": junk, "opt": 0})
        bodies.append({"hyperparameters": {"groups": junk}, "opt": 0})
    kinds = ("probe", "step", "code", "open", "spawn", "end", "timed_out")
    records = [Evidence(n=0, at=0, source="process", kind=kind, body=body) for kind in kinds for body in bodies]
    seen = observe(records, [], world=2, identity={}, tail="")
    compare(BASE, [seen], Policy())
