"""One callback counts optimizer steps and calls the others only at the steps that they asked for.

Lightning calls every callback on every batch. Here a batch that nobody asked for costs a few integer comparisons,
whatever the number of listeners.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.callbacks.boundary import Boundary
from trainer.callbacks.metrics import TrainMetrics
from trainer.callbacks.steps import steps_taken
from trainer.worker.collectives import Timeouts
from trainer.worker.heartbeat import Heartbeat
from trainer.worker.noted import Noted, noted_by_the_loop, noted_of


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
        self._next_step = 0
        """At which a listener wants to be called."""
        self._accumulate = 1
        self._batches = 0
        self._noted = Noted()
        self._is_first_step = True
        self._batch_ended = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self._next_step = steps_taken(trainer), 0
        self._noted = noted_of(trainer)
        self._accumulate = trainer.accumulate_grad_batches
        batches = trainer.num_training_batches
        self._batches = 0 if batches == float("inf") else int(batches)
        self._metrics.start(self.step)
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
        step, number = self.step + 1, batch_idx + 1
        steps = number % self._accumulate == 0 or number == self._batches
        if steps:
            self.step = heartbeat.step = step
        if step >= self._next_step:
            self._tell(trainer, pl_module, outputs, step, steps)

    def _tell(self, trainer: Trainer, module: LightningModule, outputs: Any, step: int, steps: bool) -> None:
        """Call those who asked for this step; `steps`: this micro-batch is its last."""
        if step >= self._metrics.next_step:
            self._metrics.on_output(module, outputs)
        if not steps:
            return
        if self._is_first_step:
            self._is_first_step = False
            self._heartbeat.update(phase="train")
            self._timeouts.on_first_step()
        if step >= self._metrics.next_step:
            self._metrics.on_step(trainer, module, step)
        if step >= self._boundary.next_step:
            self._boundary.on_step(trainer, module, step)
            self.start_of_batch()
        self._next_step = min(self._metrics.next_step, self._boundary.next_step)

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
