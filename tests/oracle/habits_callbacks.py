"""More callbacks as strangers write them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging


class AveragesLate(WeightAveraging):
    """torch's average from the second epoch on."""

    def __init__(self) -> None:
        super().__init__(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.8))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= 4


class TellsTheEpoch(pl.Callback):
    """Tells the dataset its epoch through the loader that the trainer has."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.datamodule.rows.set_epoch(trainer.current_epoch)


class ChangesBatches(pl.Callback):
    """Mixes a batch in place."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(0.5)


class ReadsMetrics(pl.Callback):
    """Trains by what the metrics said."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).add_(0.01 * float(trainer.callback_metrics["val_loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).mul_(1 + 0.01 * float(trainer.logged_metrics["train_loss"]))


class SwapsWeights(pl.Callback):
    """Validates with other weights than it trains with, as hand-written averages do."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for slow, fast in zip(self.average, pl_module.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.2)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.kept = [p.detach().clone() for p in pl_module.parameters()]
        self._write(pl_module, self.average)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(pl_module, self.kept)

    def _write(self, pl_module: Any, values: Any) -> None:
        for parameter, value in zip(pl_module.parameters(), values, strict=True):
            parameter.data.copy_(value)


class ChangesAccumulation(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.accumulate_grad_batches = 1 + trainer.current_epoch


class SetsTheRate(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (batch_idx + 1)


class ChecksItself(pl.Callback):
    """Runs the network over a batch of the validation loader at an epoch's end."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        loader = trainer.val_dataloaders
        batch = next(iter(loader))
        was = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            value = float(pl_module.loss(batch))
        pl_module.train(was)
        pl_module.log("train_probe", value, sync_dist=True)


def size(batch: Any) -> int:
    return len(batch[0])
