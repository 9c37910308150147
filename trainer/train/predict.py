"""One rank of `trainer predict`.

Usage: `python -m trainer.runtime.start trainer.train.predict RUN_DIR CHECKPOINT SPLIT DATA FOLDER`. CHECKPOINT is the
name of a folder in `checkpoints/`, DATA the section `data` of the configuration as JSON, FOLDER a new, empty folder.
Each rank reads one contiguous share of the samples and writes its rows as they come. Rank 0 concatenates the shares.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves

from trainer.checkpoint.store import step_of
from trainer.core import records
from trainer.core.errors import UserError
from trainer.data.order import EvaluationBatches
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Predictions
from trainer.train import build, inference
from trainer.train.data import Data
from trainer.train.prediction_writer import PredictionWriter, Shares, merge_shares

RECORD = "predictions.json"


class PredictionCallback(Callback):
    """Passes the outputs of `predict_step` to a `PredictionWriter`; with several loaders, each has its own outputs."""

    def __init__(
        self, folder: Path, writes: bool, num_loaders: int = 1, sizes: Sequence[list[int] | None] = ()
    ) -> None:
        """Create the callback of a rank.

        Args:
            folder: Folder for this rank's rows.
            writes: False on a rank that reads the same samples as another one (tensor parallel).
            num_loaders: Number of loaders.
            sizes: For each loader the samples in each batch of this rank, if known in advance.
        """
        self.writer, self.writes, self.num_loaders, self.sizes = PredictionWriter(folder), writes, num_loaders, sizes

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the outputs of a batch."""
        if self.writes:
            prefix = f"dataloader_idx_{dataloader_idx}" if self.num_loaders > 1 else ""
            sizes = self.sizes[dataloader_idx] if self.sizes else None
            self.writer.add(outputs, sizes[batch_idx] if sizes else _size_of(batch), prefix)


def _size_of(batch: Any) -> int | None:
    """Return the number of samples in a batch, as Lightning determines it from its first tensor; None: not known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns if tensors differ in their first dimension
        try:
            size: int = extract_batch_size(batch)
        except (MisconfigurationException, RecursionError):
            return None
    return size


def main() -> int:
    """Predict according to the command line, and write a record of the outputs; returns the exit code."""
    run, split, folder = RunDirectory(Path(sys.argv[1])), sys.argv[3], Path(sys.argv[5])
    checkpoint = run.checkpoints_dir / sys.argv[2]
    data_node = records.loads(dict[str, Any], sys.argv[4], "the section data of trainer predict")
    with inference.process_of(run) as rank:
        record = predict(run, checkpoint, split, data_node, folder)
        if rank.is_first:
            (folder / RECORD).write_text(records.dumps(record, indent=1))
    return 0


def predict(run: RunDirectory, checkpoint: Path, split: str, data_node: dict[str, Any], folder: Path) -> Predictions:
    """Write the predictions of `split` to `folder`. Collective.

    Returns:
        The record of the outputs: files, shapes and types.

    Raises:
        UserError: If the module or the data has nothing to predict, or rows and samples do not match.
    """
    job = inference.build_job(run, data_node)
    config, rank, trainer, data, module = job.config, job.rank, job.trainer, job.data, job.module
    if not is_overridden("predict_step", module, LightningModule) and not is_overridden(
        "forward", module, LightningModule
    ):
        raise UserError(f"{type(module).__name__} has no predict_step", "give it one, or a forward")
    counts, sizes = _use_split(data, split)
    if config.trainer.limit_predict_batches is not None:
        counts = [None] * len(counts)  # not all are predicted
    place = build.place_in_data(config, rank)
    parts = folder / ".parts"
    writes = rank.rank % (rank.world_size // place.world_size) == 0
    callback = PredictionCallback(parts / str(place.rank), writes, len(counts), sizes)
    writer = callback.writer
    build.complete(trainer, [callback], [])
    try:
        trainer.predict(
            module, datamodule=data.module, ckpt_path=str(checkpoint), weights_only=True, return_predictions=False
        )
        for name in {name for names in data.ranks.gather(sorted(writer.by_batch)) for name in names}:
            writer.group_by_batch(name)
    finally:
        writer.close()
    layouts = data.ranks.gather(writer.layout if writes else None)
    shares = Shares(parts, [layout for layout in layouts if layout is not None], frozenset(writer.by_batch))
    num_samples = {f"dataloader_idx_{number}." if len(counts) > 1 else "": count for number, count in enumerate(counts)}
    outputs = merge_shares(shares, folder, num_samples, writes=rank.is_first)
    return Predictions(
        run=run.path.name,
        step=step_of(checkpoint),
        split=split,
        outputs=outputs,
        world_size=rank.world_size,
        time=time.time(),
    )


def _use_split(data: Data, split: str) -> tuple[list[int | None], list[list[int] | None]]:
    """Make the loaders of `split` the ones to predict.

    Returns:
        For each loader its number of samples, and the samples in each batch of this rank; None where not known.

    Raises:
        UserError: If `split` has no loader, or one that gives every rank the same samples.
    """
    name = f"{split}_dataloader"
    data.owner.setup({"val": "validate"}.get(split, split))
    collection = getattr(data.owner, name)() if is_overridden(name, data.owner) or name in vars(data.owner) else None
    loaders = collection.flattened if isinstance(collection, CombinedLoader) else tree_leaves(collection)
    loaders = [loader for loader in loaders if loader is not None]
    if not loaders:
        others = [other for other in ("test", "val", "predict") if is_overridden(f"{other}_dataloader", data.owner)]
        fix = f"use --split={' or --split='.join(others)}, or give it a {name}" if others else f"give it a {name}"
        raise UserError(f"--split={split}: {type(data.owner).__name__} has no {name}", fix)
    for loader in loaders:
        data.require_shared(loader)
    data.owner.predict_dataloader = lambda: [_Batches(loader) for loader in loaders]  # type: ignore[method-assign]
    samplers = [getattr(loader, "batch_sampler", None) for loader in loaders]
    for sampler in samplers:
        if isinstance(sampler, EvaluationBatches):
            sampler.is_contiguous = True
    counts = [getattr(sampler, "num_samples", None) for sampler in samplers]
    sizes = [[len(ids) for ids in sampler] if isinstance(sampler, EvaluationBatches) else None for sampler in samplers]
    return counts, sizes


class _Batches:
    """Hides from Lightning that a loader is a DataLoader.

    For a prediction, Lightning (2.6.6, `_update_dataloader`) rebuilds a DataLoader, and calls the class of its batch
    sampler with the arguments of torch's.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)
