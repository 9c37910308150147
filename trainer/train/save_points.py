"""Training loops with save points: between two batches, and between two epochs, with no work of either left to do.

Lightning saves from hooks. In `on_train_batch_end` the module's own hook, a `ReduceLROnPlateau` by step and the
counters are still to come; in `on_validation_end` also the end of the epoch, with `on_train_epoch_end` and the
schedulers by epoch. After a resume, the work that was still to come at a save is left out, or done without its metrics.

Here a save waits for a save point: after the last work of a batch, or after the last work of an epoch if the batch
ended it. The checkpoint records the kind of save point (`SAVE_POINT_KEY` in the state of the epoch loop), and a resume
starts with the next batch or epoch as if nothing had happened. Checkpoints written elsewhere, by a user's
`trainer.save_checkpoint`, resume as in Lightning.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _is_max_limit_reached

from trainer.data.loader import OrderedLoader
from trainer.strategies.ddp import RunDDPStrategy

SavePoint = Literal["batch", "epoch"]
"""Kind of a save point: between two batches, or between two epochs."""
BETWEEN_BATCHES: SavePoint = "batch"
BETWEEN_EPOCHS: SavePoint = "epoch"
SAVE_POINT_KEY = "moment"
"""Key of the save point in a checkpoint's `loops/fit_loop/epoch_loop.state_dict`."""


class SavePointHandler(Protocol):
    """Interface of the callback that acts at save points."""

    due: bool
    """Whether there is something to do at the next save point."""

    def on_save_point(self, trainer: Trainer, is_last: bool) -> None:
        """Save or stop; `is_last`: training ends here."""

    def after_train_start(self, trainer: Trainer) -> None:
        """Run after every `on_train_start`."""

    def after_train_end(self, trainer: Trainer) -> None:
        """Run after every `on_train_end`."""


class SavePointEpochLoop(_TrainingEpochLoop):
    """Lightning's training epoch loop with a save point after each batch."""

    handler: SavePointHandler | None = None
    save_point: SavePoint | None = None
    """The current save point; None outside of one."""
    resume_point: SavePoint | None = None
    """Save point of the loaded checkpoint; None once training has resumed, and for a checkpoint written elsewhere."""

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Add the save point to the loop's state."""
        state = super().on_save_checkpoint()
        return state if self.save_point is None else {**state, SAVE_POINT_KEY: self.save_point}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Read the save point from the loop's state."""
        super().on_load_checkpoint(state_dict)
        self.resume_point = state_dict.get(SAVE_POINT_KEY)

    def reset(self) -> None:
        """Reset the counters for an epoch; a resume between two batches keeps them."""
        if self.resume_point == BETWEEN_EPOCHS:
            self.restarting = False  # the counts are those of the epoch before
        stepped = self._batches_that_stepped
        super().reset()
        if self.resume_point == BETWEEN_BATCHES:
            # Nothing of the last batch is left to do, and no validation is under way. Lightning adds one to the step
            # of the loggers where the module once skipped the rest of an epoch: that batch was never completed.
            self._batches_that_stepped = stepped
            self.restarting = False
            if self.batch_progress.current.ready:
                self.trainer._logger_connector._first_loop_iter = False

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Start the epoch; after a resume between two epochs with new loader iterators."""
        super().on_run_start(data_fetcher)
        if self.resume_point == BETWEEN_EPOCHS and self.trainer.current_epoch > 0 and not _is_stateful(data_fetcher):
            # As at the start of any later epoch: with the generators and the sampler's epoch as they are now.
            iter(data_fetcher)
        self.resume_point = None
        if isinstance(self.trainer.strategy, RunDDPStrategy):
            self.trainer.strategy.reduce_thawed()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Finish the batch, then run its save point if something is due."""
        super().on_advance_end(data_fetcher)
        if self.handler is not None and self.handler.due:
            self.save_point_after_batch()

    def save_point_after_batch(self) -> None:
        """Run the save point after a batch, unless the epoch ends with it."""
        if not self._num_ready_batches_reached():
            self.run_save_point(BETWEEN_BATCHES, is_last=self.done)

    @property
    def active_handler(self) -> SavePointHandler | None:
        """The handler; None while a callback trains separately (LearningRateFinder)."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return self.handler if self.handler in callbacks else None

    def run_save_point(self, save_point: SavePoint, is_last: bool) -> None:
        """Call the handler; a checkpoint written during the call records `save_point`."""
        handler = self.active_handler
        if handler is None:
            return
        self.save_point = save_point
        try:
            handler.on_save_point(self.trainer, is_last)
        finally:
            self.save_point = None


class SavePointFitLoop(_FitLoop):
    """Lightning's fit loop over epochs with a save point after each epoch."""

    epoch_loop: SavePointEpochLoop

    def setup_data(self) -> None:
        """Set up the loaders; new ones begin with the current epoch."""
        before, has_state = self._combined_loader, bool(self._combined_loader_states_to_load)
        super().setup_data()
        if self._combined_loader is not before and not has_state:
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        """Set our loader to the beginning of the epoch: a callback may have read from it.

        In a collection each loader counts its own epochs: a short one has several of them in one training epoch.
        """
        assert self._combined_loader is not None
        loaders = self._combined_loader.flattened
        if len(loaders) == 1 and isinstance(loaders[0], OrderedLoader):
            loaders[0].begin_with(self.trainer.current_epoch)

    def _load_combined_loader_states(self) -> None:
        """Restore the loaders' states, which Lightning skips if the checkpoint was written at the end of an epoch."""
        states, loaders = self._combined_loader_states_to_load, self._combined_loader
        if self.epoch_loop.resume_point is None or not states or loaders is None:
            super()._load_combined_loader_states()
            return
        loaders._load_state_dicts(states)
        self._combined_loader_states_to_load = []

    def on_advance_start(self) -> None:
        """Start an epoch, or continue the one of the checkpoint."""
        if self._combined_loader is not None and not (self.restarted_mid_epoch or self.restarted_on_epoch_end):
            self._begin_epoch()
        super().on_advance_start()
        if self.epoch_loop.resume_point is not None:
            # This loop's own flag: schedulers by epoch are stepped at the end of this epoch as of any other.
            self._restarting = False

    def on_advance_end(self) -> None:
        """Finish the epoch, then run its save point if something is due or training ends."""
        super().on_advance_end()
        loop = self.epoch_loop
        if loop.handler is not None and (loop.handler.due or self.is_finished):
            loop.run_save_point(BETWEEN_EPOCHS, is_last=self.is_finished)

    def on_run_start(self) -> None:
        """Start training, then call the handler's `after_train_start`."""
        super().on_run_start()
        if (handler := self.epoch_loop.active_handler) is not None:
            handler.after_train_start(self.trainer)

    def on_run_end(self) -> None:
        """End training, then call the handler's `after_train_end`."""
        super().on_run_end()
        if (handler := self.epoch_loop.active_handler) is not None:
            handler.after_train_end(self.trainer)

    @property
    def is_finished(self) -> bool:
        """Lightning's `done` without its side effects: it logs, and changes a counter."""
        processed: int = self.epoch_progress.current.processed  # type: ignore[attr-defined]
        return (
            _is_max_limit_reached(self.epoch_loop.global_step, self.max_steps)
            or _is_max_limit_reached(processed, -1 if self.max_epochs is None else self.max_epochs)
            or (self.trainer.should_stop and self._can_stop_early)
        )


def use_save_points(trainer: Trainer, epoch_loop: type[SavePointEpochLoop] = SavePointEpochLoop) -> None:
    """Train with these loops; call it before `trainer.fit`."""
    before = trainer.fit_loop
    loop = SavePointFitLoop(trainer, min_epochs=before.min_epochs, max_epochs=before.max_epochs)
    loop.epoch_loop = epoch_loop(trainer, min_steps=before.min_steps, max_steps=before.max_steps)
    trainer.fit_loop = loop


def set_save_point_handler(trainer: Trainer, handler: SavePointHandler) -> None:
    """Have `handler` called at save points. Does nothing if the loops are Lightning's own."""
    loop = trainer.fit_loop.epoch_loop
    if isinstance(loop, SavePointEpochLoop):
        loop.handler = handler


def _is_stateful(data_fetcher: _DataFetcher) -> bool:
    """Return whether a loader keeps its own position, which was restored and is lost by a second `iter`."""
    return any(isinstance(loader, _Stateful) for loader in data_fetcher.combined_loader.flattened)
