"""Losses and timings that the lean loop records, so that Guard and StepClock need no hook before backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from torch import Tensor

Hook = TypeVar("Hook", bound=Callable[..., Any])


@dataclass
class StepRecord:
    """Record of the current optimizer step."""

    losses: list[Tensor] = field(default_factory=list)
    """Losses of its micro-batches so far: each one's part of the step's loss, detached, not scaled. The guard takes the
    list before the optimizer step and leaves an empty one."""
    forward_ended: float = 0.0
    """End of the last micro-batch's forward pass, by `perf_counter`."""
    by_loop: bool = False
    """Whether the loop has recorded this micro-batch already and is now letting Lightning call the hooks."""


def step_record_of(trainer: Trainer) -> StepRecord:
    """Return the loop's record, or a new record if Lightning's loop runs."""
    return getattr(trainer.fit_loop.epoch_loop, "step_record", None) or StepRecord()


def filled_by_lean_loop(hook: Hook) -> Hook:
    """Mark an `on_before_backward` that fills in `StepRecord` and does nothing else: the lean loop does not call it.

    It is called where Lightning runs the step (`trainer.lean_loop=false`, manual optimization, the first micro-batch
    after a resume), and where the loop leaves backward to the strategy, with `by_loop` set.
    """
    hook.is_filled_by_lean_loop = True  # type: ignore[attr-defined]
    return hook
