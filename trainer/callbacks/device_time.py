"""Measures forward passes on the GPU with CUDA events, without synchronizing.

The host does not notice that its own GPU is slow: it only launches kernels, and then waits with all the other ranks.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.runtime.heartbeat import Heartbeat

EVERY_N_BATCHES = 8
"""Batches between two measurements: two events and a query take about 10 us."""


class DeviceTime(Callback):
    """Appends the seconds of a forward pass to `Heartbeat.forwards`; for a rank on CUDA."""

    read_only = True
    """Hooks change nothing in place, so the loop need not copy the loss for them (`train/loop_plan.py`)."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        event: Any = torch.cuda.Event  # its methods have no types
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)
        self._state: Literal["idle", "started", "recorded"] = "idle"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect the last measurement if the GPU is done with it, and start one every `EVERY_N_BATCHES` batches."""
        if batch_idx % EVERY_N_BATCHES:
            return
        if self._state == "recorded" and self._end.query():
            self._heartbeat.forwards.append(self._start.elapsed_time(self._end) / 1000)
            self._state = "idle"
        if self._state != "recorded":
            self._start.record()
            self._state = "started"

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Record the end of the forward pass."""
        if self._state == "started":
            self._end.record()
            self._state = "recorded"
