"""What a step is: checkpoints, metrics and the heartbeat count the same."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker


def steps_taken(trainer: Trainer) -> int:
    """Optimizer steps completed, in this attempt and those before it: Lightning's `trainer.global_step`.

    Lightning counts a batch as one step, too, where `configure_optimizers` returns None. Of a module that optimizes
    manually and has no optimizer at all (`[]` or None: a memory bank, k-means) it counts nothing; here each of its
    batches is a step, or none of its checkpoints could be told from another.
    """
    module = trainer.lightning_module
    if module.automatic_optimization or has_optimizer(trainer):
        return trainer.global_step
    total = trainer.fit_loop.epoch_loop.batch_progress.total
    assert isinstance(total, _ProcessedTracker)
    return total.processed


def has_optimizer(trainer: Trainer) -> bool:
    """Whether there is one with parameters; Lightning's stand-in for None has none."""
    return any(optimizer.param_groups for optimizer in trainer.optimizers)
