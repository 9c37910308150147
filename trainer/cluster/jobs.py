"""What the schedulers say of runs: asked once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trainer.runs.directory import RunDirectory


def states_of(runs: Iterable[RunDirectory]) -> Mapping[str, str] | None:
    """SLURM job id to state name for the runs that SLURM has; None where no run is SLURM's or SLURM is not here."""
    return None
