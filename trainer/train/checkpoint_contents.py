"""What a checkpoint holds: `CheckpointSaver` collects it from the parts of a job on every rank, and has it written.

| Part | Who provides it |
|---|---|
| model and optimizer, whole or in shards | `strategies/saving.py` |
| loops, callbacks, schedulers, data module | Lightning (`Trainer.save_checkpoint`) |
| random number generators, place in the data | `callbacks/rng.py` |
| state that Lightning keeps in memory only | `callbacks/transient_state.py` |
| where `metrics.jsonl` and loggers are rewound to | `tracking/rewinding.py` |
| step, epoch, metric, world size, strategy: COMMIT | `CheckpointSaver._write` below |

How the files are written and found again is the room `checkpoint`; when they are due, `callbacks/boundary.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer

from trainer.callbacks.best import BestMetric
from trainer.callbacks.boundary import Saver
from trainer.callbacks.clock import StepClock
from trainer.callbacks.guard import Guard
from trainer.callbacks.metrics import TrainMetrics
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.node_disk import NodeDisk
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.uploads import Uploads
from trainer.config.schema import Config
from trainer.runs.events import CheckpointFailed
from trainer.runs.lock import refuse_if_superseded
from trainer.runtime.attempt import Attempt
from trainer.runtime.steps import steps_taken
from trainer.tracking.rewinding import record_positions


@dataclass(frozen=True)
class Stores:
    """Folders of a run's checkpoints."""

    run: CheckpointStore
    """`checkpoints/` of the run directory."""
    local: CheckpointStore | None = None
    """Node-local folder (`checkpoint.local_dir`); None: not configured."""
    disk: NodeDisk | None = None
    """In a job on several nodes: the folder of this node, and the place of this rank on it."""
    uploads: Uploads | None = None
    """To the object store (`checkpoint.dir`); None: not configured."""


class CheckpointSaver(Saver):
    """Saves checkpoints to the run directory and to the node-local folder. All saves are collective.

    `metrics`, `clock` and `guard` are set before training starts: the clock needs the boundary, and the boundary this.
    """

    best: BestMetric
    metrics: TrainMetrics
    clock: StepClock
    guard: Guard | None = None

    def __init__(
        self, config: Config, attempt: Attempt, writer: CheckpointWriter, stores: Stores, best: BestMetric
    ) -> None:
        self._config, self._attempt, self._writer, self._stores = config, attempt, writer, stores
        self.best = best
        self.saves_locally = stores.local is not None

    def save(self, trainer: Trainer) -> None:
        """Save to the run directory."""
        self.best.saved(steps_taken(trainer))
        self._save(trainer, self._stores.run)

    def save_locally(self, trainer: Trainer) -> None:
        """Save to this node's own disk (`checkpoint.local_dir`)."""
        assert self._stores.local is not None
        self._save(trainer, self._stores.local)

    def save_final(self, trainer: Trainer) -> None:
        """Save the last step once more, because `on_train_end` has changed the weights."""
        self._writer.wait()
        if self._attempt.rank.is_first:
            uploads = self._stores.uploads
            if uploads is not None:
                uploads.wait()
            renamed = self._stores.run.set_before_end(steps_taken(trainer))
            if uploads is not None and renamed is not None:
                uploads.submit(renamed, alone=True)
        trainer.strategy.barrier("before the final checkpoint")
        self.best.forget()
        self._save(trainer, self._stores.run)

    def has_failed(self) -> bool:
        """Return whether a save has failed and must end the training. Only the rank that writes knows."""
        failure = self._writer.take_failure()
        if failure is None:
            return False
        self._attempt.directory.add_event(CheckpointFailed(attempt=self._attempt.rank.attempt, reason=str(failure)))
        self.best.reread()
        return self._config.checkpoint.on_failure == "stop"

    def _save(self, trainer: Trainer, store: CheckpointStore) -> None:
        heartbeat = self._attempt.heartbeat
        refuse_if_superseded(self._attempt.directory, self._attempt.rank.attempt)
        if self.guard is not None:
            self.guard.flush(trainer)
        heartbeat.update(phase="save")
        self.metrics.pause()
        self._write(trainer, store)
        self.metrics.resume()
        self.clock.start_batch_timer()
        heartbeat.update(phase="train")

    def _write(self, trainer: Trainer, store: CheckpointStore) -> None:
        """Write the state after `steps_taken(trainer)` steps, on every rank."""
        for logger in trainer.loggers:
            logger.save()
        step = steps_taken(trainer)
        if trainer.is_global_zero:
            record_positions(self._attempt.directory, trainer.loggers, step)
        trainer.save_checkpoint(
            store.path(step),
            storage_options={
                "step": step,
                "epoch": trainer.current_epoch,
                **self.best.measured_at(step),
                "world_size": trainer.world_size,
                "strategy": self._config.strategy.name,
                "run": store.run,
            },
        )
