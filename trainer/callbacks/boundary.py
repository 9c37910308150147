"""Agreement between ranks at step boundaries: to stop, to save, or that the time limit is reached.

The agreed actions, and the save of a new best checkpoint, run at the next save point (`train/save_points.py`): after
all work of the step, including its validation and, if the epoch ends with it, the end of the epoch. So a resume neither
repeats nor skips a validation, a hook, or the step of a scheduler.

A boundary is an optimizer step. Under manual optimization it is a batch, which may have none, one or several steps.
There, actions wait for a batch that has stepped: between two batches without a step, a module may be accumulating
gradients itself, which no checkpoint holds. A save that is due at a step happens at the first boundary at or past
it.

The ranks agree on a CPU (gloo) group about once a second, never on the device, and always at the same step: each
agreement also fixes the step of the next one. Its result is read one step later, so that the first rank need not wait
for the last one. Where steps are long, the result is waited for, because a signal should not have to wait for a step.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.callbacks.best import BestMetric
from trainer.callbacks.last_weights import FinalWeights
from trainer.config.schema import CheckpointOptions, ResilienceOptions
from trainer.runtime import cpu_groups, stop
from trainer.runtime.steps import steps_taken
from trainer.runtime.stop import Request

MAX_DEFERRED_BATCHES = 1000
"""Batches without an optimizer step after which a due action is done anyway."""

SHORT_STEPS = 10
"""Minimum number of boundaries between two agreements for reading the result of one a step later."""


class Saver(ABC):
    """Interface of the object that saves checkpoints. All saves are collective."""

    best: BestMetric | None = None
    """Decides after a validation whether to save a new best; None: nothing is monitored."""
    saves_locally: bool = False
    """Whether there is a node-local folder (`checkpoint.local_dir`)."""

    @abstractmethod
    def save(self, trainer: Trainer) -> None:
        """Save to the run directory."""

    @abstractmethod
    def save_locally(self, trainer: Trainer) -> None:
        """Save to the node-local folder: at steps of `checkpoint.local_every_n_steps` that have no other save."""

    @abstractmethod
    def save_final(self, trainer: Trainer) -> None:
        """Save the last step once more, after `on_train_end` has changed the weights."""

    @abstractmethod
    def has_failed(self) -> bool:
        """Return whether a save has failed and must end the training."""


@dataclass(frozen=True)
class BoundaryOptions:
    """When to save and when to stop."""

    checkpoint: CheckpointOptions
    resilience: ResilienceOptions
    stop_request: Path
    """File whose existence requests that the ranks save and stop."""
    max_steps: int | None = None
    """Optimizer steps of the whole training."""
    max_time_s: float | None = None
    """Training time over all attempts, in seconds."""


@dataclass
class _Agreement:
    """An all-reduce in flight."""

    boundary: int
    """Number of the boundary at which it was started."""
    votes: torch.Tensor
    """The largest request, whether to save, minus the number of boundaries until the next agreement."""
    wait: Callable[[], object] | None
    """Waits for the result; None: one rank, nothing to wait for."""


@dataclass
class _Due:
    """Actions for the next save point."""

    save: bool = False
    save_locally: bool = False
    request: Request = Request.NOTHING
    validated: bool = False
    """Whether a validation has ended that may have produced a new best value."""


class Boundary(Callback):
    """Saves and stops: the last of the callbacks, and the handler of save points (`SavePointHandler`).

    `StepClock` calls `on_step` at `next_step`.
    """

    def __init__(
        self,
        saver: Saver,
        options: BoundaryOptions,
        group: torch.distributed.ProcessGroup | None,
        after_train_start: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Create the boundary of an attempt.

        Args:
            saver: Saves the checkpoints.
            options: When to save and when to stop.
            group: CPU (gloo) group of all ranks; None for one rank.
            after_train_start: Functions to call after every callback's `on_train_start`.
        """
        self.next_step = 0
        self.due = False
        self._due = _Due()
        self._deferred: tuple[int, _Due] | None = None
        """Boundary of the first deferred action, and the actions: they wait until an optimizer has stepped."""
        self._saver = saver
        self._after_train_start = after_train_start
        self._final_weights = FinalWeights(group)
        self._checkpoint = options.checkpoint
        self._resilience = options.resilience
        self._stop_request = options.stop_request
        self._max_steps = options.max_steps
        self._max_time_s = options.max_time_s
        self._group = group
        self._next_agreement = 0
        self._pending: _Agreement | None = None
        self._interval = 1
        """Boundaries between two agreements, as agreed."""
        self._last_start: tuple[int, float] | None = None
        """Boundary and time at which the last agreement was started."""
        self._save_at = self._save_locally_at = 0
        self._saved_step = -1
        self._saved_at = 0.0
        self._started_at = 0.0
        self._trained_s = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the training time so far, for `trainer.max_time`."""
        return {"trained_s": self._trained_s + time.monotonic() - self._started_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the training time of earlier attempts."""
        self._trained_s = state_dict["trained_s"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Schedule the first save and agreement."""
        step = steps_taken(trainer)
        self._started_at = self._saved_at = time.monotonic()
        self._saved_step = step if trainer.ckpt_path is not None else -1  # there is no checkpoint of step 0 yet
        self._last_start, self._deferred = None, None
        self._next_agreement, self._interval, self._pending = 0, 1, None
        self._schedule(step, 0)

    def on_step(
        self, trainer: Trainer, module: LightningModule, step: int, number: int | None = None, stepped: bool = True
    ) -> None:
        """Decide what is due after this boundary.

        Args:
            trainer: The Trainer.
            module: The module.
            step: Optimizer steps completed.
            number: Number of this boundary, the same on every rank; None: `step`.
            stepped: Whether an optimizer has stepped since the previous boundary.
        """
        number = step if number is None else number
        at_the_end = self._max_steps is not None and step >= self._max_steps
        saves_anyway = at_the_end or step >= self._save_at
        save_locally = step >= self._save_locally_at
        save, request = self._finish_agreement()
        if number >= self._next_agreement and request is Request.NOTHING:
            self._start_agreement(number)
            # At a step that stops the training anyway they wait, or the next one would save or validate again.
            stops_anyway = saves_anyway or validation_follows(trainer)
            if self._group is None or self._interval < SHORT_STEPS or stops_anyway:
                saves_now, request = self._finish_agreement()
                save = save or saves_now
        save = save or saves_anyway
        self._schedule(step, number)
        if at_the_end and trainer.global_step < step:
            trainer.should_stop = True  # Lightning does not count the steps of a module without an optimizer
        if request is Request.TIME_IS_UP and not trainer.should_stop:  # trainer.min_steps may delay the end
            trainer.should_stop = True
            save = True
        if save or save_locally or request >= Request.REQUEUE:
            self._defer(number, _Due(save, save_locally, request))
        if self._deferred is not None:
            since, due = self._deferred
            if stepped or step == self._saved_step or number - since >= MAX_DEFERRED_BATCHES:
                self._due.save, self._due.save_locally, self._due.request = due.save, due.save_locally, due.request
                self.due, self._deferred = True, None

    def _defer(self, number: int, due: _Due) -> None:
        """Add actions to those that wait for an optimizer step."""
        since, before = self._deferred or (number, _Due())
        request = max(before.request, due.request)
        self._deferred = since, _Due(before.save or due.save, before.save_locally or due.save_locally, request)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check for a new best at the next save point."""
        if self._saver.best is not None and not trainer.sanity_checking:
            self.due = self._due.validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check for a new best at the end of the epoch, if training logs the monitored metric."""
        if self._saver.best is not None and self._saver.best.decides_without_validation(trainer):
            self.due = self._due.validated = True

    def on_save_point(self, trainer: Trainer, is_last: bool) -> None:
        """Do what is due; the last state of a training is always saved."""
        due, self._due, self.due = self._due, _Due(), False
        save = due.save or is_last
        if due.validated and self._saver.best is not None and not _is_accumulating(trainer):
            save = self._saver.best.decide(trainer) or save
        if save or due.save_locally or due.request is not Request.NOTHING:
            only_locally = not save and due.request < Request.REQUEUE
            self._save_and_stop(trainer, steps_taken(trainer), due.request, only_locally)
        if is_last and self._saved_step == steps_taken(trainer):
            self._final_weights.record(trainer)

    def after_train_start(self, trainer: Trainer) -> None:
        """Call the functions that must run after every `on_train_start`."""
        for function in self._after_train_start:
            function()

    def after_train_end(self, trainer: Trainer) -> None:
        """Save once more if `on_train_end` has changed the weights."""
        if self._final_weights.have_changed(trainer):
            self._saver.save_final(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state if the loops have no save points."""
        if self._finish_agreement()[1] is Request.SAVE_FAILED:
            raise stop.StopTraining(Request.SAVE_FAILED)
        if self._saved_step != steps_taken(trainer):
            self._save_and_stop(trainer, steps_taken(trainer), Request.NOTHING)

    @property
    def _local_every(self) -> int:
        """Optimizer steps between two local saves; 0: none."""
        return self._checkpoint.local_every_n_steps or 0 if self._saver.saves_locally else 0

    def _save_and_stop(self, trainer: Trainer, step: int, request: Request, only_locally: bool = False) -> None:
        if only_locally and self._saver.saves_locally and self._saved_step != step:
            self._saver.save_locally(trainer)
            return
        if request is Request.SAVE_FAILED:
            raise stop.StopTraining(request)
        deadline = stop.force_exit_after(self._resilience.stop_deadline_s) if request >= Request.REQUEUE else None
        if self._saved_step != step:
            self._saver.save(trainer)
            self._saved_step, self._saved_at = step, time.monotonic()
        if deadline is not None:
            deadline.cancel()
            raise stop.StopTraining(request)

    def _start_agreement(self, number: int) -> None:
        """Start an all-reduce: the largest request, whether any rank wants to save, the next agreement's boundary."""
        now, ahead = time.monotonic(), 1
        if self._last_start is not None:
            passed, elapsed_s = number - self._last_start[0], now - self._last_start[1]
            ahead = max(1, min(1000, int(passed * self._resilience.agree_every_s / max(elapsed_s, 1e-9))))
        minutes = self._checkpoint.every_minutes
        save = minutes is not None and now - self._saved_at >= 60 * minutes
        # The maximum of a negative number: the fewest boundaries that any rank requests.
        votes = torch.tensor([int(self._own_request(now)), int(save), -ahead])
        wait = None
        if self._group is not None:
            wait = cpu_groups.start_all_reduce(votes, torch.distributed.ReduceOp.MAX, self._group)
        self._last_start = (number, now)
        self._pending = _Agreement(number, votes, wait)

    def _finish_agreement(self) -> tuple[bool, Request]:
        """Wait for the pending agreement; returns whether to save and the request, or nothing if none is pending."""
        if self._pending is None:
            return False, Request.NOTHING
        agreement, self._pending = self._pending, None
        if agreement.wait is not None:
            agreement.wait()
        request, save, negative_ahead = agreement.votes.tolist()
        self._interval = -negative_ahead
        self._next_agreement = agreement.boundary + self._interval
        return bool(save), Request(request)

    def _own_request(self, now: float) -> Request:
        """Return this rank's request."""
        if self._saver.has_failed():
            return Request.SAVE_FAILED
        signalled = stop.signalled()  # before the file is looked for, which is written before the signal is sent
        if self._stop_request.exists():
            return Request.STOP
        if signalled:
            return Request.REQUEUE
        if self._max_time_s is not None and self._trained_s + now - self._started_at >= self._max_time_s:
            return Request.TIME_IS_UP
        return Request.NOTHING

    def _schedule(self, step: int, number: int) -> None:
        """Set the next steps at which something must happen. `next_step` is for callers whose boundaries are steps."""
        self._save_at = _next_multiple(step, self._checkpoint.every_n_steps)
        self._save_locally_at = _next_multiple(step, self._local_every)
        agreement = number + 1 if self._pending is not None else self._next_agreement
        due = [agreement, self._save_at, self._save_locally_at]
        if self._max_steps is not None and self._max_steps > step:
            due.append(self._max_steps)
        self.next_step = min(due)


def _next_multiple(step: int, every: int | None) -> int:
    """Return the first multiple of `every` after `step`."""
    return step + every - step % every if every else sys.maxsize


def _is_accumulating(trainer: Trainer) -> bool:
    """Return whether the training is between two micro-batches of a step: no checkpoint holds these gradients."""
    return trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate()


def validation_follows(trainer: Trainer) -> bool:
    """Return whether Lightning will validate after this step (2.6: `_TrainingEpochLoop._should_check_val_fx`)."""
    fit_loop = trainer.fit_loop
    assert fit_loop._data_fetcher is not None
    return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
