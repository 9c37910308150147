"""What may happen between two optimizer steps: the ranks agree to stop, to save, or that the time is up.

What they agreed on, and the save of a new best, is done at the next moment of `train/moments.py`: with nothing of the
step left to do, its validation and, where the epoch ends with it, the end of the epoch among it. So a resume neither
repeats nor skips a validation, a hook, or the step of a scheduler.

A boundary is an optimizer step; under manual optimization it is a batch, which may be none, one or several. There what
is due waits for a batch that has stepped: between two that have not, a module may be accumulating gradients of its own,
which no checkpoint holds. Saves that are due at a step happen at the first boundary at or past it.

They agree on a CPU (gloo) group about once a second, never on the device, and always at the same step: each agreement
also fixes the step of the next one. What they agreed on is read a step later, so that who is first need not wait for
the last; where steps are long it is waited for, because a signal should not have to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.callbacks.best import BestMetric
from trainer.callbacks.last_weights import LastWeights
from trainer.config.schema import CheckpointOptions, ResilienceOptions
from trainer.runtime import stop
from trainer.runtime.steps import steps_taken
from trainer.runtime.stop import Request

SaveFunction = Callable[[Trainer], None]

HELD_BATCHES = 1000
"""After so many without an optimizer step, what is due is done all the same."""

SHORT_STEPS = 10
"""Steps between two agreements from which on one is read a step later."""


@dataclass
class _Agreement:
    """Under way. `votes`: the largest request, whether to save, minus the boundaries until the next one."""

    number: int
    votes: torch.Tensor
    work: Any
    """None: it is there."""


@dataclass
class _Due:
    """At the next moment."""

    save: bool = False
    locally: bool = False
    request: Request = Request.NOTHING
    validated: bool = False
    """A validation has ended that may have found a new best."""


class Boundary(Callback):
    """A `StepListener`, the last of the callbacks, and what the loops call at their moments (`moments.Acts`)."""

    def __init__(
        self,
        save: SaveFunction,
        checkpoint: CheckpointOptions,
        resilience: ResilienceOptions,
        stop_request: Path,
        save_failed: Callable[[], bool],
        max_steps: int | None,
        max_time_s: float | None,
        group: torch.distributed.ProcessGroup | None,
        save_locally: SaveFunction | None = None,
        best: BestMetric | None = None,
        save_final: SaveFunction | None = None,
        after_start: Sequence[Callable[[], None]] = (),
    ) -> None:
        """`save_locally`: at the steps of `checkpoint.local_every_n_steps` that have no other save. `save_final`: once
        more, where `on_train_end` has changed the weights. `after_start`: once all of `on_train_start` has run."""
        self.next_step = 0
        self.due = False
        self._due = _Due()
        self._held: tuple[int, _Due] | None = None
        """Since which boundary, what: until an optimizer has stepped."""
        self._best = best
        self._save_final = save_final
        self._after_start = after_start
        self._last_weights = LastWeights(group)
        self._save = save
        self._save_locally = save_locally
        self._checkpoint = checkpoint
        self._resilience = resilience
        self._stop_request = stop_request
        self._save_failed = save_failed
        self._max_steps = max_steps
        self._max_time_s = max_time_s
        self._group = group
        self._next_agreement = 0
        self._under_way: _Agreement | None = None
        self._between = 1
        """Boundaries, as agreed."""
        self._asked: tuple[int, float] | None = None
        self._save_at = self._save_locally_at = 0
        self._saved_step = -1
        self._saved_at = 0.0
        self._started_at = 0.0
        self._trained_s = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"trained_s": self._trained_s + time.monotonic() - self._started_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trained_s = state_dict["trained_s"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = steps_taken(trainer)
        self._started_at = self._saved_at = time.monotonic()
        self._saved_step = step if trainer.ckpt_path is not None else -1  # nothing is saved of step 0 yet
        self._asked, self._held = None, None
        self._next_agreement, self._between, self._under_way = 0, 1, None
        self._plan(step, 0)

    def on_step(
        self, trainer: Trainer, module: LightningModule, step: int, number: int | None = None, stepped: bool = True
    ) -> None:
        """`number` of this boundary, the same on every rank: the step, where each is one. `stepped`: an optimizer has,
        since the boundary before."""
        number = step if number is None else number
        at_the_end = self._max_steps is not None and step >= self._max_steps
        saves_anyway = at_the_end or step >= self._save_at
        locally = step >= self._save_locally_at
        save, request = self._agreed()
        if number >= self._next_agreement and request is Request.NOTHING:
            self._ask(number)
            # At a step that stops the training anyway they wait, or the next one would save or validate again.
            stops_anyway = saves_anyway or validation_follows(trainer)
            if self._group is None or self._between < SHORT_STEPS or stops_anyway:
                saves_now, request = self._agreed()
                save = save or saves_now
        save = save or saves_anyway
        self._plan(step, number)
        if at_the_end and trainer.global_step < step:
            trainer.should_stop = True  # Lightning does not count the steps of a module without an optimizer
        if request is Request.TIME_IS_UP and not trainer.should_stop:  # trainer.min_steps may hold the end back
            trainer.should_stop = True
            save = True
        if save or locally or request >= Request.REQUEUE:
            self._hold(number, _Due(save, locally, request))
        if self._held is not None:
            since, held = self._held
            if stepped or step == self._saved_step or number - since >= HELD_BATCHES:
                self._due.save, self._due.locally, self._due.request = held.save, held.locally, held.request
                self.due, self._held = True, None

    def _hold(self, number: int, due: _Due) -> None:
        since, held = self._held or (number, _Due())
        request = max(held.request, due.request)
        self._held = since, _Due(held.save or due.save, held.locally or due.locally, request)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._best is not None and not trainer.sanity_checking:
            self.due = self._due.validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._best is not None and self._best.decides_without_validation(trainer):
            self.due = self._due.validated = True

    def act(self, trainer: Trainer, is_last: bool) -> None:
        """Do what is due; the last state of a training is always saved."""
        due, self._due, self.due = self._due, _Due(), False
        save = due.save or is_last
        if due.validated and self._best is not None and not _accumulates(trainer):
            save = self._best.decide(trainer) or save
        if save or due.locally or due.request is not Request.NOTHING:
            only_locally = not save and due.request < Request.REQUEUE
            self._act(trainer, steps_taken(trainer), due.request, only_locally)
        if is_last and self._saved_step == steps_taken(trainer):
            self._last_weights.saved(trainer)

    def after_start(self, trainer: Trainer) -> None:
        for act in self._after_start:
            act()

    def after_end(self, trainer: Trainer) -> None:
        if self._save_final is not None and self._last_weights.have_changed(trainer):
            self._save_final(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the loops have no moments, the last state is saved here."""
        if self._agreed()[1] is Request.SAVE_FAILED:
            raise stop.StopTraining(Request.SAVE_FAILED)
        if self._saved_step != steps_taken(trainer):
            self._act(trainer, steps_taken(trainer), Request.NOTHING)

    @property
    def _local_every(self) -> int:
        """Optimizer steps between two local saves; 0: none."""
        return 0 if self._save_locally is None else self._checkpoint.local_every_n_steps or 0

    def _act(self, trainer: Trainer, step: int, request: Request, only_locally: bool = False) -> None:
        if only_locally and self._save_locally is not None and self._saved_step != step:
            self._save_locally(trainer)
            return
        if request is Request.SAVE_FAILED:
            raise stop.StopTraining(request)
        deadline = stop.force_exit_after(self._resilience.stop_deadline_s) if request >= Request.REQUEUE else None
        if self._saved_step != step:
            self._save(trainer)
            self._saved_step, self._saved_at = step, time.monotonic()
        if deadline is not None:
            deadline.cancel()
            raise stop.StopTraining(request)

    def _ask(self, number: int) -> None:
        """Begin an all-reduce: the largest request, whether any rank wants to save, the fewest boundaries until the
        next."""
        now, ahead = time.monotonic(), 1
        if self._asked is not None:
            passed, elapsed_s = number - self._asked[0], now - self._asked[1]
            ahead = max(1, min(1000, int(passed * self._resilience.agree_every_s / max(elapsed_s, 1e-9))))
        minutes = self._checkpoint.every_minutes
        save = minutes is not None and now - self._saved_at >= 60 * minutes
        votes = torch.tensor([int(self._wish(now)), int(save), -ahead])
        work = None
        if self._group is not None:
            biggest = torch.distributed.ReduceOp.MAX
            work = torch.distributed.all_reduce(votes, biggest, group=self._group, async_op=True)
        self._asked = (number, now)
        self._under_way = _Agreement(number, votes, work)

    def _agreed(self) -> tuple[bool, Request]:
        """Whether to save, and the request, of the agreement that is under way; nothing where none is."""
        if self._under_way is None:
            return False, Request.NOTHING
        agreement, self._under_way = self._under_way, None
        if agreement.work is not None:
            agreement.work.wait()
        request, save, negative_ahead = agreement.votes.tolist()
        self._between = -negative_ahead
        self._next_agreement = agreement.number + self._between
        return bool(save), Request(request)

    def _wish(self, now: float) -> Request:
        if self._save_failed():
            return Request.SAVE_FAILED
        if self._stop_request.exists():
            return Request.STOP
        if stop.signalled():
            return Request.REQUEUE
        if self._max_time_s is not None and self._trained_s + now - self._started_at >= self._max_time_s:
            return Request.TIME_IS_UP
        return Request.NOTHING

    def _plan(self, step: int, number: int) -> None:
        """The next steps at which something must happen. `next_step` is for those who count steps as boundaries."""
        self._save_at = _next(step, self._checkpoint.every_n_steps)
        self._save_locally_at = _next(step, self._local_every)
        agreement = number + 1 if self._under_way is not None else self._next_agreement
        due = [agreement, self._save_at, self._save_locally_at]
        if self._max_steps is not None and self._max_steps > step:
            due.append(self._max_steps)
        self.next_step = min(due)


def _next(step: int, every: int | None) -> int:
    """The first multiple of `every` after `step`."""
    return step + every - step % every if every else sys.maxsize


def _accumulates(trainer: Trainer) -> bool:
    """Whether gradients are being accumulated, which no checkpoint holds: this is not between two optimizer steps."""
    return trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate()


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning will validate after this step (2.6: `_TrainingEpochLoop._should_check_val_fx`, private)."""
    fit_loop = trainer.fit_loop
    assert fit_loop._data_fetcher is not None
    return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
