"""D4: labels and batches changed between the data set and the loss."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.helpers.loading import BATCH, ROWS, Table, fit
from tests.helpers.recorded import judge, recording
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data._utils import collate as collate_module
from torch.utils.data.dataloader import _BaseDataLoaderIter

from trainguard.appraise.batches import Batches
from trainguard.appraise.order import Order
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.policy import Approval, Policy

pytestmark = pytest.mark.torch

HONEST: Any = collate_module.default_collate


def findings_of(records: list[Evidence], policy: Policy | None = None) -> list[Finding]:
    """Findings of the check; the order of the samples is right in every case here."""
    assert judge(Order, records)[0] == []
    return judge(Batches, records, policy)[0]


def flipping(part: float, seed: int = 5) -> Any:
    """A function that makes batches and flips a part of the labels."""
    dice = random.Random(seed)

    def collate(samples: list[Any]) -> Any:
        x, y = HONEST(samples)
        wrong = torch.tensor([dice.random() < part for _ in samples])
        return x, torch.where(wrong, (y + 1) % 3, y)

    return collate


def test_one_label_in_a_hundred_flipped_where_batches_are_made_is_found_with_samples() -> None:
    """The toy of the catalogue, in a collate function: the message names sample, label and function."""
    findings = findings_of(
        fit(DataLoader(Table(), batch_size=BATCH, shuffle=True, collate_fn=flipping(0.01)), passes=2)
    )
    assert findings
    assert {(f.outcome, f.techniques) for f in findings} == {("suspicious", ("D4",))}
    assert any("sample" in f.message and "test_batches.py" in f.message for f in findings)


def test_torchs_own_function_changed_in_place_is_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is still torch's file and name, but the numbers that come out are not the numbers that went in."""
    honest = collate_module.collate

    def turned(batch: Any, **kwargs: Any) -> Any:
        out = honest(batch, **kwargs)
        if isinstance(out, list):
            out[-1][0] = (out[-1][0] + 1) % 3
        return out

    monkeypatch.setattr(collate_module, "collate", turned)
    findings = findings_of(fit(passes=1))
    assert (findings[0].outcome, findings[0].techniques) == ("violated", ("D4",))


def test_labels_that_change_from_pass_to_pass_are_found() -> None:
    """The data set itself answers wrongly for one sample in fifty, each time for others."""
    dice = random.Random(3)

    class Flipped(Table):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            x, y = super().__getitem__(index)
            return x, (y + 1) % 3 if dice.random() < 0.02 else y

    findings = findings_of(fit(DataLoader(Flipped(), batch_size=BATCH, shuffle=True)))
    assert findings
    assert {(f.outcome, f.techniques) for f in findings} == {("suspicious", ("D4",))}
    assert "first seen" in findings[0].message


class Anew:
    """A script that makes its loader anew for every pass over one data set."""

    def __init__(self, data: Table) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.data, batch_size=BATCH, shuffle=True))


def test_labels_that_change_from_pass_to_pass_are_found_where_each_pass_has_a_loader_of_its_own() -> None:
    """The data set is one; which loader asks it makes no difference to its labels."""
    table = Table()

    def turn(number: int) -> None:
        if number == 2:
            table.y[::40] = (table.y[::40] + 1) % 3

    findings = findings_of(fit(Anew(table), passes=3, before_pass=turn))
    assert findings
    assert {(f.outcome, f.techniques) for f in findings} == {("suspicious", ("D4",))}


@pytest.mark.parametrize("loader", [None, "anew"])
@pytest.mark.parametrize("rows", [1, BATCH])
def test_labels_changed_between_loader_and_loss_are_read_from_the_gradient(rows: int, loader: str | None) -> None:
    """One label of a batch, or all of them permuted, from some step on; also where every pass has a new loader."""

    def change(step: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if step <= ROWS // BATCH:
            return x, y
        wrong = y.clone()
        wrong[:rows] = (wrong[:rows] + 1) % 3
        return x, wrong

    findings = findings_of(fit(Anew(Table()) if loader else None, change=change))
    assert findings
    assert {(f.outcome, f.techniques) for f in findings} == {("suspicious", ("D4",))}
    assert 20 < (findings[0].subject.step or 0) <= 40
    assert "loss" in findings[0].message


def test_a_patched_loss_that_uses_other_labels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the script holds is changed: the loss function itself turns one label of every batch."""
    honest = functional.cross_entropy

    def turned(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = target.clone()
        target[0] = (target[0] + 1) % 3
        return honest(output, target)

    findings = findings_of(fit(passes=1, loss=turned))
    assert findings
    assert all("loss" in f.message for f in findings)


def test_another_batch_in_the_place_of_the_one_that_was_made_is_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iterator hands over the last batch again; order and making are right."""
    honest: Any = torch.utils.data.dataloader._SingleProcessDataLoaderIter._next_data
    last: list[Any] = []

    def again(self: _BaseDataLoaderIter) -> Any:
        last.append(honest(self))
        return last[-2] if len(last) == 6 else last[-1]

    again.__name__ = "_next_data"
    monkeypatch.setattr(torch.utils.data.dataloader._SingleProcessDataLoaderIter, "_next_data", again)
    findings = findings_of(fit(passes=1))
    assert {(f.outcome, f.subject.step) for f in findings} == {("violated", 6)}
    assert "handed over" in findings[0].message


def test_inputs_changed_between_loader_and_model_are_suspicious() -> None:
    """Batches arrive at the model as they were, but for a few."""

    def change(step: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * 2, y) if 48 <= step < 52 else (x, y)

    findings = findings_of(fit(change=change, passes=5))
    assert {f.outcome for f in findings} == {"suspicious"}
    assert {48 <= (f.subject.step or 0) < 52 for f in findings} == {True}
    assert "model" in findings[0].message


def test_an_approved_function_may_make_labels() -> None:
    """The policy names its file; the link says so."""
    records = fit(DataLoader(Table(), batch_size=BATCH, shuffle=True, collate_fn=flipping(0.05)), passes=1)
    policy = Policy(approve=(Approval(check="batches", place="attacks/test_batches.py"),))
    findings, states = judge(Batches, records, policy)
    assert findings == []
    assert any("test_batches.py" in place for place in states["batches"].explained)


def mixed(step: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup with soft labels."""
    part = 0.1 + 0.8 * random.Random(step).random()
    soft = functional.one_hot(y, 3).float()
    return part * x + (1 - part) * x.flip(0), part * soft + (1 - part) * soft.flip(0)


def noisy(step: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An augmentation on the way."""
    return x + 0.1, y


def smooth(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Label smoothing."""
    return functional.cross_entropy(output, target, label_smoothing=0.2)


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Regression on one-hot labels."""
    return functional.mse_loss(output, functional.one_hot(target, 3).float())


def dominant(step: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole batches now and then paired with other labels."""
    return (x, y) if random.Random(step).random() < 0.5 else (x.flip(0), y.flip(0))


class Redrawn(Table):
    """Labels drawn at every access, as in contrastive learning."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index], random.randint(0, 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"change": mixed},
        {"change": noisy},
        {"change": dominant},
        {"loss": smooth, "dropout": 0.0},
        {"loss": squared},
        {"loss": lambda o, t: functional.binary_cross_entropy_with_logits(o[:, 0], (t > 0).float()), "outputs": 1},
        {"loader": lambda: Anew(Table())},
        {"loader": lambda: Anew(Redrawn())},
        {"loader": lambda: DataLoader(Redrawn(), batch_size=BATCH, shuffle=True)},
        {"loader": lambda: DataLoader(Table(), batch_size=BATCH, collate_fn=flipping(0.7))},
    ],
    ids=[
        "plain",
        "mixup",
        "noise",
        "pairs",
        "smoothing",
        "regression",
        "binary",
        "anew",
        "anew, drawn",
        "drawn labels",
        "own labels",
    ],
)
def test_honest_ways_with_labels_and_batches_are_quiet(options: dict[str, Any]) -> None:
    """Mixed, smoothed, drawn or replaced labels: nothing is claimed; plain ones hold."""
    if "loader" in options:
        options = {**options, "loader": options["loader"]()}
    findings, states = judge(Batches, fit(passes=3, **options))
    assert findings == []
    assert states["batches"].held > ROWS // BATCH
    assert not states["batches"].required


@pytest.mark.parametrize(("ahead", "turned"), [(1, False), (3, False), (1, True)])
def test_a_trainer_that_fetches_ahead_is_not_accused_and_hides_no_turned_label(ahead: int, turned: bool) -> None:
    """The loss may be of a batch that was delivered before we listened; which one it is, its inputs say."""
    waiting: list[Any] = []

    def late(step: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wrong = (y + 1) % 3 if turned and step > 20 else y
        waiting.append((x, wrong))
        return waiting.pop(0) if len(waiting) > ahead else waiting[0]

    records = fit(passes=3, change=late)
    losses = [record.body.get("batches", {}).get("loss") for record in records if record.kind == "step"]
    assert turned or all(loss["given"] == loss["used"] for loss in losses if loss is not None)
    findings, states = judge(Batches, records)
    assert bool(findings) is turned
    assert {f.techniques for f in findings} <= {("D4",)}
    assert states["batches"].held > ROWS // BATCH


def test_plain_labels_hold_from_the_data_set_to_the_loss() -> None:
    """Every link of the chain is held, without a blind spot."""
    findings, states = judge(Batches, fit(passes=2))
    assert findings == []
    assert (states["batches"].state, states["batches.labels"].state) == ("held", "held")
    assert states["batches.labels"].held >= 12


def test_several_models_that_are_fitted_to_one_batch_by_turns_are_quiet() -> None:
    """A comparison of optimizers: each has its own model, and all take each batch."""
    torch.set_num_threads(1)
    with recording(links="governed", credit_seconds=0.0, budget_percent=100.0) as recorder:
        nets = [torch.nn.Sequential(torch.nn.Linear(8, 3)) for _ in range(4)]
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
        for _ in range(6):
            for x, y in DataLoader(Table(), batch_size=BATCH, shuffle=True):
                for net, optimizer in zip(nets, optimizers, strict=True):
                    optimizer.zero_grad()
                    functional.cross_entropy(net(x), y).backward()
                    optimizer.step()
    looks = [r.body["batches"]["model"] for r in recorder.records if "model" in r.body.get("batches", ())]
    assert len(looks) > 50
    assert all(compared == equal for *_, compared, equal in looks)
    assert judge(Batches, recorder.records)[0] == []
