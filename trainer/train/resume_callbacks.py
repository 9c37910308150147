"""Adjustments that some of Lightning's own callbacks need to resume exactly, or at all."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from torch.optim.lr_scheduler import OneCycleLR

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
    return [*kept, RequireScheduleLength()] if resumes else kept


class RequireScheduleLength(Callback):
    """Refuses a longer training than a restored OneCycleLR was made for, which would fail at the step after its last.

    Its length is part of its state: a resume with more epochs does not change it.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the restored schedules with the length of the training.

        Raises:
            UserError: A schedule is too short.
        """
        if not pl_module.automatic_optimization:
            return
        for config in trainer.lr_scheduler_configs:
            schedule, by_epoch = config.scheduler, config.interval == "epoch"
            if not isinstance(schedule, OneCycleLR):
                continue
            length = trainer.max_epochs if by_epoch else trainer.estimated_stepping_batches
            if length is not None and 0 < length < math.inf and length // config.frequency > schedule.total_steps:
                unit = "epochs" if by_epoch else "steps"
                raise UserError(
                    f"the OneCycleLR of the checkpoint ends after {schedule.total_steps} {unit}, the training after "
                    f"{int(length)}",
                    "keep the length of the run; for a longer one, start a new run from the weights: "
                    "trainer fit ... finetune.init_from=CHECKPOINT",
                )


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
