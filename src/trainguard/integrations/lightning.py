"""Lightning's callback; loaded by itself through Lightning's entry point wherever trainguard is installed.

`TRAINGUARD_LIGHTNING=0` switches it off. Outside `trainguard run` the entry point adds no callback at all.
"""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.callbacks import Callback

from trainguard.integrations import guarded, label, metric


class TrainguardCallback(Callback):  # type: ignore[misc]
    """Adds names, epochs and metrics; changes nothing, keeps no state, decides nothing."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The module's class and the trainer's limits."""
        names = {
            "module": type(pl_module).__name__,
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
        }
        label("lightning", {name: value for name, value in names.items() if value is not None})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The metrics that the module logged, once an epoch, read from CPU only."""
        metric("lightning", _plain(trainer.logged_metrics), epoch=trainer.current_epoch)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Which of Lightning's own steps a checkpoint belongs to."""
        label("lightning", {"saved at": trainer.global_step})


def callbacks() -> list[Callback]:
    """The entry point: one callback in a guarded process, none elsewhere or where it is switched off."""
    if not guarded() or os.environ.get("TRAINGUARD_LIGHTNING") == "0":
        return []
    return [TrainguardCallback()]


def _plain(metrics: Any) -> dict[str, float]:
    """Numbers of zero-dimensional CPU tensors; those on a device are left out, reading them would wait for it."""
    return {name: value.item() for name, value in metrics.items() if value.device.type == "cpu" and value.numel() == 1}
