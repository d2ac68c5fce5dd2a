"""`Trainer(callbacks=[TrainguardCallback()])`: the Trainer's names, epochs and logged metrics in the record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from trainguard.integrations import label, metric

ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "weight_decay",
    "seed",
    "data_seed",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
)
"""Arguments of the Trainer that a reader of the record looks for."""


class TrainguardCallback(TrainerCallback):  # type: ignore[misc]
    """Adds names, epochs and metrics; changes nothing and decides nothing. Idle outside `trainguard run`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """The model's class and the arguments that steer the optimizer."""
        label("transformers", dict(_names(args, objects.get("model"))))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Whatever the Trainer logs, at the current step."""
        metric("transformers", logs or {}, epoch=state.epoch)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Which of the Trainer's own steps a checkpoint belongs to."""
        label("transformers", {"saved at": state.global_step})


def _names(args: Any, model: Any) -> Iterator[tuple[str, Any]]:
    if model is not None:
        yield "model", type(model).__name__
    for name in ARGUMENTS:
        value = getattr(args, name, None)
        if value is not None:
            yield name, getattr(value, "value", value)
