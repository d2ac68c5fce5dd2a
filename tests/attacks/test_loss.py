"""C6: the loss is not what the calling line asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.helpers.recorded import judge, recording
from torch import nn

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.loss import Loss
from trainguard.appraise.truth import Truth
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState

pytestmark = pytest.mark.torch
REAL = F.cross_entropy


def classify(steps: int, turn: Callable[[int, nn.Module], None] | None = None, **settings: Any) -> list[Evidence]:
    """Records of a small classifier, two micro-batches to a step; `turn` is called after every step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 5))
    criterion = nn.CrossEntropyLoss(ignore_index=4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    with recording(truth_every=1, **settings) as recorder:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            for _ in range(2):
                x, y = torch.randn(12, 8), torch.randint(5, (12,))
                logits = net(x)
                loss = F.cross_entropy(logits, y, ignore_index=4) + 0.5 * criterion(logits, y)
                (loss / 2).backward()
            optimizer.step()
            if turn is not None:
                turn(step, net)
    return recorder.records


def judged(records: list[Evidence]) -> tuple[list[Finding], LinkState]:
    """What the check says; the gradient is a right derivative of the wrong loss, so the others have nothing to say."""
    for check in (Truth, Gradients):
        assert judge(check, records)[0] == []
    findings, states = judge(Loss, records)
    return findings, states["loss"]


def test_an_honest_loss_holds_with_all_it_is_made_of() -> None:
    """A function, a module with ignored rows, a factor and a division: recomputed, and nothing is left over."""
    records = classify(12)
    findings, link = judged(records)
    assert (findings, link.state) == ([], "held")
    values = [r.body["truth"] for r in records if "losses" in r.body.get("truth", {})]
    assert [call["factor"] for call in values[-1]["losses"]["calls"]] == [0.5, 0.25, 0.5, 0.25]
    assert all(call["used"] < call["rows"] == 12 for call in values[-1]["losses"]["calls"])
    assert abs(values[-1]["losses"]["rest"]) < 1e-5


@pytest.mark.parametrize(
    ("asked", "mean"),
    [
        ({"size_average": False}, False),
        ({"reduce": True}, True),
        ({"size_average": False, "reduce": True}, False),
        ({"size_average": True}, True),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_the_older_words_for_a_reduction_mean_what_they_mean_to_torch(asked: dict[str, bool], mean: bool) -> None:
    """As many older scripts say it: a sum is no wrong mean."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with recording(truth_every=1) as recorder:
        for _ in range(12):
            x, y = torch.rand(8, 6), torch.rand(8, 3)
            optimizer.zero_grad()
            F.binary_cross_entropy(torch.sigmoid(net(x)), y, **asked).backward()
            optimizer.step()
    findings, link = judged(recorder.records)
    assert (findings, link.state) == ([], "held")
    calls = [c for r in recorder.records for c in r.body.get("truth", {}).get("losses", {}).get("calls", [])]
    assert {call["settings"]["reduction"] for call in calls} == {"mean" if mean else "sum"}


def smoothed(x: torch.Tensor, y: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Asked for a plain loss, gives a smoothed one."""
    return REAL(x, y, **{**settings, "label_smoothing": 0.1})


def larger(*given: Any, **settings: Any) -> torch.Tensor:
    """Half as much again."""
    return 1.5 * REAL(*given, **settings)


def without_the_last(x: torch.Tensor, y: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Leaves a row out."""
    return REAL(x[:-1], y[:-1], **settings)


def with_another_aim(x: torch.Tensor, y: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Adds a second objective."""
    return REAL(x, y, **settings) + 0.1 * x[:, 0].square().mean()


@pytest.mark.parametrize("planted", [smoothed, larger, without_the_last, with_another_aim])
def test_a_loss_function_bound_to_another_is_named(
    monkeypatch: pytest.MonkeyPatch, planted: Callable[..., torch.Tensor]
) -> None:
    """B3 with C6, from the first step on: the line says F.cross_entropy, and something else answers."""
    monkeypatch.setattr(F, "cross_entropy", planted)
    findings, _ = judged(classify(4))
    assert findings[0].techniques[0] == "C6"
    assert f"answered by {planted.__name__} at" in findings[0].message
    assert (findings[0].subject.path or "").endswith(f"test_loss.py:{planted.__code__.co_firstlineno}")
    assert findings[0].expected != findings[0].found


def test_the_same_code_not_in_the_lock_is_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code without a file, made by exec: nobody approved it."""
    space: dict[str, Any] = {"real": REAL}
    exec(compile("def other(*a, **k):\n    return 1.5 * real(*a, **k)\n", "<made>", "exec"), space)
    monkeypatch.setattr(F, "cross_entropy", space["other"])
    findings, _ = judged(classify(4))
    assert findings[0].outcome == "violated"


def test_a_changed_constant_inside_torch_is_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: torch's own function smooths although the calling line does not ask for it; no other code answers."""
    real = torch._C._nn.cross_entropy_loss

    def changed(x: Any, y: Any, weight: Any, reduction: Any, ignored: Any, smoothing: float) -> Any:
        return real(x, y, weight, reduction, ignored, smoothing + 0.1)

    monkeypatch.setattr(torch._C._nn, "cross_entropy_loss", changed)
    findings, _ = judged(classify(4))
    assert findings[0].outcome == "violated"
    assert "by its definition" in findings[0].message


def test_a_setting_that_changes_on_the_way_is_suspicious() -> None:
    """C6 at step 8: a module's smoothing is set from outside."""
    settings: list[nn.Module] = []

    def turn(step: int, net: nn.Module) -> None:
        import gc

        if step == 8:
            settings.extend(m for m in gc.get_objects() if type(m) is nn.CrossEntropyLoss and m.ignore_index == 4)
            for module in settings:
                module.label_smoothing = 0.2  # type: ignore[assignment]

    findings, _ = judged(classify(14, turn))
    assert [(f.outcome, f.techniques[0]) for f in findings] == [("suspicious", "C6")]
    assert "label_smoothing went from 0.0 to 0.2" in findings[0].message


def test_a_loss_of_ones_own_is_blind_and_not_accused() -> None:
    """Nothing but operators: no reference, no finding, not required."""
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with recording(truth_every=1) as recorder:
        for _ in range(5):
            optimizer.zero_grad()
            (net(torch.randn(8, 4)) - 1).abs().pow(1.5).mean().backward()
            optimizer.step()
    findings, link = judged(recorder.records)
    assert findings == []
    assert (link.state, link.required) == ("blind", False)


def test_a_loss_of_ones_own_beside_one_of_torch_on_the_same_line_did_not_answer_for_it() -> None:
    """focal(…) + F.cross_entropy(…): each is its own call."""

    def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chosen = F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
        return (-((1 - chosen.exp()) ** 2) * chosen).mean()

    torch.manual_seed(0)
    net = nn.Linear(8, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with recording(truth_every=1) as recorder:
        for _ in range(6):
            x, y = torch.randn(12, 8), torch.randint(5, (12,))
            loss = focal(net(x), y) + F.cross_entropy(net(x), y) + 0.1 * F.mse_loss(net(x), torch.zeros(12, 5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    findings, link = judged(recorder.records)
    assert findings == []
    assert link.broken == 0
