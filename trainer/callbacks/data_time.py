"""How long a rank takes before its forward pass, where it waits for the others inside of that."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.runtime.heartbeat import Heartbeat


class DataTime(Callback):
    """Appends to `Heartbeat.data`: from the end of a batch, reading the next one and the callbacks before this."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._ended = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._heartbeat.data.append(time.perf_counter() - self._ended)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._ended = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = time.perf_counter()
