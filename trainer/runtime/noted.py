"""What the lean loop notes of each micro-batch for the guard and the clock, which then need no hook before backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from torch import Tensor

Hook = TypeVar("Hook", bound=Callable[..., Any])


@dataclass
class Noted:
    """Of the optimizer step that is under way."""

    losses: list[Tensor] = field(default_factory=list)
    """Of its micro-batches so far: each one's part of the step's loss, detached, not scaled. The guard takes the list
    before the optimizer's step and leaves an empty one."""
    forward_ended: float = 0.0
    """By `perf_counter`, of the last micro-batch."""
    by_loop: bool = False
    """The loop has noted this micro-batch, and now lets Lightning call the hooks."""


def noted_of(trainer: Trainer) -> Noted:
    """The loop's; one's own where the loop is Lightning's."""
    return getattr(trainer.fit_loop.epoch_loop, "noted", None) or Noted()


def noted_by_the_loop(hook: Hook) -> Hook:
    """Marks an `on_before_backward` that fills in `Noted` and does nothing else: the lean loop does not call it.

    It is called where the step is Lightning's (`trainer.lean_loop=false`, manual optimization, the first micro-batch
    after a resume), and where the loop leaves backward to the strategy, with `by_loop` set.
    """
    hook.is_noted_by_the_loop = True  # type: ignore[attr-defined]
    return hook
