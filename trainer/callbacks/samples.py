"""Writes down which samples each rank read: the evidence that a resumed run read the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.runs.files import append_line
from trainer.worker.process import Rank


class SampleLog(Callback):
    """`samples/attempt-NN-rank-R.jsonl` in the run directory: {"epoch", "step", "ids"} for each micro-batch.

    `step` counts the optimizer steps of the epoch from 0. Of loaders that the trainer has rebuilt;
    nothing where there is none.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank = Rank.from_environment()
        path = Path(trainer.default_root_dir) / "samples" / f"attempt-{rank.attempt:02d}-rank-{rank.rank}.jsonl"
        path.parent.mkdir(exist_ok=True)
        combined = trainer.fit_loop._combined_loader
        for loader in combined.flattened if combined is not None else []:
            sampler: Any = getattr(loader, "batch_sampler", None)
            if hasattr(sampler, "on_batch"):
                sampler.on_batch = lambda epoch, step, ids: append_line(
                    path, json.dumps({"epoch": epoch, "step": step, "ids": ids})
                )
