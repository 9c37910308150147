"""Records which samples each rank reads: evidence that a resumed run reads the same ones."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.core.files import append_line
from trainer.data.collection import listen
from trainer.runs.directory import RunDirectory
from trainer.runtime.process import Rank
from trainer.tracking.metrics_file import run_folder


class SampleLog(Callback):
    """Writes {"epoch", "step", "ids"} per micro-batch to `samples/attempt-NN-rank-R.jsonl` in the run directory.

    `step` counts the optimizer steps of the epoch from 0. For a loader whose order only its source knows, it counts
    batches, and "ids" is a digest of the batch. With several loaders each line has the number of the "loader".
    """

    def __init__(self) -> None:
        self._listening: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the train loaders."""
        rank = Rank.from_environment()
        path = RunDirectory(run_folder(trainer)).samples_path(rank.attempt, rank.rank)
        path.parent.mkdir(exist_ok=True)
        combined = trainer.fit_loop._combined_loader
        self._listening = list(combined.flattened) if combined is not None else []
        for number, loader in enumerate(self._listening):
            labels = {"loader": number} if len(self._listening) > 1 else {}
            listen(loader, partial(_write, path, labels))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to loaders that Lightning has reloaded (`reload_dataloaders_every_n_epochs`)."""
        combined = trainer.fit_loop._combined_loader
        if combined is not None and list(map(id, combined.flattened)) != list(map(id, self._listening)):
            self.on_train_start(trainer, pl_module)


def _write(path: Path, labels: dict[str, int], epoch: int, step: int, ids: list[Any]) -> None:
    append_line(path, json.dumps({"epoch": epoch, "step": step, "ids": ids, **labels}, default=str))
