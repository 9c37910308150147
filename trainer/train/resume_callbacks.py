"""Adjustments that some of Lightning's own callbacks need to resume exactly, or at all."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging

from trainer.config.callbacks import REFUSED
from trainer.core.errors import UserError
from trainer.train.save_points import BETWEEN_BATCHES


def prepare(callbacks: list[Callback], resumes: bool) -> list[Callback]:
    """Return the callbacks of an attempt.

    LearningRateFinder is left out on a resume: the learning rate that it found is in the optimizer's state. Running it
    again would train, and discard the checkpoint that is being loaded.

    Args:
        callbacks: The user's callbacks.
        resumes: Whether the attempt starts from a checkpoint.

    Raises:
        UserError: For BatchSizeFinder.
    """
    for callback in callbacks:
        if isinstance(callback, BatchSizeFinder):
            name = type(callback).__name__
            problem, fix = REFUSED["BatchSizeFinder"]
            raise UserError(f"the callback {name}: {problem}", fix)
    kept = [callback for callback in callbacks if not (resumes and isinstance(callback, LearningRateFinder))]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in kept):
        kept.append(ResumeWeightAveraging())
    return kept


class ResumeWeightAveraging(Callback):
    """Sets up StochasticWeightAveraging on a mid-epoch resume.

    Lightning's callback installs its scheduler when an epoch begins, and so not on a resume in the middle of one. This
    calls that hook, and leaves the optimizer's parameter groups as they were saved.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call the epoch hook of each StochasticWeightAveraging that has a saved scheduler."""
        if getattr(trainer.fit_loop.epoch_loop, "resume_point", None) != BETWEEN_BATCHES:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if not isinstance(callback, StochasticWeightAveraging) or callback._scheduler_state is None:
                continue
            groups = trainer.optimizers[0].param_groups
            saved = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            callback.on_train_epoch_start(trainer, pl_module)
            for group, options in zip(groups, saved, strict=True):
                group.update(options)
