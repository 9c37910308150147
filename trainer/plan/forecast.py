"""What a job takes until its end: time, allocations, checkpoints, energy and money. Imports no torch.

A figure that is not known is None, and `not_known` has the reason under its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.plan.calibration import Correction
from trainer.plan.roofline import StepTime

START_S = 120.0
"""Seconds from the start of an allocation to its first step: imports, loading, compiling. An assumption."""
POWER_SHARE = 0.9
"""Share of its power limit that a GPU takes while it trains. An assumption."""
SIGNAL_EARLY_S = 30.0
"""SLURM may signal this much early (sbatch --signal)."""
SAVE_MARGIN = 2.0
"""A save before the end may take this many times as long as the slowest that was measured."""


@dataclass(frozen=True)
class Job:
    """What a forecast depends on beside the time of a step."""

    samples_per_step: int | None
    """The global batch."""
    tokens_per_sample: int | None
    samples_per_epoch: int | None
    ranks: int
    units: int
    """What is paid for: GPUs or CPU cores."""
    device: str
    """cuda or cpu."""
    power_watts: float | None
    """Power limit of a device."""
    time_limit_s: float | None
    """Of an allocation."""
    checkpoint_bytes: int | None
    save_s: float | None
    """Longest measured save of the last runs that is comparable."""
    save_source: str = ""


@dataclass(frozen=True)
class Forecast:
    """Figures of a job until its end."""

    step: StepTime
    correction: Correction
    samples_s: float | None = None
    tokens_s: float | None = None
    mfu: float | None = None
    steps: int | None = None
    """Optimizer steps until the end."""
    epochs: float | None = None
    train_s: float | None = None
    """Seconds of training steps, without validation, saving, starts and queues."""
    device_hours: float | None = None
    allocations: int | None = None
    """Times that the job is started: it is requeued at each time limit."""
    save_before_end_s: int | None = None
    """What the measured saves justify for `cluster.save_before_end_s`."""
    checkpoint_bytes: int | None = None
    energy_kwh: float | None = None
    """Of the devices only: no host, no cooling."""
    cost: float | None = None
    currency: str = ""
    co2_kg: float | None = None
    not_known: dict[str, str] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """Seconds of a step, calibrated."""
        return self.step.total * self.correction.factor

    @property
    def error(self) -> str:
        """Known error of the step time, and of what follows from it."""
        if self.correction.error is None:
            return f"not known; {self.correction.text}"
        return f"{max(0.01, self.correction.error):.0%}; {self.correction.text}"

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        step = {key: value * self.correction.factor for key, value in vars(self.step).items()}
        figures = {
            key: value
            for key, value in vars(self).items()
            if key not in ("step", "correction", "not_known", "currency")
        }
        return {
            "step_s": self.step_s,
            "step_error": self.correction.error,
            "calibration": self.correction.text,
            "step_parts_s": step,
            **figures,
            "currency": self.currency or None,
            "not_known": self.not_known,
        }


def forecast(
    config: Mapping[str, Any], job: Job, step: StepTime, correction: Correction, peak_s_per_sample: float | None
) -> Forecast:
    """Return the forecast of a job.

    Args:
        config: The composed configuration.
        job: Sizes and limits.
        step: Computed time of a step.
        correction: Its calibration.
        peak_s_per_sample: Seconds in which all devices would do the FLOPs of a sample at their peak; None: no MFU.
    """
    missing: dict[str, str] = {}
    step_s = step.total * correction.factor
    samples_s = job.samples_per_step / step_s if job.samples_per_step else None
    tokens_s = samples_s * job.tokens_per_sample if samples_s and job.tokens_per_sample else None
    steps = length(config["trainer"], job, step_s, missing)
    train_s = None if steps is None else steps * step_s
    hours = None if train_s is None else train_s * job.ranks / 3600
    energy = None
    if hours is not None and job.power_watts:
        energy = hours * job.power_watts * POWER_SHARE / 1000
    elif job.device == "cpu":
        missing["energy_kwh"] = "the power of CPUs is not in the catalogue"
    price, co2 = _price(config["cluster"], job, train_s, missing), None
    grid = config["cluster"].get("grid_gco2_per_kwh")
    if grid is None:
        missing["co2_kg"] = "cluster.grid_gco2_per_kwh is not set"
    elif energy is not None:
        co2 = energy * grid / 1000
    save = _save_before_end(config, job, step_s, missing)
    per_epoch = job.samples_per_epoch
    return Forecast(
        step,
        correction,
        samples_s,
        tokens_s,
        samples_s * peak_s_per_sample if samples_s and peak_s_per_sample else None,
        steps,
        steps * job.samples_per_step / per_epoch if steps and job.samples_per_step and per_epoch else None,
        train_s,
        hours,
        _allocations(config["cluster"], job, train_s, missing),
        save,
        job.checkpoint_bytes,
        energy,
        price,
        str(config["cluster"].get("currency") or ""),
        co2,
        missing,
    )


def length(trainer: Mapping[str, Any], job: Job, step_s: float, missing: dict[str, str]) -> int | None:
    """Return the optimizer steps until the first limit of the training; None: not known."""
    limits: list[float] = []
    if trainer.get("max_steps") not in (None, -1):
        limits.append(trainer["max_steps"])
    epochs = trainer.get("max_epochs")
    if epochs is None and not limits and trainer.get("max_time") is None:
        epochs = 10  # as config/schema.py says
    if epochs not in (None, -1):
        per_epoch = steps_per_epoch(trainer, job)
        if per_epoch is not None:
            limits.append(epochs * per_epoch)
        elif not limits:
            missing["train_s"] = "the number of samples is not known before the data is read: set trainer.max_steps"
    match = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", trainer.get("max_time") or "")
    if match:
        days, hours, minutes, seconds = map(int, match.groups())
        limits.append((((days * 24 + hours) * 60) + minutes) * 60 / step_s + seconds / step_s)
    return max(1, math.ceil(min(limits))) if limits else None


def steps_per_epoch(trainer: Mapping[str, Any], job: Job) -> int | None:
    """Return the optimizer steps of an epoch; None: not known."""
    if not job.samples_per_epoch or not job.samples_per_step:
        return None
    steps = math.ceil(job.samples_per_epoch / job.samples_per_step)
    limit = trainer.get("limit_train_batches")
    if isinstance(limit, float) and limit <= 1:
        return max(1, math.ceil(steps * limit))
    return min(steps, int(limit)) if limit else steps


def _price(cluster: Mapping[str, Any], job: Job, train_s: float | None, missing: dict[str, str]) -> float | None:
    key = "price_per_gpu_hour" if job.device == "cuda" else "price_per_cpu_core_hour"
    price = cluster.get(key)
    if price is None:
        missing["cost"] = f"cluster.{key} is not set"
        return None
    return None if train_s is None else float(train_s * job.units / 3600 * price)


def _allocations(cluster: Mapping[str, Any], job: Job, train_s: float | None, missing: dict[str, str]) -> int | None:
    if job.time_limit_s is None or train_s is None:
        return None
    usable: float = job.time_limit_s - START_S - cluster.get("save_before_end_s", 0)
    if usable <= 0:
        missing["allocations"] = "the time limit leaves no time to train"
        return None
    return max(1, math.ceil(train_s / usable))


def _save_before_end(config: Mapping[str, Any], job: Job, step_s: float, missing: dict[str, str]) -> int | None:
    if "save_before_end_s" not in config["cluster"]:
        return None
    if job.save_s is None:
        missing["save_before_end_s"] = "no save of this size has been measured"
        return None
    agreeing_s: float = config["resilience"].get("agree_every_s", 1.0)
    seconds = SIGNAL_EARLY_S + agreeing_s + 2 * step_s + SAVE_MARGIN * job.save_s
    return max(30, math.ceil(seconds / 10) * 10)
