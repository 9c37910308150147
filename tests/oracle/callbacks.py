"""Callbacks as strangers write them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning


class Thaw(BaseFinetuning):
    """Freezes the first layer, and gives it to the optimizer as a group of its own at epoch 1."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(modules=pl_module.net[0], optimizer=optimizer)


class Noise(pl.Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        for number, parameter in enumerate(pl_module.parameters()):
            if parameter.grad is not None:
                parameter.grad.add_(0.01 * (number + 1))


class ClipsLate(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            trainer.gradient_clip_val = 0.01


class StopsAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True


class Counts(pl.Callback):
    """Its state changes what is trained."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.count += 1
        with torch.no_grad():
            next(pl_module.parameters()).add_(0.001 * self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
