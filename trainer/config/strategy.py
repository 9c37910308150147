"""Options of each strategy; `strategy.name` chooses the class. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Single:
    """One process, no wrapping."""

    name: str = "single"


@dataclass
class Ddp:
    """A whole copy of the model on each rank; gradients averaged."""

    name: str = "ddp"
    bucket_cap_mb: int = 25
    """Size of the all-reduce buckets."""
    find_unused_parameters: bool = False
    """For models in which a step leaves parameters without a gradient; costs a walk of the graph a step."""
    gradient_as_bucket_view: bool = True
    """Gradients are views of the buckets: one copy less."""


STRATEGIES: dict[str, type] = {"single": Single, "ddp": Ddp}
"""Name to options class."""
