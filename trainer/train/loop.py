"""Training loop: Lightning's, without its per-batch overhead.

Lightning 2.6 spends 0.8 to 0.9 ms of CPU time on a step in addition to the training itself, on two or more ranks also a
broadcast and a wait for the device (docs/speed.md). `LeanTrainingEpochLoop` keeps the state, the hooks, the order and
the arithmetic of `_TrainingEpochLoop`. It skips calls to hooks that are not overridden. Weights, logged metrics,
counters and checkpoints are equal bit for bit: tests/train/test_loop.py trains with both loops and compares.

The optimizer step of a micro-batch (forward, backward, clipping) is in `loop_step.py`, the base class. `loop_plan.py`
finds out before an epoch which hooks to call, and whether Lightning's own loop has to run it.

Differences, on purpose:

- SIGTERM is not broadcast on every batch: the ranks agree about once a second on the CPU (`callbacks/boundary.py`).
- `outputs` of `on_train_batch_end` is `{"loss": ...}` as in Lightning (divided by the micro-batches of the step, plus
  whatever else `training_step` returned). Its loss is detached but not copied: it shares memory with what
  `training_step` returned, unless something may change that in place during backward.
- The gradients of the previous step are freed before the forward pass, not after it, so that gradients and activations
  do not take memory at the same time: a `training_step` that reads gradients finds None. This is not done where
  `on_before_zero_grad` or `optimizer_zero_grad` is overridden, nor where a user's callback has `on_exception`, which
  may inspect them. Gradients of a backward pass inside `training_step` are zeroed as in Lightning.
- Overrides are looked up at the start of an epoch, and again before `training_step` and before `on_train_batch_end` if
  callbacks were added, removed or replaced, optimizers were replaced, or the module was given a new attribute, such as
  a hook. Not seen before the next epoch: a hook set on a callback object, a hook set on the module for the second time,
  a patched method of a Lightning class (`mock.patch.object`), and `module.automatic_optimization` or `trainer.profiler`
  set in mid-epoch. Everything else that a callback may set on the Trainer or the strategy takes effect at once:
  schedulers, clipping, accumulation, validation, `max_steps`, `should_stop`.
- A callback that is added or removed inside a hook takes effect after that hook.

Lightning's own loop runs instead (the log gives the reason) under manual optimization, with a profiler, with several
optimizers, with `dataloader_iter`, and where a method that this loop inlines was patched (`train/loop_originals.py`).
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import RestartStage, _TrainingEpochLoop

from trainer.train.loop_originals import original
from trainer.train.loop_plan import Plan, make_plan, why_not_lean
from trainer.train.loop_step import FX, LeanOptimization
from trainer.train.prefetch import CopyStream
from trainer.train.save_points import use_save_points
from trainer.train.step_metrics import collect

log = logging.getLogger(__name__)


def use_lean_loop(trainer: Trainer, prefetches: bool = False) -> None:
    """Train with `LeanTrainingEpochLoop`; call it before `trainer.fit`.

    Args:
        trainer: Lightning's Trainer.
        prefetches: Copy batches to a GPU ahead.
    """
    use_save_points(trainer, LeanTrainingEpochLoop)
    trainer.fit_loop.epoch_loop.prefetches = prefetches  # type: ignore[attr-defined]


class LeanTrainingEpochLoop(LeanOptimization):
    """One epoch of training; validation, resuming and the end of an epoch are Lightning's own code."""

    plan: Plan | None = None
    """Lookups of the epoch; None: Lightning's own loop runs."""
    reason: str | None = None
    """Reason why Lightning's own loop runs."""
    waited_s = 0.0
    """Total seconds spent waiting for batches."""
    prefetches = False
    """Whether batches are copied to the GPU ahead (`trainer.prefetch_to_device`)."""
    copy_stream: CopyStream | None = None
    """Stream for that; None on a CPU."""
    _has_logged = False

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        """Decide at the start of an epoch whether this loop can run it, and log the decision once."""
        super().on_run_start(data_fetcher)
        self.reason = why_not_lean(self.trainer, data_fetcher)
        self.plan = None
        device = self.trainer.strategy.root_device
        if self.prefetches and self.copy_stream is None and device.type == "cuda":
            self.copy_stream = CopyStream(device)
        if self.reason is None:
            self.plan = make_plan(self.trainer, data_fetcher)
            data_fetcher._start_profiler = data_fetcher._stop_profiler = _nothing
        if not self._has_logged and self.trainer.is_global_zero:
            if self.reason is None:
                log.info("training with the lean loop")
            else:
                log.warning("training with Lightning's own loop, up to 1 ms per step slower: %s", self.reason)
            self._has_logged = True

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Train one epoch: Lightning's own loop over `advance`, without the calls that have nothing to do."""
        try:
            if _TrainingEpochLoop.run is not original(_TrainingEpochLoop, "run"):
                super().run(data_fetcher)
                return
            self.reset()
            self.on_run_start(data_fetcher)
            while not self.done:
                try:
                    self.advance(data_fetcher)
                    self.on_advance_end(data_fetcher)
                except StopIteration:
                    break
                finally:
                    if self.plan is None:
                        self.on_iteration_done()
                    else:
                        self._restarting = self._loaded_from_state_dict = self._resuming_from_checkpoint = False
                        self._restart_stage = RestartStage.NONE
        finally:
            self.plan = None

    def _broadcast_sigterm_tensor(self) -> None:
        """Do nothing: `callbacks/boundary.py` agrees on stopping without waiting for the device on every batch."""

    def _on_before_fetch(self) -> None:
        self.trainer.profiler.start("[_TrainingEpochLoop].train_dataloader_next")  # type: ignore[attr-defined]

    def _on_after_fetch(self) -> None:
        self.trainer.profiler.stop("[_TrainingEpochLoop].train_dataloader_next")  # type: ignore[attr-defined]

    def _should_check_val_epoch(self) -> bool:
        plan, trainer = self.plan, self.trainer
        if plan is None:
            return super()._should_check_val_epoch()
        if not plan.has_validation or trainer.limit_val_batches <= 0:
            return False
        every = trainer.check_val_every_n_epoch
        return every is None or plan.epoch_number % every == 0

    @property
    def done(self) -> bool:
        """Whether the epoch or the training has ended; Lightning's own answer with fewer property lookups."""
        trainer = self.trainer
        if self.plan is None or self._restarting or trainer.should_stop:
            return super().done
        progress = self.batch_progress
        if progress.is_last_batch or progress.current.ready == trainer.fit_loop.max_batches:
            return True
        if self.max_steps == -1:
            return False
        return self.automatic_optimization.optim_progress.optimizer.step.total.completed >= self.max_steps

    def _is_last_of_epoch(self) -> bool:
        """Return `_num_ready_batches_reached()`, without two property lookups."""
        progress = self.batch_progress
        return progress.is_last_batch or progress.current.ready == self.trainer.fit_loop.max_batches

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Call Lightning's method only if there is something to do: validation, a plateau scheduler, the end."""
        plan, trainer = self.plan, self.trainer
        if (
            plan is None
            or self._skip_next_val
            or trainer.should_stop
            or trainer._signal_connector.received_sigterm
            or (plan.strategy.lr_scheduler_configs != plan.without_plateaus and self._has_plateaus(plan))
            or (plan.has_validation and self._should_check_val_fx(data_fetcher))
        ):
            super().on_advance_end(data_fetcher)
            return  # which also runs the save point
        if trainer.accumulate_grad_batches == 1 or not self._should_accumulate():
            self._batches_that_stepped += 1
        if self.handler is not None and self.handler.due:
            self.save_point_after_batch()

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on one micro-batch.

        The first one after a resume is left to Lightning, which handles every point at which a run can resume.
        Counters are incremented inline: ten calls of `increment_...` per step take 4 us.
        """
        plan, trainer = self.plan, self.trainer
        if plan is not None and (
            trainer.callbacks != plan.callbacks  # type: ignore[attr-defined]
            or plan.strategy._optimizers != plan.optimizers
            or len(plan.names) != plan.num_attributes
        ):
            plan = self._replan_between_batches(data_fetcher)
        if plan is None or self._restarting:
            super().advance(data_fetcher)
            return
        if self.val_loop._restarting:
            self.val_loop.restarting = False
        started = perf_counter()
        batch = plan.next_batch()
        self.waited_s += perf_counter() - started
        progress = self.batch_progress
        total: Any = progress.total
        current: Any = progress.current
        batch_idx = current.ready
        progress.is_last_batch = data_fetcher.done
        batch = plan.to_device(batch)
        total.ready += 1
        current.ready += 1
        connector, results = trainer._logger_connector, self._results  # `_LoggerConnector.on_batch_start`, inlined
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch = batch
        results.batch_size = None
        results.dataloader_idx = None

        outputs: dict[str, Any] | None = None
        skips_epoch = False
        if batch is None:
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        else:
            if plan.has_start_hooks:
                skips_epoch = self._call_start_hooks(plan, batch, batch_idx) == -1
                if not plan.is_current(trainer):
                    plan = self._replan_in_batch(data_fetcher)
            if skips_epoch:
                progress.increment_by(0, is_last_batch=True)
            else:
                total.started += 1
                current.started += 1
                outputs = self._train(plan, batch, batch_idx)
        total.processed += 1
        current.processed += 1
        if plan.strategy.lr_scheduler_configs:
            self._step_schedulers(plan, batch_idx)
        if skips_epoch:
            raise StopIteration
        if trainer.callbacks != plan.callbacks or len(plan.names) != plan.num_attributes:  # type: ignore[attr-defined]
            plan = self._replan_in_batch(data_fetcher)
        self._call(plan, "on_train_batch_end", outputs, batch, batch_idx)
        if results:
            collect(connector, results)
        else:  # no `self.log`, so no metrics to collect
            results.batch = None
        total.completed += 1
        current.completed += 1
        if results:
            connector.update_train_step_metrics()

    def _call_start_hooks(self, plan: Plan, batch: Any, batch_idx: int) -> Any:
        """Call `on_train_batch_start`; returns the module's result; -1 skips the rest of the epoch."""
        self._call(plan, "on_train_batch_start", batch, batch_idx)
        answer = None
        if plan.module_batch_start is not None:
            names = plan.names
            outer, names[FX] = names[FX], "on_train_batch_start"
            answer = plan.module_batch_start(batch, batch_idx)
            names[FX] = outer
        plan.strategy.on_train_batch_start(batch, batch_idx)
        return answer

    def _step_schedulers(self, plan: Plan, batch_idx: int) -> None:
        """Step the schedulers by step, then at the end of an epoch those by epoch, except ReduceLROnPlateau."""
        if self.trainer.accumulate_grad_batches == 1 or not self._should_accumulate():
            if plan.plain_scheduler_step:
                total: Any = self.scheduler_progress.total
                current: Any = self.scheduler_progress.current
                for config in plan.strategy.lr_scheduler_configs:
                    is_due = (batch_idx + 1) % config.frequency == 0
                    if is_due and config.interval == "step" and not config.reduce_on_plateau:
                        total.ready += 1
                        current.ready += 1
                        config.scheduler.step()  # type: ignore[call-arg]
                        total.completed += 1
                        current.completed += 1
            else:
                self._update_learning_rates("step", update_plateau_schedulers=False)
        if self._is_last_of_epoch():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)

    def _has_plateaus(self, plan: Plan) -> bool:
        """Return whether a scheduler needs a metric; a callback may replace the schedulers at any time."""
        configs = plan.strategy.lr_scheduler_configs
        if any(config.reduce_on_plateau for config in configs):
            return True
        plan.without_plateaus = list(configs)
        return False

    def _replan_in_batch(self, data_fetcher: _DataFetcher) -> Plan:
        """Return a new plan for the rest of this micro-batch, after a hook has changed what the plan was made from."""
        self.plan = make_plan(self.trainer, data_fetcher)
        return self.plan

    def _replan_between_batches(self, data_fetcher: _DataFetcher) -> Plan | None:
        """Return a new plan in mid-epoch; None: Lightning's own loop runs the rest of the epoch."""
        self.reason = why_not_lean(self.trainer, data_fetcher)
        if self.reason and self.plan is not None and self.plan.prefetcher is not None:
            self.plan.prefetcher.settle()
        self.plan = None if self.reason else make_plan(self.trainer, data_fetcher)
        return self.plan


def _nothing() -> None:
    """Replace the calls to a profiler that measures nothing."""
