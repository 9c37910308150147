"""One rank of `trainer predict`: `train/start.py predict RUN_DIR FOLDER SPLIT DATA FOLDER`.

DATA is the section `data` of the configuration as JSON, FOLDER a new, empty one. Each rank reads one contiguous share
of the samples and writes its rows as they come; the first rank puts the shares behind each other.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves

from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore, step_of
from trainer.core.errors import UserError
from trainer.data.order import EvaluationBatches
from trainer.runs.directory import RunDirectory
from trainer.runtime import hydra_state, logs, rng
from trainer.runtime.process import Rank, die_with_parent
from trainer.runtime.torch_setup import init_process_group, silence_known_warnings
from trainer.train import build
from trainer.train.data import Data
from trainer.train.rows import Rows, joined

RECORD = "predictions.json"


class RowsWriter(Callback):
    """Hands what `predict_step` returns to `Rows`; of several loaders each has outputs of its own."""

    def __init__(
        self, folder: Path, writes: bool, num_loaders: int = 1, sizes: Sequence[list[int] | None] = ()
    ) -> None:
        """`writes`: false on a rank that reads the same samples as another (tensor parallel). `sizes`: of each loader
        the samples of each batch of this rank, where they are known before one is looked at."""
        self.rows, self.writes, self.num_loaders, self.sizes = Rows(folder), writes, num_loaders, sizes

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.writes:
            prefix = f"dataloader_idx_{dataloader_idx}" if self.num_loaders > 1 else ""
            sizes = self.sizes[dataloader_idx] if self.sizes else None
            self.rows.add(outputs, sizes[batch_idx] if sizes else _size_of(batch), prefix)


def _size_of(batch: Any) -> int | None:
    """The number of samples, from the first tensor or list in the batch, as Lightning finds it; null: not told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is ambiguous where tensors differ in their first dimension
        try:
            size: int = extract_batch_size(batch)
        except (MisconfigurationException, RecursionError):
            return None
    return size


def main() -> int:
    run, split, folder = RunDirectory(Path(sys.argv[1])), sys.argv[3], Path(sys.argv[5])
    checkpoint = run.checkpoints_dir / sys.argv[2]
    die_with_parent()
    silence_known_warnings()
    rank = Rank.from_environment()
    logs.start(run.config())
    record = predict(run, checkpoint, split, json.loads(sys.argv[4]), folder)
    if rank.is_first:
        (folder / RECORD).write_text(json.dumps(record, indent=1))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def predict(run: RunDirectory, checkpoint: Path, split: str, data_node: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the predictions of `split` into `folder`; returns what describes them. Collective."""
    config, rank = hydra_state.load(run), Rank.from_environment()
    config.data = data_node
    group = init_process_group(config, rank)
    store = CheckpointStore(run.checkpoints_dir)
    trainer = build.build_trainer(config, rank, RunCheckpointIO(CheckpointWriter(store)), str(run.path))
    rng.seed_all(config.seed)
    data = build.build_data(config, rank, trainer, group)
    module = build.build_module(config, data, lambda: None, defer=build.defers(config, rank))
    data.set_up(module)
    if not is_overridden("predict_step", module, LightningModule) and not is_overridden(
        "forward", module, LightningModule
    ):
        raise UserError(f"{type(module).__name__} has no predict_step.", "Give it one, or a forward.")
    counts, sizes = _use_split(data, split)
    if config.trainer.limit_predict_batches is not None:
        counts = [None] * len(counts)  # not all are predicted
    place = build.place_in_data(config, rank)
    parts = folder / ".parts"
    writes = rank.rank % (rank.world_size // place.world_size) == 0
    writer = RowsWriter(parts / str(place.rank), writes, len(counts), sizes)
    build.complete(trainer, [writer], [])
    try:
        trainer.predict(
            module, datamodule=data.module, ckpt_path=str(checkpoint), weights_only=True, return_predictions=False
        )
        for name in {name for names in data.ranks.gather(sorted(writer.rows.by_batch)) for name in names}:
            writer.rows.group_by_batch(name)
    finally:
        writer.rows.close()
    layouts = data.ranks.gather(writer.rows.layout if writer.writes else None)
    outputs = joined(
        parts,
        [one for one in layouts if one is not None],
        folder,
        {f"dataloader_idx_{number}." if len(counts) > 1 else "": count for number, count in enumerate(counts)},
        rank.is_first,
        frozenset(writer.rows.by_batch),
    )
    return {
        "run": run.path.name,
        "step": step_of(checkpoint),
        "split": split,
        "outputs": outputs,
        "world_size": rank.world_size,
        "time": time.time(),
    }


def _use_split(data: Data, split: str) -> tuple[list[int | None], list[list[int] | None]]:
    """Make the loaders of `split` those that are predicted; returns the number of samples of each, and those of each
    batch of this rank, where they are known.

    Raises UserError where there is none.
    """
    name = f"{split}_dataloader"
    data.owner.setup({"val": "validate"}.get(split, split))
    found = getattr(data.owner, name)() if is_overridden(name, data.owner) or name in vars(data.owner) else None
    loaders = found.flattened if isinstance(found, CombinedLoader) else tree_leaves(found)
    loaders = [loader for loader in loaders if loader is not None]
    if not loaders:
        others = [one for one in ("test", "val", "predict") if is_overridden(f"{one}_dataloader", data.owner)]
        fix = f"use --split={' or --split='.join(others)}, or give it a {name}" if others else f"give it a {name}"
        raise UserError(f"--split={split}: {type(data.owner).__name__} has no {name}", fix)
    for loader in loaders:
        data.require_shared(loader)
    data.owner.predict_dataloader = lambda: [_Batches(loader) for loader in loaders]  # type: ignore[method-assign]
    samplers = [getattr(loader, "batch_sampler", None) for loader in loaders]
    counts = [getattr(sampler, "num_samples", None) for sampler in samplers]
    return counts, [[len(ids) for ids in one] if isinstance(one, EvaluationBatches) else None for one in samplers]


class _Batches:
    """A loader that is no DataLoader: Lightning (2.6.6, `_update_dataloader`) makes those anew for a prediction, with
    a batch sampler called as torch's is."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)
