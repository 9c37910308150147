"""What the plan of a run expected when it was launched (`plan.json`), beside what the run has measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.core.units import duration, gib, seconds, three_digits
from trainer.runs import bill_text
from trainer.runs.bill import Charge
from trainer.runs.directory import RunDirectory
from trainer.runs.facts import mapping
from trainer.runs.sampled import Curve, sampled_curves, step_seconds

_TRAINING = ("train", "data", "first_step", "redone")
"""Classes of the ledger in which steps are made: a plan knows of no validation, saving, start or queue."""

_LARGEST_BATCH = 1 << 53


@dataclass(frozen=True)
class Figure:
    """A figure that was planned and, if `measured` is known, measured."""

    name: str
    planned: float
    measured: float | None
    text: Callable[[float], str]
    """Formats a value."""
    so_far: bool = False
    """Whether the measured value will grow until the run has ended."""

    @property
    def difference(self) -> float | None:
        """How much more was measured than planned, as a share of the planned value."""
        if self.measured is None or self.so_far or not self.planned:
            return None
        return self.measured / self.planned - 1

    def cells(self) -> list[str]:
        """Return the name, the planned and the measured value and the difference, as text."""
        measured = "not measured" if self.measured is None else self.text(self.measured)
        difference = "" if self.difference is None else f"{self.difference:+.0%}"
        return [self.name, self.text(self.planned), measured + (" so far" if self.so_far else ""), difference]


def plan_beside_run(
    run: RunDirectory, config: Mapping[str, Any], charge: Charge, ledger: Mapping[str, Any] | None
) -> list[Figure]:
    """Return what was planned, each figure with what was measured; empty without a plan.

    Args:
        run: The run.
        config: Its configuration.
        charge: What it has used (`bill(run).total`).
        ledger: Its time (`runs.ledger.ledger`).
    """
    planned = run.plan()
    if planned is None:
        return []
    curves = sampled_curves(run.metrics_path)
    batch = mapping(config.get("data")).get("batch_size")
    batch_size = batch if type(batch) is int and 0 < batch < _LARGEST_BATCH else None
    peak_gb = _largest(curves, "gpu/peak_allocated_gb")
    spent = (ledger or {}).get("seconds", {})
    hours = charge.gpu_hours if planned.device else charge.cpu_core_hours
    # The last steps need not be in the curves: not every step is logged.
    done = max((beat.step for beat in run.heartbeats().values()), default=0)
    is_over = planned.steps is not None and done >= planned.steps
    money = bill_text.money
    figures = [
        _figure("memory, tensors", planned.peak_bytes, peak_gb * 1e9, lambda value: gib(round(value))),
        _figure("step", planned.step_s, step_seconds(curves, batch_size), seconds),
        _figure("tokens/s", planned.tokens_per_s, _median(curves, "train/tokens_per_s"), three_digits),
        _figure("samples/s", planned.samples_per_s, _median(curves, "train/samples_per_s"), three_digits),
        _figure("training", planned.train_s, sum(spent.get(name, 0.0) for name in _TRAINING), duration, not is_over),
        _figure("device hours", planned.device_hours, hours, three_digits, not is_over),
        _figure("energy", planned.energy_kwh, charge.energy_kwh, bill_text.energy, not is_over),
        _figure("cost", planned.cost, charge.cost, lambda value: money(value, planned.currency), not is_over),
    ]
    return [one for one in figures if one is not None]


def _figure(
    name: str, planned: float | None, measured: float | None, text: Callable[[float], str], so_far: bool = False
) -> Figure | None:
    if planned is None or not math.isfinite(planned):
        return None
    measured = measured if measured and math.isfinite(measured) else None
    return Figure(name, planned, measured, text, so_far and measured is not None)


def _median(curves: Mapping[str, Curve], name: str) -> float | None:
    """Return the median without the first value, which contains what is done once."""
    values = [value for _, value in sorted(curves.get(name, []))][1:]
    return statistics.median(values) if values else None


def _largest(curves: Mapping[str, Curve], name: str) -> float:
    """Return the largest value of a metric; 0 without one."""
    return max((value for _, value in curves.get(name, [])), default=0.0)
