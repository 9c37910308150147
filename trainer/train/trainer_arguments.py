"""Arguments of Lightning's Trainer from the section `trainer`, in its units: batches of a rank, not optimizer steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from torch.utils.data import DataLoader

from trainer.config.batch import BatchPlan
from trainer.config.schema import TrainerOptions
from trainer.core.errors import UserError
from trainer.data.loader import first_samples
from trainer.data.order import GlobalBatchSampler

_PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def trainer_arguments(options: TrainerOptions, accumulate: int, run_folder: str) -> dict[str, Any]:
    """Return the Trainer's arguments, except devices, strategy and features that this project implements itself.

    Args:
        options: The section `trainer`.
        accumulate: Micro-batches of an optimizer step.
        run_folder: Folder for a profiler's output.
    """
    clips_by_value = options.gradient_clip_algorithm == "value"
    clip = options.gradient_clip_val if clips_by_value else options.gradient_clip_norm
    limit_val = options.limit_val_batches
    if limit_val is None and options.overfit_batches:
        limit_val = options.overfit_batches
    arguments: dict[str, Any] = {
        "max_steps": -1 if options.max_steps is None else options.max_steps,
        "max_epochs": -1 if options.max_epochs is None else options.max_epochs,
        "min_steps": options.min_steps,
        "min_epochs": options.min_epochs,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": clip,
        "gradient_clip_algorithm": None if clip is None else "value" if clips_by_value else "norm",
        "log_every_n_steps": options.log_every_n_steps,
        "limit_train_batches": batches(options.limit_train_batches),
        "limit_val_batches": batches(limit_val),
        "limit_test_batches": batches(options.limit_test_batches),
        "limit_predict_batches": batches(options.limit_predict_batches),
        "num_sanity_val_steps": options.num_sanity_val_steps,
        "deterministic": options.deterministic,
        "benchmark": options.benchmark,
        "inference_mode": options.inference_mode,
        "detect_anomaly": options.detect_anomaly,
        "enable_model_summary": options.enable_model_summary,
        "reload_dataloaders_every_n_epochs": options.reload_dataloaders_every_n_epochs,
        "default_root_dir": options.default_root_dir or run_folder,
    }
    if options.profiler in _PROFILERS:  # others: `callbacks/profiling.py`
        folder = Path(run_folder) / "profiler"
        arguments["profiler"] = _PROFILERS[options.profiler](dirpath=str(folder), filename="profile")
    return arguments | _validation(options, accumulate)


def batches(value: int | float | None) -> int | float | None:
    """Return a limit as Lightning reads it: above 1 as an integer number of batches, else as a fraction."""
    return int(value) if value is not None and value > 1 else value


def _validation(options: TrainerOptions, accumulate: int) -> dict[str, Any]:
    """Return when to validate. An integer counts across epochs unless `check_val_every_n_epoch` is set, too."""
    interval, epochs = batches(options.val_check_interval), options.check_val_every_n_epoch
    if isinstance(interval, int):
        return {"val_check_interval": interval * accumulate, "check_val_every_n_epoch": epochs}
    return {"val_check_interval": interval, "check_val_every_n_epoch": epochs or 1}


def fewer_samples(loader: DataLoader[Any], options: TrainerOptions, plan: BatchPlan) -> DataLoader[Any]:
    """Return `loader` over the samples of `trainer.overfit_batches`; over all samples if it is not set."""
    limit = batches(options.overfit_batches)
    if not limit:
        return loader
    steps = len(loader.dataset) // plan.global_batch  # type: ignore[arg-type]
    count = int(limit * steps) if isinstance(limit, float) else limit
    if not count:
        raise UserError(
            f"trainer.overfit_batches={limit} of {steps} global batches is none",
            f"use trainer.overfit_batches=1, or {1 / max(1, steps):.3g} or more",
        )
    return first_samples(loader, count * plan.global_batch)


def limit_epoch(loader: Any, options: TrainerOptions, plan: BatchPlan, trainer: Trainer | None) -> None:
    """Limit an epoch of one of our loaders to `trainer.limit_train_batches`, in whole optimizer steps.

    Our sampler counts its position in epochs of that length, so that the next epoch, and a resumed run, start at the
    right sample. The limits of `trainer` are then set so that Lightning does not cut an optimizer step. Other loaders
    are left to Lightning.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, GlobalBatchSampler):
        return
    limit = batches(options.limit_train_batches)
    if limit is not None:
        whole = sampler.whole
        count = int(whole * limit) if isinstance(limit, float) else min(whole, limit)
        if not count:
            raise UserError(
                f"trainer.limit_train_batches={limit} of the {whole} batches of an epoch is none",
                f"use trainer.limit_train_batches=1, or {1 / whole:.3g} or more",
            )
        sampler.limit_steps(math.ceil(count / plan.accumulate))
    if trainer is None:
        return
    trainer.limit_train_batches = 1.0
    fraction = batches(options.val_check_interval)
    if isinstance(fraction, float) and plan.accumulate > 1:
        # In the middle of a step nothing can be saved: the gradients so far would be lost.
        trainer.val_check_interval = max(1, int(sampler.steps_per_epoch * fraction)) * plan.accumulate
