"""What the bench asks the process that compares runs, `trainer.faultbench.compare`, and what that answers, a line each.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs to be compared."""

    ours: str
    """Run directory."""
    theirs: str
    step: int
    """Step of the checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The answer to a `Comparison`."""

    difference: str | None
    """The first difference, or why they cannot be compared; null: they are equal bit for bit."""
