"""The lines and the table that `trainer plan` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.cli.common import size, table
from trainer.core.units import duration, gib, seconds, three_digits
from trainer.hardware.catalogue import Device
from trainer.plan.answer import ALLOWANCE_ERROR, ERRORS, Plan
from trainer.plan.forecast import POWER_SHARE, START_S, Forecast
from trainer.plan.parts import PARTS
from trainer.plan.storage import Space

ROWS = 12
"""Alternatives that are printed."""
_TITLE = 24
Row = tuple[str, str]


def lines(plan: Plan, known: Device | None, config: Mapping[str, Any], left: Space) -> list[str]:
    """Return the lines of the job's plan."""
    variant = plan.variant
    on = known.name if known is not None else "CPU"
    rows = [("job", f"{variant.world_size} x {on}, {variant.overrides}, {variant.precision}"), *_memory(plan, known)]
    if plan.forecast is None:
        rows.append(("time", f"not known: {plan.no_forecast}"))
    else:
        rows += [*_time(plan.forecast), *_length(plan.forecast, config), *_storage(plan.forecast, config, left)]
        rows += _bill(plan.forecast)
    return [f"{title:<{_TITLE}}{text}" for title, text in rows]


def brief(plan: Plan, known: Device | None) -> list[str]:
    """Return the two lines that `trainer fit` prints: memory, and time with cost."""
    assert plan.needed is not None
    assert plan.engine is not None
    of = "" if plan.capacity is None else f" of {gib(plan.capacity)}"
    on = known.name if known is not None else "each CPU rank"
    verdict = ": does not fit" if plan.fits is False else ""
    lines = [f"plan: {gib(plan.needed)}{of} on {on}{verdict} (error: {ERRORS[plan.engine][plan.variant.device]})"]
    found = plan.forecast
    if found is None:
        return [*lines, f"plan: time not known: {plan.no_forecast}"]
    parts = [f"{seconds(found.step_s)} a step", *_speed(found)]
    if found.train_s is not None:
        parts.append(f"{duration(found.train_s)} of training")
    if found.device_hours is not None and known is not None:
        parts.append(f"{three_digits(found.device_hours)} GPU hours")
    if found.cost is not None:
        parts.append(f"{found.cost:,.2f} {found.currency}".rstrip())
    return [*lines, f"plan: {', '.join(parts)} (error: {found.error})"]


def winners(plans: Sequence[Plan]) -> list[str]:
    """Return lines that name the fastest and the cheapest plan that is not known to be too large."""
    found = [(one, one.forecast) for one in plans if one.fits is not False and one.forecast is not None]
    if not found:
        return ["nothing that was searched is known to fit"]
    fastest = min(found, key=lambda one: one[1].step_s)
    cheapest = min(found, key=lambda one: one[1].step_s * one[0].variant.world_size)
    rows = []
    for title, (plan, one) in (("fastest", fastest), ("cheapest", cheapest)):
        hours = "" if one.device_hours is None else f", {one.device_hours:,.4g} device hours"
        price = "" if one.cost is None else f", {one.cost:,.2f} {one.currency}".rstrip()
        nodes = f"{plan.variant.nodes} node{'' if plan.variant.nodes == 1 else 's'}"
        rows.append(f"{title:<{_TITLE}}{nodes}: {seconds(one.step_s)} a step{hours}{price}; {plan.variant.overrides}")
    return rows


def alternatives_table(rest: Sequence[Plan], by: str = "time") -> str:
    """Return the table of alternatives, in their order; empty if there are none."""
    shown = [one for one in rest if one.peak is not None][:ROWS]
    if not shown:
        return ""
    timed = all(one.forecast is not None for one in shown)
    priced = timed and any(one.forecast is not None and one.forecast.cost is not None for one in shown)
    several = len({one.variant.world_size for one in shown}) > 1
    titles = ["needed", "fits", *(["step"] if timed else []), *(["ranks"] if several else [])]
    titles += [*(["cost"] if priced else []), "strategy", "micro-batch", "accumulate", "checkpointing"]
    cells = []
    for one in shown:
        found = one.forecast
        row = [gib(one.needed or 0), {True: "yes", False: "no", None: "not known"}[one.fits]]
        if timed and found is not None:
            row.append(seconds(found.step_s))
        if several:
            row.append(str(one.variant.world_size))
        if priced and found is not None:
            row.append("" if found.cost is None else f"{found.cost:,.2f}")
        strategy = one.variant.strategy["name"] + (", cpu_offload" if one.variant.offloads else "")
        row += [strategy, str(one.variant.micro_batch), str(one.variant.accumulate), one.variant.checkpointing]
        cells.append(row)
    order = {"time": "the fastest first", "cost": "the least device time first"}[by]
    order = order if timed else "least recomputing and traffic first"
    return f"At the same global batch, {order}:\n" + table(cells, titles)


def _memory(plan: Plan, known: Device | None) -> list[Row]:
    assert plan.peak is not None
    assert plan.needed is not None
    assert plan.engine is not None
    where = "forward and backward pass" if plan.where == "passes" else "update"
    error = ERRORS[plan.engine][plan.variant.device]
    rows = [("peak", f"{gib(plan.peak)} on each rank, in the {where}; {plan.engine}, error: {error}")]
    rows += [(f"  {part}", gib(plan.parts[part])) for part in PARTS if part in plan.parts]
    if plan.allowances:
        rows.append(("allowance", f"{gib(sum(plan.allowances.values()))}; error: {ALLOWANCE_ERROR}"))
        rows += [(f"  {name}", gib(one)) for name, one in plan.allowances.items()]
    if plan.capacity is not None and known is not None:
        verdict = "fits" if plan.fits else "does not fit"
        rows.append(("needed", f"{gib(plan.needed)} of {gib(plan.capacity)}: {verdict} ({known.memory_source})"))
    return rows


def _time(found: Forecast) -> list[Row]:
    factor = found.correction.factor
    parts = {
        "matrix products": found.step.matrix,
        "other operators": found.step.memory,
        "starting operators": found.step.host,
        "update": found.step.update,
        "collectives, exposed": found.step.exposed,
    }
    rows = [("step", f"{seconds(found.step_s)}; error: {found.error}")]
    rows += [(f"  {name}", seconds(part * factor)) for name, part in parts.items() if part > 0.0005 * found.step.total]
    if found.step.hidden:
        rows.append(("  collectives, hidden", seconds(found.step.hidden)))
    if speed := _speed(found):
        rows.append(("speed", ", ".join(speed)))
    return rows


def _speed(found: Forecast) -> list[str]:
    parts = []
    if found.tokens_s is not None:
        parts.append(f"{found.tokens_s:,.0f} tokens/s")
    elif found.samples_s is not None:
        parts.append(
            f"{found.samples_s:,.0f} samples/s" if found.samples_s >= 10 else f"{found.samples_s:.2g} samples/s"
        )
    if found.mfu is not None:
        parts.append(f"MFU {found.mfu:.1%}")
    return parts


def _length(found: Forecast, config: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    if found.steps is None or found.train_s is None:
        reason = found.not_known.get("train_s", "the training has no limit in steps or time")
        return [("until the end", f"not known: {reason}")]
    epochs = "" if found.epochs is None else f" ({three_digits(found.epochs)} epochs)"
    text = f"{found.steps:,} steps{epochs}, {duration(found.train_s)} without validation, saving and the queue"
    rows.append(("until the end", text))
    if found.allocations is not None:
        note = f"{duration(START_S)} of each for the start are assumed"
        plural = "" if found.allocations == 1 else "s"
        rows.append(("allocations", f"{found.allocations} time limit{plural}; {note}"))
    elif "allocations" in found.not_known:
        rows.append(("allocations", found.not_known["allocations"]))
    if found.save_before_end_s is not None:
        now = config["cluster"]["save_before_end_s"]
        text = f"cluster.save_before_end_s={found.save_before_end_s} by the slowest measured save"
        rows.append(("save before the end", f"{text} (now {now})"))
    elif "save_before_end_s" in found.not_known:
        rows.append(("save before the end", f"not known: {found.not_known['save_before_end_s']}"))
    return rows


def _storage(found: Forecast, config: Mapping[str, Any], left: Space) -> list[Row]:
    if found.checkpoint_bytes is None:
        return []
    options = config["checkpoint"]
    kept = options["keep_last"] + (options["keep_best"] if options["save_best"] else 0)
    whole = (kept + 1) * found.checkpoint_bytes
    text = f"{size(found.checkpoint_bytes)} each; {kept} kept and one being written: {size(whole)}"
    if left.least is not None:
        of = "quota" if left.least == left.quota_bytes else "file system"
        text += f", of {size(left.least)} left on the {of}"
        text += ": NOT ENOUGH" if whole > left.least else ""
    return [("checkpoints", text)]


def _bill(found: Forecast) -> list[Row]:
    rows: list[Row] = []
    if found.device_hours is not None:
        rows.append(("device hours", three_digits(found.device_hours)))
    if found.energy_kwh is not None:
        text = (
            f"{three_digits(found.energy_kwh)} kWh by the devices at {POWER_SHARE:.0%} of their power limit (assumed)"
        )
        rows.append(("energy", text))
    elif reason := found.not_known.get("energy_kwh"):
        rows.append(("energy", f"not known: {reason}"))
    if found.cost is not None:
        rows.append(("cost", f"{found.cost:,.2f} {found.currency}".rstrip()))
    elif reason := found.not_known.get("cost"):
        rows.append(("cost", f"not known: {reason}"))
    if found.co2_kg is not None:
        rows.append(("CO2", f"{three_digits(found.co2_kg)} kg"))
    return rows
