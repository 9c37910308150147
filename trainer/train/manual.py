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
from trainer.config.optimization import accumulates_manually, accumulates_twice, clips_manually


def adapt(trainer: Trainer, module: LightningModule, plan: BatchPlan) -> None:
    """Call it before `trainer.fit`, once the Trainer has its callbacks.

    Raises UserError for what Lightning would refuse in the words of its Trainer's arguments.
    """
    schedules = any(isinstance(one, GradientAccumulationScheduler) for one in trainer.callbacks)  # type: ignore[attr-defined]
    if module.automatic_optimization:
        if schedules and plan.accumulate > 1:
            raise accumulates_twice("callbacks", plan)
        return
    if schedules:
        raise accumulates_manually("callbacks")
    if trainer.gradient_clip_val:
        algorithm = "value" if trainer.gradient_clip_algorithm == "value" else "norm"
        key = "gradient_clip_val" if algorithm == "value" else "gradient_clip_norm"
        raise clips_manually(key, trainer.gradient_clip_val, algorithm)
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
