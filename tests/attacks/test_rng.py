"""D1: random streams seeded again, put back or stopped while the run goes on."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.loading import BATCH, Table, fit
from tests.helpers.recorded import judge
from tests.helpers.training import Run, looks_fine, train
from torch.utils.data import DataLoader, Dataset

from trainguard.appraise import walks
from trainguard.appraise.gradients import Gradients
from trainguard.appraise.optimizer import Optimizer
from trainguard.appraise.rng import Rng
from trainguard.appraise.weights import Weights
from trainguard.evidence import Evidence
from trainguard.policy import Approval, Policy

pytestmark = pytest.mark.torch


def quiet_controls(run: Run) -> None:
    """Nothing else departs: every other link holds, and the loss falls."""
    assert looks_fine(run)
    for check in (Gradients, Optimizer, Weights):
        findings, states = judge(check, run.records)
        assert findings == []
        assert states[check.name].state == "held"


def reseed(run: Run) -> None:
    """The toy of the catalogue, with a fixed number for the clock."""
    if run.step == 50:
        torch.manual_seed(1763800000)


def test_a_new_seed_in_the_middle_is_found_at_the_next_step_with_the_line_that_set_it() -> None:
    """manual_seed(time) at step 50."""
    run = train(80, after_step=reseed)
    quiet_controls(run)
    findings, _ = judge(Rng, run.records)
    assert [(f.subject.step, f.techniques, f.outcome) for f in findings] == [(51, ("D1",), "violated")]
    assert "test_rng.py" in (findings[0].subject.path or "")
    assert "1763800000" in findings[0].message


def test_the_old_seed_set_again_is_found_too() -> None:
    """The seed torch reports stays the same; the call and the repeated states do not."""

    def again(run: Run) -> None:
        if run.step == 50:
            torch.manual_seed(0)

    findings, _ = judge(Rng, train(80, after_step=again).records)
    assert [(f.subject.step, f.outcome) for f in findings] == [(51, "violated")]


def test_a_state_put_back_is_found() -> None:
    """No seed at all: the generator is returned to where it stood ten steps before."""
    kept: list[torch.Tensor] = []

    def back(run: Run) -> None:
        if run.step == 30:
            kept.append(torch.get_rng_state())
        if run.step == 40:
            torch.set_rng_state(kept[0])

    findings, _ = judge(Rng, train(60, after_step=back).records)
    assert [(f.outcome, f.techniques) for f in findings] == [("violated", ("D1",))]
    assert "put back" in findings[0].message


def test_a_frozen_stream_is_suspicious_after_three_steps() -> None:
    """The same noise for every batch."""
    kept: list[torch.Tensor] = []

    def freeze(run: Run) -> None:
        if run.step == 30:
            kept.append(torch.get_rng_state())
        if run.step > 30:
            torch.set_rng_state(kept[0])

    findings, _ = judge(Rng, train(50, after_step=freeze).records)
    assert findings[0].techniques == ("D1",)
    assert 33 <= (findings[0].subject.step or 0) <= 35


def test_seeding_every_epoch_from_one_line_is_a_habit() -> None:
    """Honest, if unwise: explained, no finding."""

    def epochs(run: Run) -> None:
        if run.step % 20 == 0:
            torch.manual_seed(run.step)

    findings, states = judge(Rng, train(90, after_step=epochs).records)
    assert findings == []
    assert states["rng"].state == "explained"


def test_an_approved_line_may_seed_once() -> None:
    """The policy names it."""
    policy = Policy(approve=(Approval(check="rng", place="attacks/test_rng.py"),))
    findings, states = judge(Rng, train(80, after_step=reseed).records, policy)
    assert findings == []
    assert states["rng"].state == "explained"


def test_a_state_that_no_drawing_reaches_is_found_although_the_seed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stream under the old seed: nothing was seeded, and no state was there before."""

    def replace(run: Run) -> None:
        if run.step == 30:
            other = torch.Generator().manual_seed(99)
            torch.rand(1000, generator=other)
            state = torch.get_rng_state()
            state[8:] = other.get_state()[8:]
            torch.set_rng_state(state)

    run = train(50, after_step=replace)
    quiet_controls(run)
    findings, _ = judge(Rng, run.records)
    assert [(f.subject.step, f.techniques, f.outcome) for f in findings] == [(31, ("D1",), "suspicious")]
    assert "not reached by drawing" in findings[0].message


def test_a_stream_put_back_before_every_step_stands_still_and_a_later_phase_without_draws_does_not() -> None:
    """The same dropout mask for ever, by a hidden hand; then another optimizer, over a model that drops nothing."""

    def put_back(run: Run) -> None:
        if run.step == 20:
            run.kept = torch.get_rng_state()  # type: ignore[attr-defined]
        elif run.step > 20:
            torch.set_rng_state(run.kept)  # type: ignore[attr-defined]

    def later(run: Run) -> None:
        if run.step == 20:
            run.net.eval()
            run.optimizer = torch.optim.SGD(run.net.parameters(), lr=0.01)

    findings, _ = judge(Rng, train(30, after_step=put_back).records)
    assert [(f.outcome, f.techniques) for f in findings] == [("suspicious", ("D1",))]
    assert "stands still since step 21" in findings[0].message
    findings, states = judge(Rng, train(40, after_step=later).records)
    assert (findings, states["rng"].state) == ([], "held")


@pytest.mark.parametrize("name", ["numpy", "python"])
def test_numpy_or_python_seeded_again_is_found_with_the_seed(name: str) -> None:
    """Their streams are walked as well; a usual seed is named."""

    def seed(run: Run) -> None:
        if run.step == 20:
            np.random.seed(1337) if name == "numpy" else random.seed(1337)
        np.random.random(3)
        random.random()

    before = np.random.get_state(), random.getstate()
    try:
        findings, _ = judge(Rng, train(40, after_step=seed).records)
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])
    assert [(f.outcome, f.techniques, f.subject.step) for f in findings] == [("suspicious", ("D1",), 25)]
    assert f"{name}'s global generator was seeded again with 1337" in findings[0].message


def test_the_same_seed_at_even_distances_is_no_harmless_habit() -> None:
    """The same noise for every twenty steps, by a hidden hand: the distances excuse nothing."""

    def again(run: Run) -> None:
        if run.step % 20 == 0:
            torch.manual_seed(7)

    findings, _ = judge(Rng, train(90, after_step=again).records)
    assert {(f.outcome, f.techniques) for f in findings} == {("suspicious", ("D1",))}
    assert "same seed" in findings[0].message


def test_a_fork_that_is_undone_is_held() -> None:
    """An evaluation with a seed of its own, and the stream goes on where it was."""

    def evaluate(run: Run) -> None:
        if run.step in (13, 30):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                torch.rand(100)

    findings, states = judge(Rng, train(40, after_step=evaluate).records)
    assert findings == []
    assert states["rng"].state == "held"


def test_many_numbers_drawn_between_two_steps_are_no_departure() -> None:
    """Half a million at once, as for images made of noise."""

    def draw(run: Run) -> None:
        if run.step == 25:
            torch.rand(500_000)

    findings, states = judge(Rng, train(30, after_step=draw).records)
    assert findings == []
    assert states["rng"].state == "held"


def heavy(run: Run) -> None:
    """More numbers in every step than the judge of the next tests will walk."""
    torch.rand(5_000)


def test_a_training_that_always_draws_more_than_a_judge_walks_is_not_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on the CPU draws two numbers an element: millions in every step. The link says that it was not walked."""
    monkeypatch.setattr(walks, "MOST_BLOCKS", 4)
    monkeypatch.setattr(walks, "LEAST_BLOCKS", 4)
    findings, states = judge(Rng, train(20, after_step=heavy).records)
    assert findings == []
    assert any("more between two steps than a judge walks" in reason for reason in states["rng.numpy"].blind)


def test_one_long_draw_of_a_training_that_draws_much_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation with noise, four times as long as a step: too near to what is usual to be called a departure."""
    monkeypatch.setattr(walks, "MOST_BLOCKS", 30)

    def draw(run: Run) -> None:
        heavy(run)
        if run.step == 12:
            torch.rand(25_000)

    findings, _ = judge(Rng, train(20, after_step=draw).records)
    assert findings == []


def test_a_base_seed_that_torch_did_not_draw_is_suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody gives the workers another seed: what they draw for their samples is no longer what the seed says."""
    records = fit(passes=2)
    record = next(r for r in records if r.kind == "loader" and r.body.get("epoch") == 1)
    record.body["base_seed"] += 1
    findings, _ = judge(Rng, records)
    assert [(f.outcome, f.techniques) for f in findings] == [("suspicious", ("D1",))]
    assert "base seed" in findings[0].message


def test_a_worker_seeded_again_while_it_works_is_suspicious() -> None:
    """What a worker says at its first batch, and later something else."""
    records = fit(passes=1)

    def said(seed: int) -> Evidence:
        body = {"base_seed": 100, "worker": 1, "seed": seed}
        return Evidence(n=0, at=0, source="process", kind="worker", body=body, process=5, rank=None, seq=0)

    findings, _ = judge(Rng, [*records, said(101)])
    assert findings == []
    findings, _ = judge(Rng, [*records, said(101), said(4)])
    assert [(f.outcome, f.techniques) for f in findings] == [("suspicious", ("D1",))]


def test_steps_that_a_guard_short_of_time_did_not_read_are_no_departure(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a stretch of steps is not looked at: all that they draw lies between two readings."""
    monkeypatch.setattr(walks, "MOST_BLOCKS", 100)
    monkeypatch.setattr(walks, "LEAST_BLOCKS", 4)
    records = [record for record in train(60, after_step=heavy).records if record.step not in range(20, 50)]
    findings, states = judge(Rng, records)
    assert findings == []
    assert any("more between two steps than a judge walks" in reason for reason in states["rng.numpy"].blind)


@pytest.mark.parametrize(("drops", "found"), [(0.0, []), (0.3, ["D1"])])
def test_another_pass_over_data_that_draw_no_numbers_stands_still_and_dropout_must_not(
    drops: float, found: list[str]
) -> None:
    """Augmentation in this process for two passes, then the plain table; a stream held still is another matter."""

    class Augmented(Dataset[Any]):
        def __init__(self, table: Table) -> None:
            self.table, self.plain = table, False

        def __len__(self) -> int:
            return len(self.table)

        def __getitem__(self, index: int) -> Any:
            x, y = self.table[index]
            return (x if self.plain else x + 0.1 * torch.randn_like(x)), y

    data = Augmented(Table())
    held: list[torch.Tensor] = []

    def before_pass(number: int) -> None:
        data.plain = number > 1

    def after_step(step: int) -> None:
        if data.plain and drops:
            held.append(torch.get_rng_state())
            torch.set_rng_state(held[0])

    loader = DataLoader(data, batch_size=BATCH)
    records = fit(loader, passes=3, before_pass=before_pass, after_step=after_step, dropout=drops)
    for record in records:
        if "dropout" in record.body.get("rng", {}):  # models of other tests may live in this process
            record.body["rng"]["dropout"] = drops > 0
    findings, _ = judge(Rng, records)
    assert sorted({finding.techniques[0] for finding in findings}) == found
