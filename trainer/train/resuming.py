"""What some of Lightning's own callbacks need to resume exactly, or at all."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging

from trainer.config.callbacks import REFUSED
from trainer.core.errors import UserError
from trainer.train.moments import BATCH


def settled(callbacks: list[Callback], resumes: bool) -> list[Callback]:
    """The callbacks of an attempt; `resumes`: it has a checkpoint to continue from.

    LearningRateFinder is left out then: the learning rate that it found is in the optimizer's state, and finding one
    again would train, and forget the checkpoint that is being loaded. Raises UserError for BatchSizeFinder.
    """
    for callback in callbacks:
        if isinstance(callback, BatchSizeFinder):
            name = type(callback).__name__
            problem, fix = REFUSED["BatchSizeFinder"]
            raise UserError(f"the callback {name}: {problem}", fix)
    kept = [callback for callback in callbacks if not (resumes and isinstance(callback, LearningRateFinder))]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in kept):
        kept.append(AveragingInMidEpoch())
    return kept


class AveragingInMidEpoch(Callback):
    """Lightning's StochasticWeightAveraging puts its scheduler in place when an epoch begins, and so not on a resume in
    the middle of one. This lets it do so, and leaves the optimizer's groups as they were saved."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer.fit_loop.epoch_loop, "resumes_at", None) != BATCH:
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
