"""Decide which running trials fall behind and are stopped early, as pure functions of the curves of all trials.

A curve is the value of the metric at each validation, the first one at 1. The decisions are those of the pruners of the
same name in Optuna 5.0 (optuna/pruners/), without its storage.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from trainer.sweeps.records import Spec

_STARTUP = 5
"""The median pruner prunes nothing before so many trials have reached a validation (Optuna: n_startup_trials)."""
_BRACKETS = 3
"""Brackets of Hyperband: trials whose first rung is at 1, factor and factor^2 times `prune_after`."""


def why_pruned(
    spec: Spec, number: int, curves: Mapping[int, Sequence[float]], mode: Literal["min", "max"]
) -> tuple[int, str] | None:
    """Return at which validation a trial falls behind, and a sentence; None if it may continue.

    Args:
        spec: The spec, with a pruner.
        number: The trial.
        curves: The curve of each trial, this one included.
        mode: Whether lower or higher values are better.
    """
    sign = -1.0 if mode == "max" else 1.0
    lower = {trial: [sign * value for value in curve] for trial, curve in curves.items()}
    if spec.prune == "median":
        return _behind_median(spec, number, lower)
    if spec.prune == "hyperband":
        bracket = number % _BRACKETS
        mates = {trial: curve for trial, curve in lower.items() if trial % _BRACKETS == bracket}
        return _behind_rung(spec, number, mates, bracket)
    return _behind_rung(spec, number, lower, 0)


def _behind_rung(
    spec: Spec, number: int, curves: Mapping[int, Sequence[float]], bracket: int
) -> tuple[int, str] | None:
    """Return the first rung at which the trial is not among the best of one in `prune_factor`.

    Only trials that have reached a rung compete there. While they are fewer than the factor, the best one continues.
    """
    factor, mine = spec.prune_factor, curves[number]
    rung = spec.prune_after * factor**bracket
    while rung <= len(mine):
        reached = sorted(curve[rung - 1] for curve in curves.values() if len(curve) >= rung)
        kept = max(len(reached) // factor, 1)
        if mine[rung - 1] > reached[kept - 1]:
            place = reached.index(mine[rung - 1]) + 1
            return rung, f"place {place} of {len(reached)} at validation {rung}; the best {kept} continue"
        rung *= factor
    return None


def _behind_median(spec: Spec, number: int, curves: Mapping[int, Sequence[float]]) -> tuple[int, str] | None:
    """Return the newest validation if the trial's best is worse than the median of the others there."""
    mine = curves[number]
    at = len(mine)
    others = [min(curve[:at]) for trial, curve in curves.items() if trial != number and len(curve) >= at]
    if at < spec.prune_after or at == 0 or len(others) < _STARTUP or min(mine) <= statistics.median(others):
        return None
    return at, f"worse than the median of {len(others)} trials at validation {at}"
