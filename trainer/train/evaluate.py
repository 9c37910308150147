"""One rank of `trainer evaluate`.

Usage: `python -m trainer.runtime.start trainer.train.evaluate RUN_DIR CHECKPOINT SPLIT`. CHECKPOINT is the name of a
folder in `checkpoints/`. The only file written to the run directory is `evaluations/step-N-SPLIT.json`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from trainer.checkpoint.store import step_of
from trainer.core import records
from trainer.core.errors import UserError
from trainer.core.files import write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Evaluation
from trainer.train import build, inference
from trainer.train.data import Data

STEPS = {"test": "test_step", "val": "validation_step"}
"""Split to the step method of the LightningModule."""
Sums = dict[str, tuple[str, float, float]]
"""Metric to its reduction (mean, sum, min, max), its value (for a mean: the sum) and, for a mean, the count."""

_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {"sum": sum, "min": min, "max": max}


def main() -> int:
    """Evaluate according to the command line, and write the metrics; returns the exit code."""
    run, folder_name, split = RunDirectory(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
    checkpoint = run.checkpoints_dir / folder_name
    step = step_of(checkpoint)
    with inference.process_of(run) as rank:
        metrics = evaluate(run, checkpoint, split)
        if rank.is_first:
            size = rank.world_size
            record = Evaluation(step=step, split=split, metrics={**metrics}, world_size=size, time=time.time())
            run.evaluations_dir.mkdir(exist_ok=True)
            write_atomic(run.evaluation_path(step, split), records.dumps(record))
    return 0


def evaluate(run: RunDirectory, checkpoint: Path, split: str) -> dict[str, float]:
    """Return the metrics of `split` (val or test) over all ranks: each sample counts once. Collective.

    With several loaders each metric has one value per loader, with Lightning's suffix `/dataloader_idx_N`.

    Raises:
        UserError: If the module or the data has nothing to evaluate.
    """
    job = inference.build_job(run)
    trainer, data, module = job.trainer, job.data, job.module
    _require_split(split, module, data)
    local = _LocalSums()
    build.complete(trainer, [local], [])
    method = trainer.test if split == "test" else trainer.validate
    results = method(module, datamodule=data.module, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    return {**merge_loaders(results), **_reduce_ranks(data.ranks.gather(local.sums))}


class _LocalSums(Callback):
    """Keeps the sums of this rank before Lightning discards them."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the sums."""
        results = trainer._results
        self.sums = _local_sums(results.values() if results is not None else ())

    on_test_end = on_validation_end


def _require_split(split: str, module: LightningModule, data: Data) -> None:
    """Raise UserError if `split` cannot be evaluated: Lightning's errors name methods of its Trainer instead."""
    available = {name: _has_step(name, module) and has_loader(name, data) for name in STEPS}
    if available[split]:
        return
    problem = f"--split={split}: {type(module).__name__} has no {STEPS[split]}"
    if _has_step(split, module):
        problem = f"--split={split}: {type(data.owner).__name__} has no {split}_dataloader"
    other = next((f"use --split={name}" for name in STEPS if available[name]), None)
    method = STEPS[split] if not _has_step(split, module) else f"{split}_dataloader"
    raise UserError(problem, f"{other}, or give it a {method}" if other else f"give it a {method}")


def _has_step(split: str, module: LightningModule) -> bool:
    return is_overridden(STEPS[split], module, LightningModule)


def has_loader(split: str, data: Data) -> bool:
    """Return whether the data module, or the LightningModule with the loaders, has a loader for `split`."""
    name = f"{split}_dataloader"
    return name in vars(data.owner) or is_overridden(name, data.owner)


def merge_loaders(results: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of all loaders; a name with different values in two loaders gets the loader's suffix."""
    metrics: dict[str, float] = {}
    for number, of_loader in enumerate(results):
        for name, value in of_loader.items():
            clashes = name in metrics and metrics[name] != value and metrics[name] == metrics[name]
            metrics[f"{name}/dataloader_idx_{number}" if clashes else name] = float(value)
    return metrics


def _local_sums(results: Iterable[Any]) -> Sums:
    """Return this rank's sums of the metrics that were logged as numbers; torchmetrics reduce themselves."""
    sums: Sums = {}
    for result in results:
        meta = result.meta
        if not (meta.on_epoch and meta.logger and result.is_tensor) or meta.sync.rank_zero_only:
            continue
        numbered = meta.add_dataloader_idx and meta.dataloader_idx is not None
        suffix = f"/dataloader_idx_{meta.dataloader_idx}" if numbered else ""
        count = float(result.cumulated_batch_size) if meta.is_mean_reduction else 0.0
        sums[f"{meta.forked_name(False)}{suffix}"] = (meta.reduce_fx.__name__, float(result.value), count)
    return sums


def _reduce_ranks(shares: Sequence[Sums]) -> dict[str, float]:
    """Return the metrics over all ranks, including those logged without `sync_dist`, from each rank's sums."""
    metrics = {}
    for name in dict.fromkeys(name for share in shares for name in share):
        parts = [share[name] for share in shares if name in share]
        kind, values = parts[0][0], [value for _, value, _ in parts]
        if kind == "mean":
            count = sum(weight for _, _, weight in parts)
            metrics[name] = sum(values) / count if count else float("nan")
        else:
            metrics[name] = _REDUCTIONS[kind](values)
    return metrics
