"""Counts optimizer steps, and calls metrics and boundary only at the steps that they request.

Lightning calls every callback on every batch. Here a batch without due work costs a few integer comparisons.

A step is what Lightning counts as one (`runtime/steps.py`). Under manual optimization a batch may have none, one or
several steps.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.callbacks.boundary import Boundary
from trainer.callbacks.metrics import TrainMetrics
from trainer.runtime.flight_recorder import Timeouts
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.step_record import StepRecord, filled_by_lean_loop, step_record_of
from trainer.runtime.steps import Steps, count_direct_steps, steps_of


class StepClock(Callback):
    """Counts completed optimizer steps (`step`) over all attempts of the run.

    It runs after the user's callbacks, so that they have seen the step that the boundary may save.
    """

    def __init__(self, metrics: TrainMetrics, boundary: Boundary, heartbeat: Heartbeat, timeouts: Timeouts) -> None:
        self.step = 0
        self._timeouts = timeouts
        self._metrics = metrics
        self._boundary = boundary
        self._heartbeat = heartbeat
        self._steps: Steps
        self._next_due = 0
        """First step at which metrics or boundary may want to be called."""
        self._is_manual = False
        self._stride = 1
        """Steps of the last batch with at least one."""
        self._boundary_number = 0
        """Number of the last boundary: a step, or under manual optimization a batch."""
        self._record = StepRecord()
        self._is_first_step = True
        self._batch_ended = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move this and the boundary to the end: Lightning puts a module's own callbacks and ModelCheckpoint last."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        last = [callback for callback in callbacks if callback is self or callback is self._boundary]
        others = [callback for callback in callbacks if callback not in last]
        trainer.callbacks = [*others, *last]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting from the steps of earlier attempts."""
        count_direct_steps(trainer)
        self._steps = steps_of(trainer)
        self.step, self._next_due = self._steps.completed, 0
        self._is_manual, self._stride = not pl_module.automatic_optimization, 1
        self._boundary_number = self.step
        self._record = step_record_of(trainer)
        self._metrics.start(trainer, self.step)
        self._heartbeat.update(step=self.step, epoch=trainer.current_epoch, phase="first_step")
        self._is_first_step = True
        self._timeouts.on_train_start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the epoch and start the batch timer."""
        self._heartbeat.update(epoch=trainer.current_epoch)
        self._batch_ended = perf_counter()

    @filled_by_lean_loop
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Record the end of the forward pass."""
        self._record.forward_ended = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the batch's times, count its steps, and call metrics and boundary if one of them is due."""
        now, started, heartbeat = perf_counter(), self._batch_ended, self._heartbeat
        self._batch_ended = now
        heartbeat.batches.append((self._record.forward_ended - started, now - started))
        last_step = self.step
        self.step = heartbeat.step = step = self._steps.completed
        if step >= self._next_due:
            self._call_due(trainer, pl_module, outputs, last_step)

    def _call_due(self, trainer: Trainer, module: LightningModule, outputs: Any, last_step: int) -> None:
        """Call metrics and boundary if they requested this step; `last_step`: steps completed before this batch."""
        step, metrics, boundary = self.step, self._metrics, self._boundary
        added = step - last_step
        if added:
            self._stride = added
        if step + (0 if added else self._stride) >= metrics.next_step:  # a micro-batch of a step that is logged
            metrics.on_output(module, outputs)
        if not added and not self._is_manual:
            return
        if self._is_first_step:
            self._is_first_step = False
            self._heartbeat.update(phase="train")
            self._timeouts.on_first_step()
        if added and step >= metrics.next_step:
            metrics.on_step(trainer, module, step)
        # The ranks must agree at the same boundary, and need not step in the same batches: so batches are counted.
        self._boundary_number = self._boundary_number + 1 if self._is_manual else step
        if self._is_manual:
            self._heartbeat.count_progress()
        if self._is_manual or step >= boundary.next_step:
            boundary.on_step(trainer, module, step, self._boundary_number, bool(added))
            self.start_batch_timer()
        # One step early, to see the micro-batches of the logged step.
        self._next_due = 0 if self._is_manual else min(metrics.next_step - 1, boundary.next_step)

    def start_batch_timer(self) -> None:
        """Start the time of the next batch here."""
        self._batch_ended = perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude the validation from the training's throughput."""
        self._heartbeat.update(phase="validate")
        self._metrics.pause()

    def on_validation_batch_end(self, *arguments: Any) -> None:
        """Report progress, so that a long validation does not count as a hang."""
        self._heartbeat.count_progress()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume measuring the training."""
        self._metrics.resume()
        self._heartbeat.update(phase="train")
        self._batch_ended = perf_counter()
