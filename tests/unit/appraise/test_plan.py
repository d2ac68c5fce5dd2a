"""The plan of a lock: what reference runs agree in, and what a run that departs from it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from trainguard.appraise.course import Told, agreed, is_told, same, told_by
from trainguard.appraise.interface import Context
from trainguard.appraise.plan import COURSE, Plan
from trainguard.digest import sha256_hex
from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.lockfile import Code, Launch, Lock, Measurement, make_lock, parse_lock
from trainguard.lockfile import Plan as Approved
from trainguard.policy import Approval, Policy

MEASURED = Measurement(
    cwd="/job",
    launch=Launch(argv=(), kind="script"),
    interpreter=None,
    code=Code(root="/job"),
    trees={},
    distributions={},
)
GROUP = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0, "n": 2}
SAMPLERS = {
    "class": "torch.utils.data.sampler.BatchSampler",
    "batch": 16,
    "drop_last": False,
    "of": {"class": "torch.utils.data.sampler.RandomSampler", "length": 256, "replacement": False, "generator": None},
}


def lock_of(plan: Approved | None) -> Lock:
    return make_lock(MEASURED, ec.generate_private_key(ec.SECP256R1()), made="", plan=plan)


def record(kind: str, body: dict[str, Any], *, rank: int = 0, step: int | None = None) -> Evidence:
    return Evidence(n=0, at=0, source="process", kind=kind, body=body, process=rank, rank=rank, seq=0, step=step)


def training(
    *,
    ranks: int = 1,
    steps: int = 4,
    seed: int = 7,
    rate: Callable[[int, int], float] = lambda rank, step: 0.1 / step,
    flags: dict[str, Any] | None = None,
    samplers: dict[str, Any] = SAMPLERS,
    state: Sequence[str] = (),
    attempt: int = 0,
    loaders: int = 1,
    hyper: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> list[Evidence]:
    """As much of the records of a run as tells of its course."""
    made = []
    for rank in range(ranks):
        env = {"TORCHELASTIC_RESTART_COUNT": str(attempt)}
        made.append(record("process", {"hello": {"env": env}}, rank=rank))
        for number in range(loaders):
            loader = {"loader": number, "epoch": 0, "kind": "map", "dataset": "Table", "samplers": samplers}
            made.append(record("loader", loader | {"state": f"{seed:016x}.3"}, rank=rank))
    for step in range(1, steps + 1):
        for rank in range(ranks):
            body: dict[str, Any] = {"opt": 0, "index": step, "gradients": {"world": ranks}}
            if step == 1:
                group = hyper(GROUP | {"lr": rate(rank, 1)})
                body["hyperparameters"] = {"groups": [group], "class": "torch.optim.sgd.SGD", "schedulers": []}
                body["rng"] = {"seed": seed, "torch": f"{seed:016x}.9"}
                body["modules"] = {"flags": {"deterministic_algorithms": False, "num_threads": 2} | (flags or {})}
                body["optimizer"] = {"state": [list(state)]}
            else:
                body["hyperparameters"] = {"changed": [[0, "lr", rate(rank, step)]]}
            made.append(record("step", body, rank=rank, step=step))
    return made


def plan_of(*runs: list[Evidence]) -> Approved:
    return agreed([told_by(f"run-{number}", records) for number, records in enumerate(runs)])


def held_to(
    plan: Approved | None, records: Sequence[Evidence], *approved: str
) -> tuple[list[Finding], dict[str, LinkState]]:
    """What the check says of these records under a lock with this plan."""
    lock = lock_of(plan)
    policy = Policy(approve=tuple(Approval(check="plan", place=place) for place in approved))
    check = Plan(Context(run="run", policy=policy, blob={lock.digest: lock.data}.__getitem__))
    start = Evidence(n=0, at=0, source="supervisor", kind="start", body={"lock": lock.digest})
    findings = [finding for each in (start, *records) for finding in check.see(each)]
    states = {}
    for outcome in check.end():
        if isinstance(outcome, Finding):
            findings.append(outcome)
        else:
            states[outcome.link] = outcome
    return findings, states


def test_a_run_that_goes_as_the_references_did_holds() -> None:
    findings, states = held_to(plan_of(training(), training()), training())
    assert findings == []
    assert (states["plan"].state, states["plan"].required) == ("held", True)
    assert states[COURSE].state == "held"
    assert states["plan"].held > 8
    assert states[COURSE].held > 8


@pytest.mark.parametrize(
    ("change", "techniques", "said"),
    [
        ({"seed": 8}, {"D1"}, "seed of torch is 8, planned 7"),
        ({"rate": lambda rank, step: 0.05 / step}, {"C3"}, "lr is 0.05, planned 0.1"),
        ({"rate": lambda rank, step: 0.1 / step * (0.5 if step == 3 else 1)}, {"C3"}, "lr at update 3"),
        ({"flags": {"deterministic_algorithms": True}}, {"A10"}, "flag deterministic_algorithms is true"),
        ({"samplers": SAMPLERS | {"batch": 8}}, {"D2"}, "BatchSampler batch is 8, planned 16"),
        ({"samplers": SAMPLERS["of"]}, {"D2"}, "samplers is"),
        ({"loaders": 2}, {"D2"}, "loader 1 data set"),
        ({"loaders": 0}, {"D2"}, "loader 0 never came"),
        ({"hyper": lambda group: group | {"momentum": 0.8}}, {"C4", "C3"}, "momentum is 0.8, planned 0.9"),
    ],
)  # fmt: skip
def test_a_departure_is_suspicious_and_told_with_both_values(
    change: dict[str, Any], techniques: set[str], said: str
) -> None:
    findings, states = held_to(plan_of(training(), training()), training(**change))
    assert {finding.techniques[0] for finding in findings} <= techniques
    assert findings[0].techniques[0] in techniques
    assert {finding.outcome for finding in findings} == {"suspicious"}
    assert said in "; ".join(finding.message for finding in findings)
    assert "broken" in {states["plan"].state, states[COURSE].state}


def test_a_rate_is_told_once_where_it_parts() -> None:
    late = training(steps=9, rate=lambda rank, step: 0.1 / step * (0.7 if step > 4 else 1))
    findings, states = held_to(plan_of(training(steps=9), training(steps=9)), late)
    assert [(finding.subject.step, finding.techniques) for finding in findings] == [(5, ("C3",))]
    assert states[COURSE].broken == 5


def test_how_many_threads_a_machine_has_is_its_own() -> None:
    findings, _ = held_to(plan_of(training(), training()), training(flags={"num_threads": 64}))
    assert findings == []


def test_a_rate_of_the_same_formula_on_another_machine_is_the_same() -> None:
    nearly = training(rate=lambda rank, step: 0.1 / step * (1 + 1e-15))
    assert held_to(plan_of(training(), training()), nearly)[0] == []


def test_what_the_references_differ_in_is_held_to_nothing() -> None:
    plan = plan_of(training(seed=1), training(seed=2))
    assert {"seed of torch", "stream torch at the first step", "loader 0 order begins at"} == set(plan.varied)
    assert held_to(plan, training(seed=3))[0] == []


def test_an_approved_departure_is_explained() -> None:
    findings, states = held_to(plan_of(training(), training()), training(steps=1, seed=8), "seed of torch")
    assert states["plan"].explained == ("seed of torch",)
    assert all("seed of torch is" not in finding.message for finding in findings)


# -- what goes on from saved state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [{"state": ("momentum_buffer",)}, {"attempt": 1}])
def test_of_a_resumed_run_only_what_moves_is_not_held(resumed: dict[str, Any]) -> None:
    findings, states = held_to(plan_of(training(), training()), training(seed=7, rate=lambda r, s: 0.01, **resumed))
    assert findings == []
    assert states["plan"].state == "held"
    assert states[COURSE].state == "blind"
    assert "streams, order and rates" in states[COURSE].blind[0]
    findings, _ = held_to(plan_of(training(), training()), training(samplers=SAMPLERS | {"batch": 8}, **resumed))
    assert [finding.techniques for finding in findings] == [("D2",)]


# -- ranks ----------------------------------------------------------------------------------------------------------


def test_a_rank_of_its_own_rate_is_named() -> None:
    plan = plan_of(training(ranks=2), training(ranks=2))
    findings, _ = held_to(plan, training(ranks=2, rate=lambda rank, step: (0.1 if rank == 0 else 0.2) / step))
    assert {finding.subject.rank for finding in findings} == {1}


def test_another_number_of_ranks_than_the_references_had_is_not_held() -> None:
    findings, states = held_to(plan_of(training(ranks=2), training(ranks=2)), training(ranks=4))
    assert findings == []
    assert states["plan"].state == "blind"
    assert "runs with 2 ranks, this one has 4" in states["plan"].blind[0]


def test_what_two_sizes_have_in_common_is_held_at_any() -> None:
    """F4: what begins at many ranks only."""
    scaled = lambda ranks: lambda rank, step: 0.1 * ranks / step  # noqa: E731
    plan = plan_of(training(ranks=1, rate=scaled(1)), training(ranks=2, rate=scaled(2)))
    assert held_to(plan, training(ranks=8, rate=scaled(8)))[0] == []
    findings, _ = held_to(plan, training(ranks=8, rate=scaled(8), seed=9))
    assert findings[0].techniques == ("D1",)
    assert "optimizer 0 lr" in plan.varied


def test_a_rank_beyond_those_of_the_references_is_held_to_what_all_have() -> None:
    plan = plan_of(training(ranks=1), training(ranks=2))
    findings, _ = held_to(plan, training(ranks=3, rate=lambda rank, step: (0.1 if rank < 2 else 0.3) / step))
    assert {finding.subject.rank for finding in findings} == {2}


def test_what_every_rank_has_of_its_own_is_held_rank_by_rank() -> None:
    own = lambda rank, step: 0.1 * (rank + 1) / step  # noqa: E731
    plan = plan_of(training(ranks=2, rate=own), training(ranks=2, rate=own))
    assert plan.values["rank 1: optimizer 0 lr"] == "0.2"
    assert held_to(plan, training(ranks=2, rate=own))[0] == []


def test_a_second_training_as_the_same_rank_is_said_to_be_unheld() -> None:
    plan = plan_of(training(), training())
    second = [msgspec.structs.replace(each, process=5) for each in training(seed=99)]
    findings, states = held_to(plan, [*training(), *second])
    assert findings == []
    assert states["plan"].blind == ("several processes train as rank 0; only the first was held to the plan",)


# -- locks ----------------------------------------------------------------------------------------------------------


def test_without_a_plan_nothing_is_asked() -> None:
    findings, states = held_to(None, training())
    assert findings == []
    assert list(states) == ["plan"]
    assert (states["plan"].required, states["plan"].held) == (False, 0)


def test_a_lock_keeps_its_plan_and_an_edited_one_is_refused() -> None:
    plan = plan_of(training(), training())
    lock = lock_of(plan)
    assert parse_lock(lock.data, where="lock").plan == plan
    with pytest.raises(VerificationError, match="edited"):
        parse_lock(lock.data.replace(b'"seed of torch": "7"', b'"seed of torch": "8"'), where="lock")
    assert b'"plan"' not in lock_of(None).data


@pytest.mark.parametrize("wrong", [{"values": {"x": "{"}}, {"worlds": ()}, {"runs": ()}])
def test_a_plan_that_no_judge_can_read_is_refused(wrong: dict[str, Any]) -> None:
    plan = msgspec.structs.replace(plan_of(training(), training()), **wrong)
    with pytest.raises(MalformedEvidence, match="plan"):
        parse_lock(lock_of(plan).data, where="lock")


def test_a_plan_in_a_lock_that_is_gone_is_blind() -> None:
    def gone(digest: str) -> bytes:
        raise VerificationError(f"no blob {digest}")

    check = Plan(Context(run="run", policy=Policy(), blob=gone))
    lock = sha256_hex(b"gone")
    assert list(check.see(Evidence(n=0, at=0, source="supervisor", kind="start", body={"lock": lock}))) == []
    (state,) = check.end()
    assert isinstance(state, LinkState)
    assert (state.state, state.required) == ("blind", True)


# -- records that are none -------------------------------------------------------------------------------------------

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LINKS = ("hyperparameters", "rng", "modules", "optimizer", "gradients", "replicas")
FIELDS = ("opt", "index", "loader", "epoch", "samplers", "state", "hello", "kind", *LINKS)
BODY = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, ANY))


@given(st.lists(st.tuples(st.sampled_from(["process", "loader", "step", "opened"]), BODY), max_size=6))
def test_no_record_raises(made: list[tuple[str, dict[str, Any]]]) -> None:
    records = [record(kind, body, step=number) for number, (kind, body) in enumerate(made)]
    _, states = held_to(plan_of(training(), training()), records)
    assert "plan" in states


def test_rates_are_told_often_at_first_and_then_eight_times_in_a_doubling() -> None:
    told = [index for index in range(1, 1025) if is_told(index)]
    assert told[:32] == list(range(1, 33))
    assert [sum(2**n < index <= 2 ** (n + 1) for index in told) for n in range(5, 10)] == [8] * 5


def test_values_of_other_types_are_others() -> None:
    assert same("[0.1,1]", "[0.1000000000000001,1]")
    assert not same("1", "true")
    assert not same("0", "0.1")
    assert not same("[1]", "[1,2]")


def test_a_run_that_cannot_be_a_reference_says_why() -> None:
    assert "no process" in told_by("run", []).problem
    assert "started again" in told_by("run", training(attempt=1)).problem
    two: list[Evidence] = [*training(), *(msgspec.structs.replace(each, process=5) for each in training())]
    assert "trained as one rank" in told_by("run", two).problem
    assert isinstance(told_by("run", training()), Told)
