"""What `trainer fit` plans before it launches: two lines, a refusal of what cannot fit, a question about its cost.

Only what the closed form knows is planned, which takes milliseconds; other jobs are launched as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.cli.common import agrees
from trainer.cli.job import Job
from trainer.cli.plan_text import brief
from trainer.cli.planning import device_of, formula_plans, variant_of
from trainer.core.errors import UserError
from trainer.core.units import gib
from trainer.hardware.catalogue import Device
from trainer.launch import launchers
from trainer.plan.allowance import CONTEXT
from trainer.plan.answer import Plan
from trainer.plan.closed_form import NoFormula
from trainer.plan.job import Variant, alternatives
from trainer.plan.outlook import look_around, with_forecast, with_forecasts
from trainer.runs.records import PlannedRun


@dataclass(frozen=True)
class Planned:
    """The plan of a job in closed form."""

    plan: Plan
    device: Device | None

    def record(self) -> PlannedRun:
        """Return what the run directory keeps of it."""
        plan, found = self.plan, self.plan.forecast
        assert plan.engine is not None
        record = PlannedRun(
            engine=plan.engine,
            device=self.device.name if self.device else None,
            peak_bytes=plan.peak,
            needed_bytes=plan.needed,
            capacity_bytes=plan.capacity,
        )
        if found is None:
            return record
        return replace(
            record,
            step_s=found.step_s,
            step_error=found.correction.error,
            samples_per_s=found.samples_s,
            tokens_per_s=found.tokens_s,
            steps=found.steps,
            train_s=found.train_s,
            device_hours=found.device_hours,
            energy_kwh=found.energy_kwh,
            cost=found.cost,
            currency=found.currency or None,
        )


def approve(jobs: list[Job], plans: Sequence[Planned | None], arguments: argparse.Namespace) -> bool:
    """Print the plans of the jobs and ask where they are expensive; return whether to launch them.

    Args:
        jobs: The checked jobs.
        plans: `plan_of` each.
        arguments: `anyway`: launch what cannot fit; `yes`: do not ask.

    Raises:
        UserError: A job cannot fit in memory.
    """
    hours = 0.0
    for job, found in zip(jobs, plans, strict=True):
        if found is not None:
            if len(jobs) == 1:
                print("\n".join(brief(found.plan, found.device)), flush=True)
            if not arguments.anyway:
                refuse_what_cannot_fit(job, found)
        hours += gpu_hours(job, found)
    limits = [job.config["cluster"].get("confirm_above_gpu_hours") for job in jobs]
    limit = min((one for one in limits if one is not None), default=None)
    if limit is None or hours <= limit or arguments.yes or not sys.stdin.isatty():
        return True
    return agrees(f"up to {hours:.4g} GPU hours, more than cluster.confirm_above_gpu_hours={limit:g}. Launch?")


def planned_lines(job: Job) -> list[str]:
    """Return the two lines of a job's plan; none where it is not known."""
    found = plan_of(job)
    return [] if found is None else brief(found.plan, found.device)


def plan_of(job: Job) -> Planned | None:
    """Return the plan of a job; None where the closed form or the GPU is not known."""
    config = job.config
    device = device_of(config) if job.shape.device == "cuda" else None
    if job.shape.device == "cuda" and device is None:
        return None
    variant = variant_of(config, job.shape, device)
    if config["trainer"]["find_micro_batch"]:
        return None  # the micro-batch is found at the start
    try:
        (plan,) = formula_plans(config, [variant], None if device is None else device.memory_bytes)
    except NoFormula:
        return None
    around = look_around(config, device, variant.ranks_of_node, launchers.time_limit_s(config))
    return Planned(with_forecast(plan, around), device)


def refuse_what_cannot_fit(job: Job, found: Planned) -> None:
    """Refuse a job whose tensors alone are larger than the memory.

    Raises:
        UserError: With the nearest alternative that fits.
    """
    plan, device = found.plan, found.device
    if device is None or plan.peak is None or plan.peak + CONTEXT <= device.memory_bytes:
        return
    nearest = nearest_that_fits(job.config, plan.variant, device)
    fix = "" if nearest is None else f"the nearest that fits: {nearest.variant.overrides}\n  "
    problem = f"{gib(plan.peak)} of tensors on each GPU do not fit {gib(device.memory_bytes)} of {device.name}"
    raise UserError(problem, f"{fix}trainer plan shows more; --anyway launches it regardless")


def nearest_that_fits(config: dict[str, Any], variant: Variant, device: Device) -> Plan | None:
    """Return the fastest alternative that fits with its allowance; None: none does."""
    others = alternatives(variant, config["data"].get("batch_size"))
    plans = [one for one in formula_plans(config, others, device.memory_bytes, skip=True) if one.fits]
    around = look_around(config, device, variant.ranks_of_node, None)
    return min(with_forecasts(plans, around), key=_order, default=None)


def _order(plan: Plan) -> tuple[float, tuple[bool, int, int, int]]:
    return (float("inf") if plan.forecast is None else plan.forecast.step_s), plan.variant.order()


def gpu_hours(job: Job, found: Planned | None) -> float:
    """Return the GPU hours of a job: planned, else the most that one allocation may take; 0 where neither is known."""
    if job.shape.device != "cuda":
        return 0.0
    if found is not None and found.plan.forecast is not None and found.plan.forecast.device_hours is not None:
        return found.plan.forecast.device_hours
    limit_s = launchers.time_limit_s(job.config)
    return 0.0 if limit_s is None else limit_s * job.shape.world_size / 3600
