"""The step time that `trainer time` has measured, and what fits in a time or a budget. Imports no torch."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.core.errors import UserError
from trainer.runs.records import StepTiming

BUSY = 1.15
"""Wall time by CPU time of a rank above which the machine is called busy."""
_MOST_S = 3.2e10
"""A thousand years."""
_UNITS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Timed:
    """Measured steps of a job."""

    steps: int
    step_s: float
    """Wall time of a step of the slowest rank: the mean on a GPU, the median on CPUs."""
    fast_s: float
    """Wall time of the fastest tenth of the steps."""
    fastest_s: float
    slowest_s: float
    cpu_s: float | None
    """Median CPU time of a step of the busiest rank; None: a GPU, or several threads, which are not busy all the
    time."""
    mean_cpu_s: float | None
    """The mean, with logged steps and ends of epochs."""
    ranks: int
    units: int
    """What is paid for: GPUs, or cores that the ranks compute with."""
    device: str | None
    """Name of the GPU; None: CPU ranks."""
    steps_per_epoch: int | None

    @property
    def is_busy(self) -> bool:
        """Whether other processes took the CPU meanwhile, or the ranks waited for each other."""
        return self.cpu_s is not None and self.step_s > BUSY * self.cpu_s

    @property
    def basis(self) -> Literal["wall", "cpu", "fast"]:
        """Clock of the time that is kept for later plans: one that other processes on the machine change least."""
        return "wall" if self.device else "fast" if self.cpu_s is None else "cpu"

    @property
    def calibrating_s(self) -> float:
        """The time that is kept for later plans.

        Of CPU time it is the mean if whole epochs were measured, whose ends take time as well; else the median.
        """
        spans_epochs = self.steps_per_epoch is not None and self.steps >= self.steps_per_epoch
        cpu_s = self.mean_cpu_s if spans_epochs else self.cpu_s
        return {"wall": self.step_s, "fast": self.fast_s, "cpu": cpu_s or 0.0}[self.basis]


def timed(ranks: Sequence[StepTiming]) -> Timed:
    """Return the measured step time of a job from the records of its ranks.

    Raises:
        UserError: There are none.
    """
    if not ranks or not all(one.each_s for one in ranks):
        raise UserError("no step was measured", "trainer logs shows why; fewer steps: --steps 5 --warmup 1")
    device, single = ranks[0].device, all(one.threads == 1 for one in ranks)
    means = [one.wall_s / one.steps for one in ranks]
    medians = [statistics.median(one.each_s) for one in ranks]
    slowest = max(range(len(ranks)), key=lambda rank: (means if device else medians)[rank])
    return Timed(
        ranks[slowest].steps,
        means[slowest] if device else medians[slowest],
        sorted(ranks[slowest].each_s)[len(ranks[slowest].each_s) // 10],
        min(ranks[slowest].each_s),
        max(ranks[slowest].each_s),
        max(statistics.median(one.each_cpu_s) for one in ranks) if single and device is None else None,
        max(one.cpu_s / one.steps for one in ranks) if single and device is None else None,
        len(ranks),
        len(ranks) if device else sum(one.threads for one in ranks),
        device,
        ranks[slowest].steps_per_epoch,
    )


def duration_of(text: str, option: str) -> float:
    """Return the seconds of a duration such as `8h`, `90min` or `1d12h`.

    Raises:
        UserError: It is none.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[smhd])", text.strip())
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != re.sub(r"\s", "", text):
        raise UserError(f"{option} {text}: not a duration", f"write {option} 8h, {option} 90min or {option} 1d12h")
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < total < _MOST_S:
        problem = "more than a thousand years" if total else "no time"
        raise UserError(f"{option} {text}: {problem}", f"write {option} 8h")
    return total


def fitting(seconds: float, step_s: float) -> int:
    """Return the whole steps that fit."""
    return math.floor(seconds / step_s + 1e-9)


def overrides_for(steps: int) -> str:
    """Return the overrides that train for this many steps."""
    return f"trainer.max_steps={steps} trainer.max_epochs=-1"
