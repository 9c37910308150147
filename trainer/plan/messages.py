"""What `trainer plan` asks the process that simulates, `trainer.plan.run`, and what that answers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.core.errors import Refusal
from trainer.plan.job import Variant
from trainer.plan.work import Work


@dataclass(frozen=True, kw_only=True)
class SimulationRequest:
    """A job whose variants are to be simulated."""

    config: dict[str, Any]
    """The composed configuration."""
    with_data: bool
    """Whether to read the data; otherwise the shape of a batch follows from the model."""
    variants: list[Variant]


@dataclass(frozen=True)
class Simulated:
    """Memory of rank 0, in bytes. No other rank needs more: a shard of rank 0 is the largest."""

    peak: int
    parts: dict[str, int] = field(default_factory=dict)
    """Bytes of each part at the peak."""
    where: str = "passes"
    """When the peak is: `passes` (forward and backward) or `update` (clipping and optimizer)."""
    rest: int = 0
    """Bytes between two steps."""
    passes: int = 0
    update: int = 0
    states: dict[str, int] = field(default_factory=dict)
    """Bytes of parameters, gradients and optimizer states before the optimizer's step, without rounding."""
    work: Work = field(default_factory=Work)
    """Operations of the second step."""


@dataclass(frozen=True, kw_only=True)
class SimulationAnswer:
    """The simulation of one variant."""

    simulated: Simulated | None = None
    """None: see `error`."""
    error: Refusal | None = None
    """Why it cannot be simulated."""
    micro_batch: int | None = None
    """The micro-batch that was simulated: a module's own loaders set it."""
    samples_per_epoch: int | None = None
    """Samples of the training data; None: the data was not read, or has no length."""
