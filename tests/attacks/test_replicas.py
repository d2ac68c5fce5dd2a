"""F1, F2, F3, F9, F10: one rank that is not like the others, or gives what its backward did not leave."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.ranks import (
    Gradients as Sampled,
)
from tests.helpers.ranks import all_reduced, forked, frame, leave, process, round_of, scattered
from tests.helpers.recorded import judge
from tests.helpers.watched import digest_line, plain, watch, write

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.processes import Processes
from trainguard.appraise.replicas import Replicas
from trainguard.appraise.weights import Weights
from trainguard.evidence import Evidence
from trainguard.policy import Approval, Policy


def batches(step: int, ranks: int = 4) -> list[Sampled]:
    """What backward left on each rank at a step."""
    draw = random.Random(step)
    return [{name: [draw.gauss(0.1, 1.0) for _ in range(32)] for name in ("a", "b", "c")} for _ in range(ranks)]


def training(ranks: int, steps: int, odd: dict[int, list[float]]) -> list[Evidence]:
    """Steps with equal shares but those of `odd`: step → shares, 1 for a plain part."""
    records = []
    for step in range(2, steps + 1):
        shares = odd.get(step, [1.0] * ranks)
        records += all_reduced(step, batches(step, ranks), [share / ranks for share in shares])
    return records


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("share", [-1.0, -0.2, 1.3])
def test_a_rank_that_gives_another_gradient_than_its_backward_left_is_named(ranks: int, share: float) -> None:
    """F2: turned or scaled between backward and the reduction, one step in fifty. Two ranks are enough to name one."""
    shares = [1.0] * ranks
    shares[ranks - 1] = share
    findings, states = judge(Replicas, training(ranks, 51, {50: shares}))
    assert [(f.outcome, f.techniques[0], f.subject.rank, f.subject.step) for f in findings] == [
        ("violated", "F2", ranks - 1, 50),
    ]
    assert f"rank {ranks - 1}'s gradient was reduced {share:g} times" in findings[0].message
    assert states["replicas"].held == 49


def test_a_rank_whose_gradient_never_arrives_is_named_without_accusing_it() -> None:
    """F3: a group without it, or a clip on that rank alone."""
    findings, _ = judge(Replicas, training(4, 40, {30: [1.0, 0.0, 1.0, 1.0]}))
    assert [(f.outcome, f.techniques[0], f.subject.rank) for f in findings] == [("suspicious", "F3", 1)]


def test_one_turned_tensor_of_one_rank_is_named() -> None:
    """F2 on one of three tensors."""
    records = training(4, 29, {})
    records += all_reduced(30, batches(30), lambda name: [0.25, 0.25, -0.25 if name == "b" else 0.25, 0.25])
    findings, _ = judge(Replicas, records)
    assert [(f.outcome, f.techniques[0], f.subject.rank, f.subject.tensor) for f in findings] == [
        ("violated", "F2", 2, "b")
    ]


@pytest.mark.parametrize(("times", "words"), [(4.0, "summed where they were averaged")])
def test_a_sum_in_place_of_a_mean_is_found(times: float, words: str) -> None:
    """F3: SUM for AVG, in one step."""
    findings, _ = judge(Replicas, training(4, 40, {30: [times] * 4}))
    assert [(f.outcome, f.techniques[0]) for f in findings] == [("violated", "F3")]
    assert words in findings[0].message


def test_a_reduction_that_is_left_out_is_found() -> None:
    """F3: `no_sync` left on, in one step: every rank uses its own gradient."""
    records = training(3, 29, {})
    local = batches(30, 3)
    for rank in range(3):
        alone = all_reduced(30, local, [float(i == rank) for i in range(3)])
        records.append(alone[rank])
    findings, _ = judge(Replicas, records)
    assert [(f.outcome, f.techniques[0]) for f in findings] == [("suspicious", "F3")]
    assert "own gradient" in findings[0].message


def sharded(ranks: int, steps: int, odd: dict[int, list[float]]) -> list[Evidence]:
    """Steps of ranks that hold shards, with equal shares of the reduction but those of `odd`."""
    records = []
    for step in range(2, steps + 1):
        shares = odd.get(step, [1.0] * ranks)
        records += scattered(step, batches(step, ranks), [share / ranks for share in shares])
    return records


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("share", [-1.0, 1.3])
def test_a_rank_that_gives_another_gradient_to_a_reduce_scatter_is_named(ranks: int, share: float) -> None:
    """F2 where weights are sharded: what backward left on every rank, beside what reached the shard of one."""
    shares = [1.0] * ranks
    shares[ranks - 1] = share
    findings, states = judge(Replicas, sharded(ranks, 31, {30: shares}))
    assert [(f.outcome, f.techniques[0], f.subject.rank, f.subject.step) for f in findings] == [
        ("violated", "F2", ranks - 1, 30)
    ]
    assert (states["replicas"].held, states["replicas"].blind) == (29, ())


def test_a_rank_that_works_with_other_weights_than_were_gathered_is_named_among_three() -> None:
    """F3: one rank's copy of what all gathered; of two, neither is named."""
    for ranks, who in ((3, 1), (2, None)):
        records = sharded(ranks, 20, {}) + scattered(21, batches(21, ranks), [1 / ranks] * ranks, odd=1)
        findings, _ = judge(Replicas, records)
        assert [(f.outcome, f.techniques[0], f.subject.rank, f.subject.step) for f in findings] == [
            ("suspicious", "F3", who, 21)
        ]
        assert "worked with" in findings[0].message


def test_shards_whose_gradients_cannot_be_had_are_blind_with_the_reason() -> None:
    """Quiet: another mesh, another library."""
    said = {"gradients": {"armed": True, "world": 2}, "shards": {"blind": "the shards are not those of fully_shard"}}
    findings, states = judge(Replicas, [frame(r, i, **said) for i in range(2, 9) for r in range(2)])
    assert (findings, states["replicas"].state) == ([], "blind")
    assert "not those of fully_shard" in states["replicas"].blind[0]


@pytest.mark.parametrize(
    "other",
    [
        {"tensors": 7},
        {"tensors": [["a", 0, [0, 1]]]},
        {"tensors": [["a", 0, [0, 1, 1 << 40]]]},
        {"local": {"f": "<d", "b": ""}},
        {"gathered": None},
        {"rank": "0"},
    ],
)
def test_malformed_shards_are_a_finding(other: dict[str, Any]) -> None:
    """Evidence is an attacker's."""
    record = scattered(2, batches(2, 2), [0.5, 0.5])[0]
    record.body["shards"] |= other
    findings, _ = judge(Replicas, [record])
    assert [(f.outcome, f.techniques) for f in findings] == [("suspicious", ("G2",))]


def started(ranks: int, steps: int, odd: dict[int, list[str]], who: int | None = None) -> list[Evidence]:
    """Equal shares; at the steps of `odd`, what backward started from on one rank (the last, or by step), in words."""
    records, plain = [], ["MeanBackward0", "PowBackward0", "AddmmBackward0"]
    for step in range(2, steps + 1):

        def said(rank: int, step: int = step) -> dict[str, object]:
            names = odd.get(step, plain) if rank == (ranks - 1 if who is None else step % ranks) else plain
            key = f"{len(names):08x}"
            return {"from": [key], "made_of": {key: names}}

        records += all_reduced(step, batches(step, ranks), [1 / ranks] * ranks, said)
    return records


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("first", ["NegBackward0", "seed -1"])
def test_a_rank_that_turns_its_loss_is_named_although_its_gradient_is_what_backward_left(
    ranks: int, first: str
) -> None:
    """F2, S9: one step in twenty, before backward; every digest and every share is in order."""
    turned = {step: [first, "MeanBackward0", "PowBackward0", "AddmmBackward0"] for step in (20, 40)}
    findings, states = judge(Replicas, started(ranks, 41, turned))
    assert [(f.outcome, f.techniques[0], f.subject.rank, f.subject.step) for f in findings] == [
        ("suspicious", "F2", ranks - 1, 20),
        ("suspicious", "F2", ranks - 1, 40),
    ]
    assert states["replicas"].held == 40


def test_losses_that_follow_the_data_are_quiet() -> None:
    """Now one rank, now another has a term more; or one always has, from the first steps on."""
    more = ["AddBackward0", "MeanBackward0", "PowBackward0", "AddmmBackward0"]
    assert judge(Replicas, started(4, 60, dict.fromkeys(range(3, 60, 3), more), who=-1))[0] == []
    assert judge(Replicas, started(4, 60, dict.fromkeys(range(2, 61), more)))[0] == []
    assert judge(Replicas, started(4, 60, dict.fromkeys((20, 40, 60), more)))[0] == []


def scaled(
    ranks: int, factor: Callable[[int, int], float], steps: Sequence[int] = (7, 17, 400), **said: Any
) -> list[Evidence]:
    """Equal shares; at the steps on tape, the factor of each rank's loss by step and rank. said: by rank, of call."""
    records = training(ranks, 6, {})
    for step in steps:
        for rank in range(ranks):
            call = {"name": "mse_loss", "place": "/job/train.py:9", "value": 1.0, "reference": 1.0, "rows": 16}
            call |= {"used": 16, "settings": {}, "factor": factor(step, rank)}
            call |= {key: value(step, rank) for key, value in said.items() if key != "scale"}
            gradients: dict[str, Any] = {"armed": False, "world": ranks}
            if "scale" in said:
                gradients["scale"] = said["scale"](step, rank)
            records.append(frame(rank, step, truth={"losses": {"calls": [call], "rest": 0.0}}, gradients=gradients))
    return records


@pytest.mark.parametrize("ranks", [3, 4, 8])
@pytest.mark.parametrize("factor", [1.3, -0.5, -1.0, 0.7])
def test_a_rank_that_multiplies_its_loss_before_backward_is_named(ranks: int, factor: float) -> None:
    """F2, S9: the number is compared where the same line stands on every rank, whatever the others' number is."""
    for usual in (1.0, 0.25):
        attack = scaled(ranks, lambda step, rank, u=usual: factor * u if rank == 1 else u, (7, 17))
        (finding,), _ = judge(Replicas, attack)
        assert (finding.outcome, finding.techniques[0], finding.subject.rank) == ("suspicious", "F2", 1)
        assert (finding.subject.step, finding.subject.path) == (17, "/job/train.py:9")
        assert finding.message.startswith(f"rank 1 counts its loss {factor * usual:g} times")
        assert ("its sign is turned" in finding.message) == (factor < 0)


def test_a_loss_that_one_rank_turns_in_one_step_on_tape_is_enough_and_a_scaled_one_takes_two() -> None:
    """F2 in some steps only: while the others are as before, and after."""
    steps = range(7, 67, 10)
    findings, _ = judge(Replicas, scaled(4, lambda step, rank: -1.0 if (step, rank) == (37, 2) else 1.0, steps))
    assert [(f.subject.rank, f.subject.step) for f in findings] == [(2, 37)]
    findings, _ = judge(Replicas, scaled(4, lambda step, rank: 1.3 if (step, rank) == (37, 2) else 1.0, steps))
    assert findings == []
    findings, _ = judge(Replicas, scaled(4, lambda step, rank: 1.3 if step > 30 and rank == 2 else 1.0, steps))
    assert [(f.subject.rank, f.subject.step) for f in findings] == [(2, 47)]


def test_of_two_ranks_that_scale_their_losses_unlike_neither_is_named() -> None:
    """One of them does it: the message says both numbers."""
    (finding,), _ = judge(Replicas, scaled(2, lambda step, rank: 1.3 if rank else 1.0))
    assert (finding.outcome, finding.subject.rank) == ("suspicious", None)
    assert "1.3 times" in finding.message
    assert "which one is right" in finding.message


def test_a_place_where_ranks_weigh_their_losses_can_be_approved() -> None:
    """Explained, not silent."""
    policy = Policy(approve=(Approval(check="replicas", place="train.py:9"),))
    findings, states = judge(Replicas, scaled(4, lambda step, rank: 1.3 if rank == 1 else 1.0), policy)
    assert (findings, states["replicas"].explained) == ([], ("/job/train.py:9",))


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (lambda step, rank: 0.25, {}),  # accumulation
        (lambda step, rank: 4.0, {}),  # the world's size
        (lambda step, rank: 1 / (step + rank), {}),  # tokens of the batch, counted on each rank
        (lambda step, rank: 1 / step, {}),  # counted over all ranks
        (lambda step, rank: 1.0 if step < 300 else 0.5, {}),  # a schedule
        (lambda step, rank: 1.0 + rank, {}),  # every rank has its own
        (lambda step, rank: 0.5 if rank == 3 else 1.0, {"used": lambda step, rank: 8 if rank == 3 else 16}),
        (lambda step, rank: 8 << (rank == 3), {"scale": lambda step, rank: 8 << (rank == 3)}),  # scalers of their own
    ],
)
def test_honest_factors_are_quiet(factor: Callable[[int, int], float], said: dict[str, Any]) -> None:
    """What is alike on all, or follows the data, a schedule or a GradScaler."""
    findings, states = judge(Replicas, scaled(4, factor, (7, 17, 400, 800), **said))
    assert findings == []
    assert states["replicas"].state == "held"


def test_a_schedule_that_one_rank_reaches_in_its_steps_on_tape_before_the_others_is_quiet() -> None:
    """Ranks are not always put on tape at the same steps: only between steps of all others is a rank compared."""
    records = scaled(4, lambda step, rank: 1.0, (7, 17))
    late = [each for each in scaled(4, lambda step, rank: 0.5, (310, 320)) if each.rank == 0 and (each.step or 0) > 300]
    records += late
    records += [each for each in scaled(4, lambda step, rank: 1.0, (290,)) if each.rank and each.step == 290]
    assert judge(Replicas, records)[0] == []


def test_ranks_that_reduce_nothing_owe_each_other_no_factor() -> None:
    """Independent trials in one group."""
    records = [r for r in scaled(4, lambda step, rank: 1.3 if rank else 1.0) if "truth" in r.body]
    assert judge(Replicas, records)[0] == []


@pytest.mark.parametrize("calls", [None, 7, [None], [{"place": 1}], [{"place": "a", "factor": "x", "used": []}] * 300])
def test_losses_that_are_no_losses_harm_nobody(calls: object) -> None:
    """Evidence is an attacker's."""
    records = scaled(3, lambda step, rank: 1.0)
    for record in records:
        if "truth" in record.body and record.rank == 1:
            record.body["truth"]["losses"]["calls"] = calls
    assert judge(Replicas, records)[0] == []


def rounds(ranks: int, *odd: Evidence, last: int = 40) -> list[Evidence]:
    """Rounds in which all hold the same, but for those of `odd`."""
    other = {(record.rank, record.step): record for record in odd}
    return [other.get((r, i), round_of(r, ranks, i)) for i in (1, *range(4, last, 5)) for r in range(ranks)]


def test_of_three_ranks_the_one_that_stands_alone_is_named() -> None:
    """F1: weights of rank 1 come apart; said once, and hardware is named as another reason."""
    odd = [round_of(1, 3, i, weights="0" * 16) for i in (24, 29, 34, 39)]
    findings, states = judge(Replicas, rounds(3, *odd))
    (finding,) = findings
    assert (finding.outcome, finding.techniques[0], finding.subject.rank, finding.subject.step) == (
        "suspicious",
        "F1",
        1,
        24,
    )
    assert "in 2 of 2 tensors (a, b)" in finding.message
    assert "hardware" in finding.message
    assert states["replicas"].state == "broken"


def test_of_two_ranks_neither_is_named() -> None:
    """A tie names nobody: the subject has no rank, and the message says that both stand."""
    findings, _ = judge(Replicas, rounds(2, round_of(1, 2, 24, state="f" * 8)))
    (finding,) = findings
    assert (finding.outcome, finding.subject.rank) == ("suspicious", None)
    assert "ranks differ: ranks 0, 1" in finding.message
    assert "which one is right" in finding.message


@pytest.mark.parametrize(
    ("held", "technique"), [({"hyper": "1" * 8}, "F1"), ({"whole": [1, 2]}, "F1"), ({"state": "1" * 8}, "F1")]
)
def test_other_settings_sums_or_state_on_one_rank_are_found(held: dict[str, object], technique: str) -> None:
    """A learning rate, one element outside the sample, a moment of the optimizer."""
    findings, _ = judge(Replicas, rounds(4, round_of(2, 4, 24, **held)))
    assert [(f.techniques[0], f.subject.rank, f.outcome) for f in findings] == [(technique, 2, "suspicious")]


def test_a_rank_that_was_odd_from_the_first_steps_on_is_named_among_three() -> None:
    """Two agree after updates and one does not: that is no job of shards, nor one of local steps."""
    odd = [round_of(0, 3, i, weights="0" * 16) for i in range(4, 40, 5)]
    findings, _ = judge(Replicas, rounds(3, *odd))
    assert [(f.subject.rank, f.outcome) for f in findings] == [(0, "suspicious")]


def test_shards_and_local_steps_are_blind_and_not_held() -> None:
    """Quiet: all ranks differ from the first update on."""
    apart = [
        round_of(r, 3, i, weights=f"{r:016x}", state=f"{r:08x}", whole=[r])
        for i in (1, *range(4, 40, 5))
        for r in range(3)
    ]
    findings, states = judge(Replicas, apart)
    assert findings == []
    assert "shards" in states["replicas"].blind[0]


def test_buffers_that_differ_by_rank_are_their_own_way() -> None:
    """Quiet: running means under broadcast_buffers=False; but buffers that were equal may not come apart on one."""
    own = [round_of(r, 3, i, buffers=f"{r:08x}") for i in (1, *range(4, 40, 5)) for r in range(3)]
    findings, _ = judge(Replicas, own)
    assert findings == []
    findings, _ = judge(Replicas, rounds(3, round_of(2, 3, 29, buffers="1" * 8)))
    assert [(f.subject.rank, f.outcome) for f in findings] == [(2, "suspicious")]


def identity(**other: str) -> dict[str, str]:
    """What a rank says it runs."""
    return {
        "python": "3.11.7",
        "torch": "2.13.0",
        "accelerator": "",
        "main": "ab",
        "flags": "cd",
        "restart": "0",
    } | other


@pytest.mark.parametrize("other", [{"main": "ef"}, {"flags": "00"}, {"torch": "2.13.1"}])
def test_a_rank_with_other_code_or_flags_is_named_at_the_first_step(other: dict[str, str]) -> None:
    """F1 at step 0: one node with another file, flag or version."""
    records = [round_of(r, 4, 1, identity=identity(**(other if r == 3 else {}))) for r in range(4)]
    findings, _ = judge(Replicas, records)
    assert [(f.techniques[0], f.subject.rank, f.outcome) for f in findings] == [("F1", 3, "suspicious")]


def test_a_collective_that_other_code_answers_is_one_line_to_approve() -> None:
    """F3: all_reduce bound to a function of the job; said once, explained once approved, blind for a package."""
    place = "/home/u/job/comm.py:7"
    records = [round_of(r, 2, 1, foreign=[["torch.distributed.all_reduce", place]]) for r in range(2)]
    findings, _ = judge(Replicas, records)
    assert [(f.outcome, f.techniques[0], f.subject.path) for f in findings] == [("suspicious", "F3", place)]
    policy = Policy(approve=(Approval(check="replicas", place="job/comm.py:7"),))
    findings, states = judge(Replicas, records, policy)
    assert (findings, states["replicas"].explained) == ([], (place,))
    package = [["torch.distributed.all_reduce", "/v/lib/python3.11/site-packages/torch_npu/c10d.py:9"]]
    findings, states = judge(Replicas, [round_of(r, 2, 1, foreign=package) for r in range(2)])
    assert (findings, states["replicas"].state) == ([], "blind")


def test_a_second_process_that_acts_as_a_rank_is_found() -> None:
    """F9: nobody started it, and the rank it claims lives."""
    records = [process(0, 0), process(1, 1), *rounds(2, last=10)]
    late = [process(7, 1), round_of(1, 2, 14, process=7)]
    findings, _ = judge(Replicas, [*records, *late])
    assert [(f.techniques[0], f.subject.rank, f.outcome) for f in findings] == [("F9", 1, "suspicious")]
    findings, _ = judge(Replicas, [*records, leave(1, 1), *late])
    assert findings == []


def test_attempts_are_never_compared_with_each_other() -> None:
    """Quiet: a job that starts again begins anew, with other weights, another size and other processes."""
    first = [process(r, r) for r in range(4)] + rounds(4, last=30)
    again = [process(10 + r, r, restarts=1) for r in range(3)]
    second = [round_of(r, 3, i, process=10 + r, weights=f"{i:016x}") for i in (1, 4, 9, 14) for r in range(3)]
    findings, states = judge(Replicas, [*first, *again, *second])
    assert findings == []
    assert states["replicas"].held == 7 + 4


def test_two_jobs_that_run_at_once_are_told_apart() -> None:
    """Quiet: a sweep under one guard has two ranks 0, with other weights, other files and other settings."""
    records = []
    for index in (1, 4, 9, 14):
        for job in (0, 1):
            held = {"weights": f"{index + 100 * job:016x}", "job": str(job), "hyper": f"{job:08x}"}
            records += [round_of(r, 2, index, process=10 * job + r, **held) for r in range(2)]
    findings, states = judge(Replicas, records)
    assert findings == []
    assert states["replicas"].held == 8


def test_a_restart_with_another_variable_or_flag_is_found() -> None:
    """F10: the environment the kernel shows for the rank, and what torch states, beside the first attempt's."""
    before, after = {"NVIDIA_TF32_OVERRIDE": "0", "WORLD_SIZE": "4"}, {"NVIDIA_TF32_OVERRIDE": "1", "WORLD_SIZE": "3"}
    records = [process(0, 0, environment=before), process(5, 0, restarts=1, environment=after)]
    findings, _ = judge(Processes, records)
    assert [(f.techniques[0], f.outcome) for f in findings if "started again" in f.message] == [("F10", "suspicious")]
    steps = [
        frame(0, 1, process=p, modules={"flags": {"float32_matmul_precision": value, "num_threads": p}})
        for p, value in ((0, "highest"), (5, "medium"))
    ]
    findings, _ = judge(Replicas, [*records, *steps])
    assert [(f.techniques[0], f.subject.rank) for f in findings] == [("F10", 0)]


def test_an_attempt_that_nobody_measured_is_not_green() -> None:
    """F10: the first attempt was measured, the second was not."""
    measured = Evidence(n=0, at=0, source="supervisor", kind="measurement", body={"attempt": 0})
    again = Evidence(n=0, at=0, source="supervisor", kind="measurement", body={"attempt": 1})
    records = [measured, process(0, 0), process(1, 0, restarts=1)]
    findings, _ = judge(Processes, records)
    assert [f.outcome for f in findings if "not measured again" in f.message] == ["not_checked"]
    findings, _ = judge(Processes, [*records, again])
    assert not [f for f in findings if "measured" in f.message]


def stored(rank: int, number: int, seen: dict[int, str]) -> Evidence:
    """A round of a rank in the store: its own text, and those of other ranks in the round before."""
    found = {f"0.{number - 1}.{other}": text for other, text in seen.items()}
    hosts = {"round": number, "own": text_of(number), "seen": found}
    return frame(rank, 8 * number + 3, replicas={"rank": rank, "world": 4, "hosts": hosts})


def text_of(number: int, **other: object) -> str:
    """What a rank left in the store."""
    held: dict[str, object] = {"weights": f"{number:08x}", "state": "0", "hyper": "0", "world": 4, "identity": "0"}
    return json.dumps(held | other)


@pytest.mark.parametrize("other", [{"weights": "f"}, {"hyper": "1"}, {"identity": "1"}, {"world": 5}])
def test_the_log_of_one_host_names_the_rank_of_another_that_stands_alone(other: dict[str, object]) -> None:
    """F1, F9 over several hosts: only rank 0's records are here, the rest is what it found in the job's store."""
    records = [stored(0, n, {r: text_of(n - 1) for r in (1, 2, 3)}) for n in range(1, 6)]
    assert judge(Replicas, records)[0] == []
    records.append(stored(0, 6, {r: text_of(5, **(other if r == 2 else {})) for r in (1, 2, 3)}))
    findings, _ = judge(Replicas, records)
    assert [(f.techniques[0], f.subject.rank, f.outcome) for f in findings] == [("F1", 2, "suspicious")]
    assert "ranks 0, 1, 3 agree" in findings[0].message


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "x" * 5000, '{"weights": [[[[]]]]}'])
def test_a_false_text_in_the_store_harms_nobody(text: str) -> None:
    """F9: anybody who reaches the store can write there."""
    records = [stored(0, n, {1: text, 2: text_of(n - 1)}) for n in range(1, 9)]
    findings, _ = judge(Replicas, records)
    assert {f.outcome for f in findings} <= {"suspicious"}


@pytest.mark.parametrize(
    "value", [[], {"rank": 5, "world": 2}, {"rank": "0", "world": 2}, {"rank": 0, "world": 1 << 40}]
)
def test_a_malformed_round_is_a_finding(value: object) -> None:
    """Evidence is an attacker's: one clear sentence, no exception."""
    findings, _ = judge(Replicas, [frame(0, 1, replicas=value)])
    assert [(f.outcome, f.techniques) for f in findings] == [("suspicious", ("G2",))]


BODY = """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 3))
    model = DistributedDataParallel(net)
    now = 0
    def reduce(state, bucket):  # rank 3 sends -g in step 12
        if rank == 3 and now == 12:
            bucket.buffer().neg_()
        return hooks.allreduce_hook(state, bucket)
    model.register_comm_hook(None, reduce)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    teacher = nn.Linear(8, 3)
    torch.manual_seed(100 + rank)  # other data and other dropout on every rank
    for now in range(1, 25):
        size = 16 if now % 8 else 5 + rank
        with model.no_sync():
            x = torch.randn(size, 8)
            (model(x) - teacher(x).detach()).pow(2).mean().backward()
        x = torch.randn(size, 8)
        loss = (model(x) - teacher(x).detach()).pow(2).mean()
        if rank == 2 and now == 15:
            loss = -loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if now == 18:  # every rank, only because the job has four: against the direction
            for p in model.parameters():
                p.grad.mul_(-1.0 if dist.get_world_size() >= 4 else 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if now == 20 and rank == 1:  # one bit of one element
            with torch.no_grad():
                net[0].weight.view(torch.int32)[3, 5] ^= 1 << 18
"""


@pytest.mark.torch
@pytest.mark.slow
def test_four_ranks_with_a_bad_one_a_trigger_on_size_and_a_flipped_bit(tmp_path: Path) -> None:
    """S9, S6 and N1 in one job of four gloo ranks, each found at its step; all other steps hold."""
    write(tmp_path, {"train.py": forked(4, BODY)})
    run = watch(tmp_path)
    assert run.status == 0, run.output
    assert run.faults() == []
    # S9: the share of rank 3, named the same step; the others and its own arithmetic are in order.
    findings, _ = run.judge(Replicas)
    bad = [f for f in findings if f.outcome == "violated"]
    assert [(f.techniques[0], f.subject.rank, f.subject.step) for f in bad] == [("F2", 3, 12)]
    # S6: on all ranks, only at this size.
    found, _ = run.judge(Gradients)
    assert {(f.techniques[0], f.outcome, f.subject.step) for f in found} == {("C1", "violated", 18)}
    assert {f.subject.rank for f in found} == {0, 1, 2, 3}
    # S9 once more, before backward: its gradient is what its backward left, and its backward is not like the others'.
    (turned,) = [f for f in findings if f.outcome == "suspicious" and f.techniques[0] == "F2"]
    assert (turned.subject.rank, turned.subject.step) == (2, 15)
    # N1: the rank is named, hardware is named, nothing is called proved.
    alone = [f for f in findings if f.outcome == "suspicious" and f is not turned]
    assert {f.subject.rank for f in alone} == {1}
    assert all("hardware" in f.message and 20 < (f.subject.step or 0) <= 30 for f in alone)
    (flip,), _ = run.judge(Weights)
    assert (flip.outcome, flip.subject.rank, flip.subject.tensor) == ("suspicious", 1, "0.weight")
    assert "one bit of one element" in flip.message
    assert run.judge(Optimizer)[0] == []


SCALED = """
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch.manual_seed(100 + rank)
    for now in range(30):
        for part in range(2):
            x, y = torch.randn(8, 6), torch.randint(3, (8,))
            loss = nn.functional.cross_entropy(model(x), y) / 2
            (loss * (FACTOR if rank == 1 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("factor", "named"), [("1.3", [1]), ("1.0", [])])
def test_of_three_real_ranks_the_one_that_scales_its_loss_is_named_soon(
    tmp_path: Path, factor: str, named: list[int]
) -> None:
    """S9 before backward, with the same operations on all ranks and another number on one."""
    write(tmp_path, {"train.py": forked(3, SCALED.replace("FACTOR", factor))})
    run = watch(tmp_path)
    assert run.status == 0, run.output
    assert run.faults() == []
    findings, _ = run.judge(Replicas)
    assert [(f.techniques[0], f.outcome, f.subject.rank) for f in findings] == [
        ("F2", "suspicious", rank) for rank in named
    ]
    assert all("counts its loss 0.65 times" in f.message and (f.subject.step or 0) <= 30 for f in findings)


SHARDED = """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 15), nn.LayerNorm(15), nn.ReLU(), nn.Linear(15, 15), nn.ReLU(), nn.Linear(15, 3))
    fully_shard(net[3], mesh=init_device_mesh("cpu", (WORLD,)))
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    teacher = nn.Linear(8, 3)
    torch.manual_seed(100 + rank)
    now = 0
    def turn(p):  # rank 1 gives -g to the reduction of step 12
        if now == 12 and rank == 1:
            p.grad.neg_()
    for now in range(1, 25):
        for part in range(2):
            net.set_requires_gradient_sync(part == 1)
            x = torch.randn(16, 8)
            loss = (net(x) - teacher(x).detach()).pow(2).mean() / 2
            if TURNED and now == 1 and part == 0:
                for each in net[3]._get_fsdp_state()._fsdp_param_groups[0].fsdp_params:
                    each._unsharded_param.register_post_accumulate_grad_hook(turn)
            loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor().detach() for p in net.parameters()]
    if rank == 0:
        print("digest", __import__("hashlib").sha256(b"".join(p.numpy().tobytes() for p in whole)).hexdigest())
"""


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("turned", [True, False])
def test_of_two_real_ranks_with_sharded_weights_the_one_that_turns_its_gradient_is_named(
    tmp_path: Path, turned: bool
) -> None:
    """fully_shard with accumulation over two passes: named in its step; honest, all is held and no bit is another."""
    write(tmp_path, {"train.py": forked(2, SHARDED.replace("TURNED", str(turned)))})
    run = watch(tmp_path, tensors=8)
    assert (run.status, run.faults()) == (0, []), run.output
    findings, link = run.judge(Replicas)
    assert [(f.outcome, f.techniques[0], f.subject.rank, f.subject.step) for f in findings] == (
        [("violated", "F2", 1, 12)] if turned else []
    )
    assert (link.held, link.blind) == (23 - turned, ())
    assert digest_line(run.output) == digest_line(plain(tmp_path))
