"""The training loop: Lightning's, without what it does on every batch and nobody asked for.

Lightning 2.6 spends 0.8 to 0.9 ms of CPU on a step beside the training itself, on two and more ranks also a broadcast
and a wait for the device (docs/speed.md). `LeanTrainingEpochLoop` keeps the state, the hooks, the order and the
arithmetic of `_TrainingEpochLoop`; it does not keep the calls to hooks that nobody overrides. Weights, logged
metrics, counters and checkpoints are equal, bit for bit: tests/train/test_loop.py trains with both and compares.

What differs, on purpose:
- No broadcast of SIGTERM on every batch: the ranks agree about once a second on the CPU (`callbacks/boundary.py`).
- `outputs` of `on_train_batch_end` is `{"loss": ...}` as in Lightning (divided by the micro-batches of the step, and
  whatever else `training_step` returned beside it). Its loss is detached but not copied: it shares memory with what
  `training_step` returned, unless something may change that in place during backward.
- The gradients of the step before are freed before the forward pass, not after it, so that the two do not take memory
  at the same time: a `training_step` that reads them finds None. Not where `on_before_zero_grad` or
  `optimizer_zero_grad` is overridden, nor where a callback of the user's has `on_exception`, which may want to look at
  them. What a backward inside of `training_step` leaves behind is zeroed as ever.
- What overrides what is looked up at the start of an epoch, and again before `training_step` and before
  `on_train_batch_end` where callbacks were added, removed or replaced, optimizers replaced, or the module was given an
  attribute that it did not have, such as a hook. Not seen before the next epoch is a hook that is set on a callback
  object, one set on the module for the second time, a patched method of a Lightning class (`mock.patch.object`), and
  `module.automatic_optimization` or `trainer.profiler` set in mid-epoch. All else that a callback may set on the
  Trainer or the strategy counts at once: schedulers, clipping, accumulation, validation, `max_steps`, `should_stop`.
- A callback that is added or removed inside of a hook is so after this same hook.

Lightning's own loop trains instead (the log says why) under manual optimization, a profiler, several optimizers,
`dataloader_iter`, and where a method that this loop is in the place of has been replaced (`train/loop_own.py`).
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher

from trainer.train.loop_plan import Plan, make_plan, why_not_lean
from trainer.train.loop_step import FX, LeanOptimization
from trainer.train.moments import use_moments

log = logging.getLogger(__name__)


def use_lean_loop(trainer: Trainer) -> None:
    """Train with `LeanTrainingEpochLoop`; call it before `trainer.fit`."""
    use_moments(trainer, LeanTrainingEpochLoop)


class LeanTrainingEpochLoop(LeanOptimization):
    """An epoch of training; validation, resuming and the ends of epochs are Lightning's own code."""

    plan: Plan | None = None
    """None: Lightning's own way."""
    reason: str | None = None
    """Why it is Lightning's own way."""
    waited_s = 0.0
    """In all, for batches."""
    _said = False

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        self.reason = why_not_lean(self.trainer, data_fetcher)
        self.plan = None
        if self.reason is None:
            self.plan = make_plan(self.trainer, data_fetcher)
            data_fetcher._start_profiler = data_fetcher._stop_profiler = _nothing
        if not self._said and self.trainer.is_global_zero:
            if self.reason is None:
                log.info("training with the lean loop")
            else:
                log.warning("training with Lightning's own loop, up to 1 ms a step slower: %s", self.reason)
            self._said = True

    def run(self, data_fetcher: _DataFetcher) -> None:
        try:
            super().run(data_fetcher)
        finally:
            self.plan = None

    def _broadcast_sigterm_tensor(self) -> None:
        """Nothing: `callbacks/boundary.py` agrees on stopping, without waiting for the device on every batch."""

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
        """The same answer by fewer questions; in doubt it is Lightning's."""
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
        """`_num_ready_batches_reached`, without two properties."""
        progress = self.batch_progress
        return progress.is_last_batch or progress.current.ready == self.trainer.fit_loop.max_batches

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Lightning's where there is something to do: validation, a plateau, the end."""
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
            return  # it looks at the moment itself
        if trainer.accumulate_grad_batches == 1 or not self._should_accumulate():
            self._batches_that_stepped += 1
        if self.actor is not None and self.actor.due:
            self.between_batches()

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """One micro-batch. The first after a resume is Lightning's, which knows all the places to resume at.

        Counters are raised by hand: ten calls of `increment_...` a step are 4 us.
        """
        plan, trainer = self.plan, self.trainer
        if plan is not None and (
            trainer.callbacks != plan.callbacks  # type: ignore[attr-defined]
            or plan.strategy._optimizers != plan.optimizers
            or len(plan.module.__dict__) != plan.num_attributes
        ):
            plan = self._plan_again(data_fetcher)
        if plan is None or self._restarting:
            super().advance(data_fetcher)
            return
        if self.val_loop._restarting:
            self.val_loop.restarting = False
        began = perf_counter()
        batch = plan.next_batch()
        self.waited_s += perf_counter() - began
        progress = self.batch_progress
        total: Any = progress.total
        current: Any = progress.current
        batch_idx = current.ready
        progress.is_last_batch = data_fetcher.done
        batch = plan.to_device(batch)
        total.ready += 1
        current.ready += 1
        self._begin_batch(batch)

        outputs: dict[str, Any] | None = None
        refused = False
        if batch is None:
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        else:
            if plan.has_start_hooks:
                refused = self._start_hooks(plan, batch, batch_idx) == -1
                if not plan.is_of(trainer):
                    plan = self._current(data_fetcher)
            if refused:
                progress.increment_by(0, is_last_batch=True)
            else:
                total.started += 1
                current.started += 1
                outputs = self._train(plan, batch, batch_idx)
        total.processed += 1
        current.processed += 1
        if plan.strategy.lr_scheduler_configs:
            self._step_schedulers(plan, batch_idx)
        if refused:
            raise StopIteration
        if trainer.callbacks != plan.callbacks or len(plan.module.__dict__) != plan.num_attributes:  # type: ignore[attr-defined]
            plan = self._current(data_fetcher)
        self._call(plan, "on_train_batch_end", outputs, batch, batch_idx)
        results = self._results
        if results:
            trainer._logger_connector.on_batch_end()
        else:  # without a `self.log` there are no metrics to collect
            results.batch = None
        total.completed += 1
        current.completed += 1
        if results:
            trainer._logger_connector.update_train_step_metrics()

    def _begin_batch(self, batch: Any) -> None:
        """`_LoggerConnector.on_batch_start`, which looks the results up through five properties."""
        connector, results = self.trainer._logger_connector, self._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch = batch
        results.batch_size = None
        results.dataloader_idx = None

    def _start_hooks(self, plan: Plan, batch: Any, batch_idx: int) -> Any:
        """The module's answer; -1 ends the epoch."""
        self._call(plan, "on_train_batch_start", batch, batch_idx)
        answer = None
        if plan.module_batch_start is not None:
            module = plan.module.__dict__
            outer, module[FX] = module[FX], "on_train_batch_start"
            answer = plan.module_batch_start(batch, batch_idx)
            module[FX] = outer
        plan.strategy.on_train_batch_start(batch, batch_idx)
        return answer

    def _step_schedulers(self, plan: Plan, batch_idx: int) -> None:
        """Learning rate schedulers by step, then those by epoch at its end; ReduceLROnPlateau follows validation."""
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
        """Whether a scheduler waits for a metric; a callback may have put others into the strategy at any time."""
        configs = plan.strategy.lr_scheduler_configs
        if any(config.reduce_on_plateau for config in configs):
            return True
        plan.without_plateaus = list(configs)
        return False

    def _current(self, data_fetcher: _DataFetcher) -> Plan:
        """The plan for the rest of this micro-batch, where a hook has changed what it was made of."""
        self.plan = make_plan(self.trainer, data_fetcher)
        return self.plan

    def _plan_again(self, data_fetcher: _DataFetcher) -> Plan | None:
        """In mid-epoch, between two micro-batches. None: the rest of the epoch is Lightning's."""
        self.reason = why_not_lean(self.trainer, data_fetcher)
        self.plan = None if self.reason else make_plan(self.trainer, data_fetcher)
        return self.plan


def _nothing() -> None:
    """In the place of a profiler that measures nothing."""
