"""What a step is: checkpoints, metrics and the heartbeat count the same."""

from __future__ import annotations

from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker, _ReadyCompletedTracker
from torch.optim import Optimizer


class Steps(Protocol):
    """Where Lightning counts; to be held for a training, because `trainer.global_step` is a chain of properties."""

    @property
    def completed(self) -> int: ...


def steps_of(trainer: Trainer) -> Steps:
    """What `steps_taken` reads. Under manual optimization it counts the steps of all optimizers together, so that a
    batch may add none, one or several."""
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
    """Have Lightning count the steps of optimizers that a module steps past it, too.

    `self.optimizers(use_pl_optimizer=False)` gives torch's own optimizers, of whose steps `trainer.global_step` knows
    nothing: it stays 0, `max_steps` never comes, and no checkpoint could be told from another.
    """
    if trainer.lightning_module.automatic_optimization:
        return
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    total = progress.total

    def count(*_: Any) -> None:
        if total.ready == total.completed:  # else Lightning is about to count it
            progress.increment_ready()
            progress.increment_completed()

    for optimizer in trainer.optimizers:
        if isinstance(optimizer, Optimizer):
            optimizer.register_step_post_hook(count)


class _Batches:
    """Each batch is a step."""

    def __init__(self, total: _ProcessedTracker) -> None:
        self._total = total

    @property
    def completed(self) -> int:
        return self._total.processed


def steps_taken(trainer: Trainer) -> int:
    """Optimizer steps completed, in this attempt and those before it: Lightning's `trainer.global_step`.

    Lightning counts a batch as one step, too, where `configure_optimizers` returns None. Of a module that optimizes
    manually and has no optimizer at all (`[]` or None: a memory bank, k-means) it counts nothing; here each of its
    batches is a step, or none of its checkpoints could be told from another.
    """
    if trainer.lightning_module.automatic_optimization or has_optimizer(trainer):
        return trainer.global_step
    return steps_of(trainer).completed


def has_optimizer(trainer: Trainer) -> bool:
    """Whether there is one with parameters; Lightning's stand-in for None has none."""
    return any(optimizer.param_groups for optimizer in trainer.optimizers)
