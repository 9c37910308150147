"""Count optimizer steps, consistently for checkpoints, metrics and the heartbeat."""

from __future__ import annotations

from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker, _ReadyCompletedTracker
from torch.optim import Optimizer


class Steps(Protocol):
    """A counter of Lightning. Keep it for a training, because `trainer.global_step` is a slow chain of properties."""

    @property
    def completed(self) -> int:
        """Number of optimizer steps completed."""


def steps_of(trainer: Trainer) -> Steps:
    """Return the counter that `steps_taken` reads.

    Under manual optimization it counts the steps of all optimizers, so that a batch may add none, one or several.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        total = loop.automatic_optimization.optim_progress.optimizer.step.total
    elif has_optimizer(trainer):
        total = loop.manual_optimization.optim_step_progress.total
    else:
        assert isinstance(loop.batch_progress.total, _ProcessedTracker)
        return _Batches(loop.batch_progress.total)
    assert isinstance(total, _ReadyCompletedTracker)
    return total


def count_direct_steps(trainer: Trainer) -> None:
    """Make Lightning count the steps of optimizers that a module steps directly.

    `self.optimizers(use_pl_optimizer=False)` returns the optimizers of torch, whose steps `trainer.global_step`
    ignores: it stays 0, `max_steps` is never reached, and all checkpoints would have the same step.
    """
    if trainer.lightning_module.automatic_optimization:
        return
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    total = progress.total

    def count(*_: Any) -> None:
        if total.ready == total.completed:  # otherwise Lightning counts it
            progress.increment_ready()
            progress.increment_completed()

    for optimizer in trainer.optimizers:
        if isinstance(optimizer, Optimizer):
            optimizer.register_step_post_hook(count)


class _Batches:
    """Counts each batch as a step."""

    def __init__(self, total: _ProcessedTracker) -> None:
        self._total = total

    @property
    def completed(self) -> int:
        """Number of batches."""
        return self._total.processed


def steps_taken(trainer: Trainer) -> int:
    """Return the optimizer steps completed, in this attempt and earlier ones: `trainer.global_step` of Lightning.

    Lightning also counts a batch as a step if `configure_optimizers` returns None. It counts nothing for a module with
    manual optimization and no optimizer at all (`[]` or None: a memory bank, k-means). Here each of its batches is a
    step, because otherwise all its checkpoints would have the same step.
    """
    if trainer.lightning_module.automatic_optimization or has_optimizer(trainer):
        return trainer.global_step
    return steps_of(trainer).completed


def has_optimizer(trainer: Trainer) -> bool:
    """Return whether there is an optimizer with parameters; the placeholder of Lightning for None has none."""
    return any(optimizer.param_groups for optimizer in trainer.optimizers)
