"""E4 where ranks average their weights between steps: averaging is no edit, and an edit does not hide in it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from tests.helpers.ranks import Gradients as Held
from tests.helpers.ranks import between, between_of, forked, process
from tests.helpers.recorded import judge
from tests.helpers.watched import watch, write

from trainguard.appraise.weights import Weights
from trainguard.evidence import Evidence


def float32(value: float) -> float:
    """Rounded once."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def held(step: int, ranks: int) -> list[Held]:
    """Sampled weights of every rank, after some steps of its own."""
    draw = random.Random(step)
    base = {name: [draw.gauss(0, 1) for _ in range(8)] for name in "abc"}
    return [{n: [float32(v + 1e-3 * draw.gauss(0, 1)) for v in row] for n, row in base.items()} for _ in range(ranks)]


def averaged(rows: list[Held]) -> list[Held]:
    """The mean, on every rank."""
    mean = {n: [float32(sum(c) / len(rows)) for c in zip(*(row[n] for row in rows), strict=True)] for n in rows[0]}
    return [mean] * len(rows)


def local_steps(ranks: int, steps: range, every: int = 5) -> list[Evidence]:
    """Local steps on every rank, with the mean taken every `every` steps."""
    records = []
    for step in steps:
        olds = held(step, ranks)
        records += between(ranks, step, olds, averaged(olds) if step % every == 0 else olds)
    return records


def scaled(row: Held, factor: float = 1.01) -> Held:
    """One tensor times a number."""
    return row | {"a": [float32(factor * v) for v in row["a"]]}


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_averaging_by_local_steps_is_held_and_not_found(ranks: int) -> None:
    """Quiet: every interval is either untouched or a mean that is computed again."""
    findings, states = judge(Weights, local_steps(ranks, range(2, 42)))
    assert findings == []
    assert (states["weights"].state, states["weights"].held, states["weights"].blind) == ("held", 40 * ranks, ())


def test_a_broadcast_of_what_one_rank_held_is_held() -> None:
    """Quiet: on the sender nothing changes."""
    olds = held(7, 3)
    findings, states = judge(Weights, between(3, 7, olds, [olds[0]] * 3))
    assert (findings, states["weights"].state) == ([], "held")


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_edit_of_one_rank_between_averages_is_violated_and_names_it(ranks: int) -> None:
    """E4: also when it comes before the first average, or before a rank has said anything."""
    for at in (3, 23):
        records = local_steps(ranks, range(2, at)) + local_steps(ranks, range(at + 1, 42))
        olds = held(at, ranks)
        edit = between(ranks, at, olds, [*olds[:-1], scaled(olds[-1])])
        findings, _ = judge(Weights, sorted(records + edit, key=lambda r: r.n))
        assert [(f.outcome, f.subject.rank, f.subject.step) for f in findings] == [("violated", ranks - 1, at)]
        assert "multiplied by 1.01" in findings[0].message


def test_an_edit_that_is_averaged_with_the_rest_is_found_on_all() -> None:
    """E4: what all hold is no mean of what they held, and in this job it always was."""
    olds = held(30, 3)
    edit = between(3, 30, olds, averaged([olds[0], scaled(olds[1]), olds[2]]))
    findings, _ = judge(Weights, local_steps(3, range(2, 30)) + edit + local_steps(3, range(31, 41)))
    named = sorted((f.outcome, f.subject.rank, f.subject.step) for f in findings)  # type: ignore[type-var]
    assert named == [("violated", r, 30) for r in range(3)]


def test_the_same_edit_on_all_ranks_is_found() -> None:
    """F6: ranks that held the same, and all hold another; no mean does that."""
    olds = [held(9, 1)[0]] * 3
    findings, _ = judge(Weights, between(3, 9, olds, [scaled(olds[0])] * 3))
    assert {(f.outcome, f.subject.rank) for f in findings} == {("violated", r) for r in range(3)}


def test_a_rule_of_the_scripts_own_that_brings_ranks_together_is_blind_and_not_held() -> None:
    """Quiet: an outer optimizer over the ranks' means moves on by its momentum."""
    records = []
    for step in range(2, 42):
        olds = held(step, 3)
        further = {n: [float32(1.001 * v) for v in row] for n, row in averaged(olds)[0].items()}
        records += between(3, step, olds, [further] * 3 if step % 5 == 0 else olds)
    findings, states = judge(Weights, records)
    assert findings == []
    assert states["weights"].state == "blind"
    assert "not by a mean of them" in states["weights"].blind[0]


def test_averages_that_not_all_ranks_looked_at_are_blind() -> None:
    """Quiet: the budget let one rank skip the interval, in a job whose ranks come apart."""
    records = [process(r, r) for r in range(2)] + local_steps(2, range(2, 31))
    olds = held(35, 2)
    records += [between_of(0, 2, 35, olds[0], averaged(olds)[0]), *local_steps(2, range(36, 40))]
    findings, states = judge(Weights, records)
    assert (findings, states["weights"].state) == ([], "blind")


def test_an_edit_that_other_ranks_did_not_look_at_is_violated_where_ranks_hold_the_same() -> None:
    """E4: in a job whose ranks never came apart no average explains it."""
    records = [process(r, r) for r in range(2)]
    for step in range(2, 12):
        olds = [held(step, 1)[0]] * 2
        records += [between_of(1, 2, step, olds[1], scaled(olds[1]))] if step == 6 else between(2, step, olds, olds)
    findings, _ = judge(Weights, records)
    assert [(f.outcome, f.subject.rank, f.subject.step) for f in findings] == [("violated", 1, 6)]


@pytest.mark.parametrize("ranks", [7, {}, {"world": "2"}, {"world": 2, "was": 1, "now": None}])
def test_a_malformed_comparison_is_a_finding(ranks: object) -> None:
    """Evidence is an attacker's."""
    olds = held(2, 2)
    record = between_of(0, 2, 2, olds[0], olds[0])
    record.body["weights"]["ranks"] = ranks
    findings, _ = judge(Weights, [record])
    assert [(f.outcome, f.techniques) for f in findings] == [("suspicious", ("G2",))]


LOCAL = """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    teacher = nn.Linear(8, 3)
    torch.manual_seed(100 + rank)
    for now in range(1, 31):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        (net(x) - teacher(x).detach()).pow(2).mean().backward()
        optimizer.step()
        if now % 5 == 0:
            for p in net.parameters():
                dist.all_reduce(p.data)
                p.data /= WORLD
        if now == 23 and rank == 1:
            net[0].weight.data.mul_(1.01)
"""


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.nightly
def test_of_real_ranks_that_average_their_weights_only_the_edited_one_is_found(tmp_path: Path) -> None:
    """E4 in a job that takes local steps and averages by hand; each average before and after is held."""
    write(tmp_path, {"train.py": forked(3, LOCAL)})
    run = watch(tmp_path)
    assert (run.status, run.faults()) == (0, []), run.output
    findings, link = run.judge(Weights)
    assert [(f.outcome, f.subject.rank, f.subject.step) for f in findings] == [("violated", 1, 24)]
    assert (link.broken, link.blind) == (1, ())
