"""Gradient accumulation of modules that optimize manually, and of Lightning's GradientAccumulationScheduler.

`data.batch_size` is the global batch, split into micro-batches by `data.micro_batch`. Under automatic optimization the
loop steps the optimizer after the last micro-batch. Under manual optimization `training_step` gets each micro-batch and
decides when to step: Lightning refuses `accumulate_grad_batches` there.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from trainer.config.batch import BatchPlan
from trainer.config.optimization import accumulates_manually, accumulates_twice, clips_manually


def configure(trainer: Trainer, module: LightningModule, plan: BatchPlan) -> None:
    """Set the Trainer's accumulation for `module`; call it before `trainer.fit`, once the Trainer has its callbacks.

    Raises:
        UserError: For combinations that Lightning would refuse in terms of its Trainer's arguments.
    """
    has_scheduler = any(isinstance(one, GradientAccumulationScheduler) for one in trainer.callbacks)  # type: ignore[attr-defined]
    if module.automatic_optimization:
        if has_scheduler and plan.accumulate > 1:
            raise accumulates_twice("callbacks", plan)
        return
    if has_scheduler:
        raise accumulates_manually("callbacks")
    if trainer.gradient_clip_val:
        algorithm = "value" if trainer.gradient_clip_algorithm == "value" else "norm"
        key = "gradient_clip_val" if algorithm == "value" else "gradient_clip_norm"
        raise clips_manually(key, trainer.gradient_clip_val, algorithm)
    if plan.accumulate > 1:
        trainer.accumulate_grad_batches = 1
        if trainer.is_global_zero:
            print(
                f"manual optimization: training_step gets each micro-batch of {plan.micro_batch} samples"
                f" ({plan.accumulate} to a global batch) and decides when to step the optimizer",
                flush=True,
            )


def accumulation_by_epoch(callbacks: Sequence[Callback], epochs: int) -> list[int]:
    """Return the accumulation factor that a GradientAccumulationScheduler sets in each epoch (1 without one)."""
    schedulers = [one for one in callbacks if isinstance(one, GradientAccumulationScheduler)]
    return [schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else 1 for epoch in range(epochs)]
