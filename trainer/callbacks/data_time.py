"""Measures data loading time on ranks that wait for other ranks inside their forward pass."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.runtime.heartbeat import Heartbeat


class DataTime(Callback):
    """Appends to `Heartbeat.data` the seconds from the end of a batch to the start of the next one's forward pass.

    They include reading the batch and the callbacks that run before this one.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._ended = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the time of the first batch."""
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Append the time since the last batch ended."""
        self._heartbeat.data.append(time.perf_counter() - self._ended)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Start the time of the next batch."""
        self._ended = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude a validation from the time of the next batch."""
        self._ended = time.perf_counter()
