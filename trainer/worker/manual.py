"""What changes for a module that optimizes manually, and for callbacks that accumulate by themselves.

`data.batch_size` is the global batch, cut into micro-batches where `data.micro_batch` says so. Under automatic
optimization the loop steps after the last of them. Under manual optimization the module is given each of them, and
steps when it will: Lightning refuses `accumulate_grad_batches` there.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from trainer.config.batch import BatchPlan
from trainer.errors import UserError


def adapt(trainer: Trainer, module: LightningModule, plan: BatchPlan) -> None:
    """Call it before `trainer.fit`, once the Trainer has its callbacks.

    Raises UserError for what Lightning would refuse in the words of its Trainer's arguments.
    """
    schedulers = [one for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if module.automatic_optimization:
        if schedulers and plan.accumulate > 1:
            raise UserError(
                f"callbacks: GradientAccumulationScheduler, with data.batch_size={plan.global_batch} in"
                f" {plan.accumulate} micro-batches: both say how many batches make an optimizer step",
                f"remove the callback, or write data.batch_size={plan.world_size * plan.micro_batch} so that a step is"
                " one micro-batch, which the callback then multiplies",
            )
        return
    if schedulers:
        raise UserError(
            "callbacks: GradientAccumulationScheduler: the module optimizes manually and steps when it will",
            "remove the callback, and accumulate in training_step",
        )
    if trainer.gradient_clip_val:
        kind = "value" if trainer.gradient_clip_algorithm == "value" else "norm"
        key, value = f"trainer.gradient_clip_{'val' if kind == 'value' else kind}", f"{trainer.gradient_clip_val:g}"
        raise UserError(
            f"{key}={value}: the module optimizes manually, where nothing clips its gradients",
            f"write {key}=null, and in training_step, before each step:"
            f' self.clip_gradients(optimizer, gradient_clip_val={value}, gradient_clip_algorithm="{kind}")',
        )
    if plan.accumulate > 1:
        trainer.accumulate_grad_batches = 1
        if trainer.is_global_zero:
            print(
                f"manual optimization: training_step is given each micro-batch of {plan.micro_batch} samples"
                f" ({plan.accumulate} to a global batch) and decides itself when to step",
                flush=True,
            )


def accumulated(callbacks: Sequence[Callback], epochs: int) -> list[int]:
    """By what a GradientAccumulationScheduler multiplies the batches of a step, for each epoch."""
    schedulers = [one for one in callbacks if isinstance(one, GradientAccumulationScheduler)]
    return [schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else 1 for epoch in range(epochs)]
