"""Training loops that stop between two batches, and between two epochs, with all of the step or epoch behind them.

Lightning saves from hooks: in `on_train_batch_end` the module's own hook, a `ReduceLROnPlateau` by step and the
counters are still to come; in `on_validation_end` also the end of the epoch, with `on_train_epoch_end` and the
schedulers by epoch. What was still to come at a save is left out, or done without its metrics, after a resume. Here a
save waits for the moment at which nothing is left to do: after the last of a batch's work, or after the last of an
epoch's where the batch ended it. The checkpoint says so (`MOMENT` in the state of the epoch's loop), and a resume then
starts with the next batch or epoch as if nothing had happened. Checkpoints that were written elsewhere, by a user's own
`trainer.save_checkpoint`, resume as in Lightning.
"""

from __future__ import annotations

from typing import Any, Protocol

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _is_max_limit_reached

from trainer.data.loader import OrderedLoader
from trainer.strategies.ddp import RunDDPStrategy

MOMENT = "moment"
"""Key in a checkpoint's `loops/fit_loop/epoch_loop.state_dict`."""
BATCH, EPOCH = "batch", "epoch"
"""Its values: between two batches, between two epochs."""


class Acts(Protocol):
    """What is called at these moments."""

    due: bool
    """Whether there is something to do at the next one."""

    def act(self, trainer: Trainer, is_last: bool) -> None:
        """`is_last`: training ends here."""

    def after_start(self, trainer: Trainer) -> None:
        """Every `on_train_start` has been called."""

    def after_end(self, trainer: Trainer) -> None:
        """Every `on_train_end` has been called."""


class MomentEpochLoop(_TrainingEpochLoop):
    """Lightning's epoch of training, with a moment after each batch."""

    actor: Acts | None = None
    moment: str | None = None
    """The one that it is right now."""
    resumes_at: str | None = None
    """Of the checkpoint that was loaded; None once training continues, and for a checkpoint written elsewhere."""

    def on_save_checkpoint(self) -> dict[str, Any]:
        state = super().on_save_checkpoint()
        return state if self.moment is None else {**state, MOMENT: self.moment}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self.resumes_at = state_dict.get(MOMENT)

    def reset(self) -> None:
        if self.resumes_at == EPOCH:
            self.restarting = False  # the counts are those of the epoch before
        stepped = self._batches_that_stepped
        super().reset()
        if self.resumes_at == BATCH:
            # Nothing of the last batch is left to do, and no validation is under way. Lightning adds one to the step
            # of the loggers where the module once skipped the rest of an epoch: that batch was never completed.
            self._batches_that_stepped = stepped
            self.restarting = False
            if self.batch_progress.current.ready:
                self.trainer._logger_connector._first_loop_iter = False

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        if self.resumes_at == EPOCH and self.trainer.current_epoch > 0 and not _is_stateful(data_fetcher):
            # As at the start of any later epoch: with the generators and the sampler's epoch as they are now.
            iter(data_fetcher)
        self.resumes_at = None
        if isinstance(self.trainer.strategy, RunDDPStrategy):
            self.trainer.strategy.reduce_thawed()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        super().on_advance_end(data_fetcher)
        if self.actor is not None and self.actor.due:
            self.between_batches()

    def between_batches(self) -> None:
        """The moment after a batch, unless the epoch ends with it."""
        if not self._num_ready_batches_reached():
            self.act(BATCH, is_last=self.done)

    @property
    def present_actor(self) -> Acts | None:
        """None where a callback trains for itself, without the others (LearningRateFinder)."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return self.actor if self.actor in callbacks else None

    def act(self, moment: str, is_last: bool) -> None:
        actor = self.present_actor
        if actor is None:
            return
        self.moment = moment
        try:
            actor.act(self.trainer, is_last)
        finally:
            self.moment = None


class MomentFitLoop(_FitLoop):
    """Lightning's loop over epochs, with a moment after each."""

    epoch_loop: MomentEpochLoop

    def setup_data(self) -> None:
        before, has_state = self._combined_loader, bool(self._combined_loader_states_to_load)
        super().setup_data()
        if self._combined_loader is not before and not has_state:
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        """Set our loader to its beginning: a callback may have read from it.

        In a collection each counts its own epochs: a short one has several of them in one of the training's.
        """
        assert self._combined_loader is not None
        loaders = self._combined_loader.flattened
        if len(loaders) == 1 and isinstance(loaders[0], OrderedLoader):
            loaders[0].load_state_dict({"epoch": self.trainer.current_epoch, "step": 0})

    def _load_combined_loader_states(self) -> None:
        """Lightning leaves the loaders' state out where the checkpoint was written at the end of an epoch."""
        states, loaders = self._combined_loader_states_to_load, self._combined_loader
        if self.epoch_loop.resumes_at is None or not states or loaders is None:
            super()._load_combined_loader_states()
            return
        loaders._load_state_dicts(states)
        self._combined_loader_states_to_load = []

    def on_advance_start(self) -> None:
        if self._combined_loader is not None and not (self.restarted_mid_epoch or self.restarted_on_epoch_end):
            self._begin_epoch()
        super().on_advance_start()
        if self.epoch_loop.resumes_at is not None:
            # This loop's own: the schedulers by epoch are stepped at the end of this one as of any other.
            self._restarting = False

    def on_advance_end(self) -> None:
        super().on_advance_end()
        loop = self.epoch_loop
        if loop.actor is not None and (loop.actor.due or self.is_at_the_end):
            loop.act(EPOCH, is_last=self.is_at_the_end)

    def on_run_start(self) -> None:
        super().on_run_start()
        if (actor := self.epoch_loop.present_actor) is not None:
            actor.after_start(self.trainer)

    def on_run_end(self) -> None:
        super().on_run_end()
        if (actor := self.epoch_loop.present_actor) is not None:
            actor.after_end(self.trainer)

    @property
    def is_at_the_end(self) -> bool:
        """`done`, without what that property changes and logs."""
        processed: int = self.epoch_progress.current.processed  # type: ignore[attr-defined]
        return (
            _is_max_limit_reached(self.epoch_loop.global_step, self.max_steps)
            or _is_max_limit_reached(processed, -1 if self.max_epochs is None else self.max_epochs)
            or (self.trainer.should_stop and self._can_stop_early)
        )


def use_moments(trainer: Trainer, epoch_loop: type[MomentEpochLoop] = MomentEpochLoop) -> None:
    """Train with these loops; call it before `trainer.fit`."""
    before = trainer.fit_loop
    loop = MomentFitLoop(trainer, min_epochs=before.min_epochs, max_epochs=before.max_epochs)
    loop.epoch_loop = epoch_loop(trainer, min_steps=before.min_steps, max_steps=before.max_steps)
    trainer.fit_loop = loop


def act_at_moments(trainer: Trainer, actor: Acts) -> None:
    """Have `actor` called. Nothing where the loops are Lightning's own."""
    loop = trainer.fit_loop.epoch_loop
    if isinstance(loop, MomentEpochLoop):
        loop.actor = actor


def _is_stateful(data_fetcher: _DataFetcher) -> bool:
    """Whether a loader keeps its own place, which was loaded and is lost by a second `iter`."""
    return any(isinstance(loader, _Stateful) for loader in data_fetcher.combined_loader.flattened)
