"""Saves the checkpoints of an attempt: what is done before and after each, and what COMMIT says of it."""

from __future__ import annotations

from lightning.pytorch import Trainer

from trainer.callbacks.best import BestMetric
from trainer.callbacks.clock import StepClock
from trainer.callbacks.guard import Guard
from trainer.callbacks.metrics import TrainMetrics
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.config.schema import Config
from trainer.runs.events import CheckpointFailed
from trainer.runs.lock import refuse_if_superseded
from trainer.runtime.attempt import Attempt
from trainer.runtime.steps import steps_taken


class Saving:
    """`metrics`, `clock` and `guard` are set before training starts: the clock calls who saves, and so comes later."""

    metrics: TrainMetrics
    clock: StepClock
    guard: Guard | None = None

    def __init__(
        self,
        config: Config,
        attempt: Attempt,
        writer: CheckpointWriter,
        store: CheckpointStore,
        local: CheckpointStore | None,
        best: BestMetric,
    ) -> None:
        self._config, self._attempt, self._writer = config, attempt, writer
        self._store, self._local, self.best = store, local, best

    @property
    def saves_locally(self) -> bool:
        """Whether there is a folder for local saves (`checkpoint.local_dir`)."""
        return self._local is not None

    def save(self, trainer: Trainer) -> None:
        """Into the run directory. Collective, as all of these are."""
        self.best.saved(steps_taken(trainer))
        self._save(trainer, self._store)

    def save_locally(self, trainer: Trainer) -> None:
        """On this node's own disk (`checkpoint.local_dir`)."""
        assert self._local is not None
        self._save(trainer, self._local)

    def save_final(self, trainer: Trainer) -> None:
        """Once more at the last step, whose weights `on_train_end` has changed."""
        self._writer.wait()
        if self._attempt.rank.is_first:
            self._store.set_before_end(steps_taken(trainer))
        trainer.strategy.barrier("before the final checkpoint")
        self.best.forget()
        self._save(trainer, self._store)

    def has_failed(self) -> bool:
        """Whether a save has failed and the training must end for it. Only the rank that writes knows."""
        failure = self._writer.take_failure()
        if failure is None:
            return False
        self._attempt.directory.add_event(CheckpointFailed(reason=str(failure)))
        self.best.reread()
        return self._config.checkpoint.on_failure == "stop"

    def _save(self, trainer: Trainer, into: CheckpointStore) -> None:
        heartbeat = self._attempt.heartbeat
        refuse_if_superseded(self._attempt.directory, self._attempt.rank.attempt)
        if self.guard is not None:
            self.guard.flush(trainer)
        heartbeat.update(phase="save")
        self.metrics.pause()
        self._write(trainer, into)
        self.metrics.resume()
        self.clock.start_of_batch()
        heartbeat.update(phase="train")

    def _write(self, trainer: Trainer, into: CheckpointStore) -> None:
        """The state after `steps_taken(trainer)` steps, on every rank."""
        for logger in trainer.loggers:
            logger.save()
        step = steps_taken(trainer)
        trainer.save_checkpoint(
            into.path(step),
            storage_options={
                "step": step,
                "epoch": trainer.current_epoch,
                **self.best.measured_at(step),
                "world_size": trainer.world_size,
                "strategy": self._config.strategy.name,
            },
        )
