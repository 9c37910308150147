"""The norm of the gradients as a curve: `train/grad_norm`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor


class GradientNorm(Callback):
    """Logs the norm of all gradients of an optimizer step, before clipping, once in `trainer.log_every_n_steps`.

    On sharded parameters it is the norm of the whole gradients, which costs an all-reduce. DeepSpeed keeps its
    gradients to itself: nothing is logged there.
    """

    only_looks = True
    """Tells the training loop that it changes nothing."""

    def __init__(self, norm_type: float = 2.0) -> None:
        self.norm_type = norm_type

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients, self.norm_type)
        pl_module.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
