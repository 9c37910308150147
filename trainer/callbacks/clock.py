"""One callback counts optimizer steps and calls the others only at the steps that they asked for.

Lightning calls every callback on every batch. Here a batch that nobody asked for costs a few integer comparisons,
whatever the number of listeners.

Lightning says what a step is (`runtime/steps.py`). Under manual optimization a batch may be none, one or several.
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
from trainer.runtime.noted import Noted, noted_by_the_loop, noted_of
from trainer.runtime.steps import Steps, count_direct_steps, steps_of


class StepClock(Callback):
    """`step`: the optimizer steps completed, in this attempt and those before it.

    It goes behind the user's callbacks, which have then seen the step that the boundary may save.
    """

    def __init__(self, metrics: TrainMetrics, boundary: Boundary, heartbeat: Heartbeat, timeouts: Timeouts) -> None:
        self.step = 0
        self._timeouts = timeouts
        self._metrics = metrics
        self._boundary = boundary
        self._heartbeat = heartbeat
        self._steps: Steps
        self._wakes_at = 0
        """The step from which on it looks who wants to be called."""
        self._is_manual = False
        self._stride = 1
        """Steps that the last batch with any has added."""
        self._number = 0
        """Of the last boundary: a step, or under manual optimization a batch."""
        self._noted = Noted()
        self._is_first_step = True
        self._batch_ended = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go to the end, with the boundary: Lightning has put a module's own callbacks, and ModelCheckpoint, behind."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        last = [callback for callback in callbacks if callback is self or callback is self._boundary]
        others = [callback for callback in callbacks if callback not in last]
        trainer.callbacks = [*others, *last]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count_direct_steps(trainer)
        self._steps = steps_of(trainer)
        self.step, self._wakes_at = self._steps.completed, 0
        self._is_manual, self._stride = not pl_module.automatic_optimization, 1
        self._number = self.step
        self._noted = noted_of(trainer)
        self._metrics.start(trainer, self.step)
        self._heartbeat.update(step=self.step, epoch=trainer.current_epoch, phase="first_step")
        self._is_first_step = True
        self._timeouts.on_train_start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heartbeat.update(epoch=trainer.current_epoch)
        self._batch_ended = perf_counter()

    @noted_by_the_loop
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._noted.forward_ended = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, before, heartbeat = perf_counter(), self._batch_ended, self._heartbeat
        self._batch_ended = now
        heartbeat.batches.append((self._noted.forward_ended - before, now - before))
        before = self.step
        self.step = heartbeat.step = step = self._steps.completed
        if step >= self._wakes_at:
            self._look(trainer, pl_module, outputs, before)

    def _look(self, trainer: Trainer, module: LightningModule, outputs: Any, before: int) -> None:
        """Call those who asked for this step; `before` this batch so many were completed."""
        step, metrics, boundary = self.step, self._metrics, self._boundary
        added = step - before
        if added:
            self._stride = added
        if step + (0 if added else self._stride) >= metrics.next_step:  # a part of a step that is logged
            metrics.on_output(module, outputs)
        if not added and not self._is_manual:
            return
        if self._is_first_step:
            self._is_first_step = False
            self._heartbeat.update(phase="train")
            self._timeouts.on_first_step()
        if added and step >= metrics.next_step:
            metrics.on_step(trainer, module, step)
        # The ranks must agree at the same boundary, and may not all step in the same batches: those are counted.
        self._number += 1 if self._is_manual else added
        if self._is_manual:
            self._heartbeat.progress += 1
        if self._is_manual or step >= boundary.next_step:
            boundary.on_step(trainer, module, step, self._number, bool(added))
            self.start_of_batch()
        # From the step before on, for the micro-batches of the one that is logged.
        self._wakes_at = 0 if self._is_manual else min(metrics.next_step - 1, boundary.next_step)

    def start_of_batch(self) -> None:
        """The time of the next batch counts from here."""
        self._batch_ended = perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heartbeat.update(phase="validate")
        self._metrics.pause()

    def on_validation_batch_end(self, *arguments: Any) -> None:
        self._heartbeat.progress += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics.resume()
        self._heartbeat.update(phase="train")
        self._batch_ended = perf_counter()
