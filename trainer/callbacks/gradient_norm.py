"""Logs the gradient norm as `train/grad_norm`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.runtime.clipping import global_norm


class GradientNorm(Callback):
    """Logs the norm of all gradients of an optimizer step, before clipping, every `trainer.log_every_n_steps`.

    With sharded parameters this is the norm of the full gradients, which takes an all-reduce. Nothing is logged under
    DeepSpeed, which does not expose its gradients.

    Args:
        norm_type: Order of the norm; 2.0 is the L2 norm.
    """

    read_only = True
    """Hooks change nothing in place, so the loop need not copy the loss for them (`train/loop_plan.py`)."""

    def __init__(self, norm_type: float = 2.0) -> None:
        self.norm_type = norm_type

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Log the norm before a logged step."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if not gradients:
            return
        pl_module.log("train/grad_norm", global_norm(gradients, self.norm_type))
