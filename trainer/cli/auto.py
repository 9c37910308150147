"""Replaces `auto` in a composed job by the first row of its plan, where the plan is known without simulation.

`strategy=auto` and `strategy.activation_checkpointing=auto` become the fastest variant that fits with a margin. Where
the closed form or the GPU is not known, `auto` keeps what it means without a plan: `strategies.resolved`, and no
activation checkpointing. `data.micro_batch=auto` is always found by a trial at the start (`train/find_micro_batch.py`),
which measures; here it may be any that divides. `trainer.precision=auto` stays a matter of the hardware.
"""

from __future__ import annotations

from typing import Any

from trainer.cli.planning import formula_plans, variant_of
from trainer.config.shape import LaunchShape
from trainer.hardware.catalogue import Device
from trainer.plan.answer import Plan
from trainer.plan.job import Variant, alternatives
from trainer.plan.outlook import look_around, with_forecasts

MARGIN = 0.05
"""Share of the memory that `auto` leaves free beside the allowance."""
_KIND = "activation_checkpointing"


def settle_auto(config: dict[str, Any], shape: LaunchShape, device: Device | None) -> list[str]:
    """Replace `auto` in the section `strategy`; return lines that say what was chosen and why.

    Args:
        config: The composed configuration, which is changed.
        shape: The launch shape.
        device: The GPU of the job; None: not known, or CPU ranks.
    """
    strategy = config["strategy"]
    is_free, kind_is_free = strategy["name"] == "auto", strategy.get(_KIND) == "auto"
    if not is_free and not kind_is_free:
        return []
    if kind_is_free:
        strategy[_KIND] = "none"  # unless the plan knows better
    chosen = best(config, shape, device, is_free, kind_is_free) if device is not None else None
    if chosen is None:
        return [_line_without_plan(config, shape, device, is_free, kind_is_free)]
    config["strategy"] = dict(chosen.variant.strategy)
    return [_line(config, chosen, is_free, kind_is_free)]


def best(config: dict[str, Any], shape: LaunchShape, device: Device, is_free: bool, kind_is_free: bool) -> Plan | None:
    """Return the fastest variant that fits with the margin; None: none is known to.

    Args:
        config: The composed configuration.
        shape: The launch shape.
        device: The GPU.
        is_free: Whether any strategy may be chosen.
        kind_is_free: Whether any kind of activation checkpointing may be chosen.
    """
    job = variant_of(config, shape, device)
    micro_is_free = bool(config["trainer"]["find_micro_batch"])

    def may_be(one: Variant) -> bool:
        return (
            (is_free or one.strategy["name"] == job.strategy["name"])
            and (kind_is_free or one.checkpointing == job.checkpointing)
            and (micro_is_free or one.micro_batch == job.micro_batch)
            and (one.offloads == job.offloads)
        )

    variants = [one for one in [job, *alternatives(job, config["data"].get("batch_size"))] if may_be(one)]
    capacity = int(device.memory_bytes * (1 - MARGIN))
    around = look_around(config, device, job.ranks_of_node, None)
    fitting = [one for one in formula_plans(config, variants, capacity, skip=True) if one.fits]
    timed = [one for one in with_forecasts(fitting, around) if one.forecast is not None]
    return min(timed, key=lambda one: (_seconds(one), one.variant.order()), default=None)


def _seconds(plan: Plan) -> float:
    assert plan.forecast is not None
    return plan.forecast.step_s


def _line_without_plan(
    config: dict[str, Any], shape: LaunchShape, device: Device | None, is_free: bool, kind_is_free: bool
) -> str:
    name = variant_of(config, shape, device).strategy["name"]
    what = [f"strategy={name}"] if is_free else []
    what += [f"strategy.{_KIND}=none"] if kind_is_free else []
    reason = "no variant is known to fit"
    if shape.device == "cpu":
        reason = "CPU ranks have no memory of their own to fit into"
    elif device is None:
        reason = "its GPU is not known"
    return f"{' '.join(what)}: auto, because {reason}; trainer plan shows more"


def _line(config: dict[str, Any], plan: Plan, is_free: bool, kind_is_free: bool) -> str:
    variant = plan.variant
    what = [f"strategy={variant.strategy['name']}"] if is_free else []
    what += [f"strategy.{_KIND}={variant.checkpointing}"] if kind_is_free else []
    assert plan.needed is not None
    assert plan.capacity is not None
    if config["trainer"]["precision"] == "auto":
        what.append(f"trainer.precision={variant.precision}")
    trial = ""
    if config["trainer"]["find_micro_batch"]:
        trial = f"; a trial at the start finds the micro-batch, {variant.micro_batch} is expected"
    return (
        f"{' '.join(what)}: auto, the fastest that fits by the plan ({plan.needed / 2**30:.1f} GiB of "
        f"{plan.capacity / 2**30:.1f} GiB, a margin of {MARGIN:.0%} left out; {_seconds(plan):.3g} s a step){trial}"
    )
