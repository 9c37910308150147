"""How long a forward pass takes on the GPU, by events that the GPU itself stamps: nobody waits for them.

The host does not notice that its GPU is slow: it only hands out work, and then waits with all the others.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.runtime.heartbeat import Heartbeat

EVERY_N_BATCHES = 8
"""Two events and a question cost about 10 us."""


class DeviceTime(Callback):
    """Appends to `Heartbeat.forwards`; for a rank on CUDA."""

    only_looks = True
    """The loop need not copy the loss for it (`train/loop_plan.py`)."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._begin, self._end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._state = "idle"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % EVERY_N_BATCHES:
            return
        if self._state == "recorded" and self._end.query():
            self._heartbeat.forwards.append(self._begin.elapsed_time(self._end) / 1000)
            self._state = "idle"
        if self._state != "recorded":
            self._begin.record()
            self._state = "begun"

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._state == "begun":
            self._end.record()
            self._state = "recorded"
