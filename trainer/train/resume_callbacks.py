"""Adjustments that some of Lightning's own callbacks need to resume exactly, or at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelPruning, StochasticWeightAveraging
from torch.nn.utils import prune
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
    pruning = [callback for callback in kept if isinstance(callback, ModelPruning)]
    if pruning:
        kept.append(ResumePruning(pruning))
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


class ResumePruning(Callback):
    """Keeps the masks of ModelPruning, and the weights below them.

    Lightning's callback writes the pruned weights to checkpoints as if they had always been zero: after a resume they
    would be trained again up to the next pruning.

    Args:
        pruning: The callbacks that prune.
    """

    def __init__(self, pruning: list[ModelPruning]) -> None:
        self._pruning = pruning
        self._module: LightningModule | None = None
        self._saved: dict[str, dict[str, Any]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the module for `state_dict`."""
        self._module = pl_module

    def state_dict(self) -> dict[str, Any]:
        """Return mask and weight of each pruned parameter, by its name without pruning.

        And whether Lightning's copy of its first value shares its memory: the first reset to it (`_copy_param` of
        2.6.6) makes them one, so that later ones change nothing.
        """
        if self._module is None:
            return {}
        weights = dict(self._module.named_parameters())
        masks = {
            name.removesuffix("_mask"): mask
            for name, mask in self._module.named_buffers()
            if f"{name.removesuffix('_mask')}_orig" in weights
        }
        return {
            name: {
                "mask": mask.detach().cpu(),
                "weight": weights[f"{name}_orig"].detach().cpu(),
                "is_first": any(
                    first.data_ptr() == weights[f"{name}_orig"].data_ptr() for first in self._first_values(name)
                ),
            }
            for name, mask in masks.items()
        }

    def _first_values(self, name: str) -> Iterator[torch.Tensor]:
        """Yield Lightning's copies of the first value of a pruned parameter."""
        assert self._module is not None
        owner, _, short = name.rpartition(".")
        layer = self._module.get_submodule(owner)
        for pruning in self._pruning:
            original = (pruning._original_layers or {}).get(id(layer))
            if original is not None and short in [name for _, name in original["names"]]:
                yield getattr(original["data"], short)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for `on_train_start`."""
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune as before the checkpoint."""
        saved, self._saved = self._saved, {}
        for name, state in saved.items():
            owner, _, short = name.rpartition(".")
            layer = pl_module.get_submodule(owner)
            weight: torch.Tensor = getattr(layer, short)
            prune.custom_from_mask(layer, short, state["mask"].to(weight.device))  # type: ignore[no-untyped-call]
            parameter = getattr(layer, f"{short}_orig")
            with torch.no_grad():
                parameter.copy_(state["weight"])
            for first in self._first_values(name) if state["is_first"] else ():
                first.data = parameter.data


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
