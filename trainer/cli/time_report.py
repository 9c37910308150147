"""What `trainer time` prints of a measured job, and what it keeps for later plans."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from trainer.cli.common import size
from trainer.cli.job import Job
from trainer.cli.planning import plans, variant_of
from trainer.core.errors import TrainerError
from trainer.core.units import duration, seconds, three_digits
from trainer.hardware.catalogue import known as known_device
from trainer.plan import calibration
from trainer.plan.answer import Plan
from trainer.plan.calibration import Measurement
from trainer.plan.outlook import Surroundings, hardware_of, kind_of, look_around, roofline_of, traffic_of, with_forecast
from trainer.plan.rates import compiled
from trainer.plan.roofline import Rates
from trainer.plan.timing import Timed, fitting, overrides_for
from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointSaved, MicroBatchFound


@dataclass(frozen=True)
class Unplanned:
    """A job whose work is not known."""

    reason: str


def planned(
    job: Job, run: RunDirectory, original: dict[str, Any], with_data: bool, name: str | None
) -> tuple[Plan | Unplanned, Surroundings | None]:
    """Return the plan of the job as it was before this measurement, or why there is none."""
    found = run.events_of(MicroBatchFound)
    if found:
        original["data"]["micro_batch"] = found[-1].micro_batch
    if original["data"].get("micro_batch") == "auto":
        original["data"]["micro_batch"] = None
    device = None if name is None else known_device(name)
    if name is not None and device is None:
        return Unplanned(f"the hardware catalogue does not have {name}"), None
    try:
        variant = variant_of(original, job.shape, device)
        (plan,) = plans(original, with_data, [variant], None, "auto")
        around = look_around(original, device, variant.ranks_of_node, None)
    except TrainerError as error:
        return Unplanned(error.message), None
    if plan.work is None:
        return Unplanned(plan.reason), None
    return with_forecast(plan, around), around


def keep(found: Timed, plan: Plan | Unplanned, around: Surroundings | None, run: RunDirectory) -> str:
    """Keep the measurement for later plans; return on which hardware, or why not."""
    if isinstance(plan, Unplanned) or plan.work is None or around is None:
        return f"no: {plan.reason}"
    variant = plan.variant
    sent, rates = traffic_of(variant, plan.work, around.config), roofline_of(variant, around)
    if isinstance(sent, str) or not isinstance(rates, Rates):
        return f"no: {sent if isinstance(sent, str) else rates}"
    kind = kind_of(variant, around.config)
    hardware = hardware_of(around.device, variant.ranks_of_node)
    saves = [one for one in run.events_of(CheckpointSaved) if one.written_s is not None and one.bytes]
    problem = calibration.keep(
        Measurement(
            hardware=hardware,
            kind=kind,
            ranks=variant.world_size,
            micro_batch=variant.micro_batch,
            accumulate=variant.accumulate,
            work=compiled(plan.work) if kind.compile and variant.device == "cuda" else plan.work,
            sent=sent,
            step_s=found.calibrating_s,
            basis=found.basis,
            steps=found.steps,
            source="trainer time",
            save_s=(saves[-1].blocked_s or 0.0) + (saves[-1].written_s or 0.0) if saves else None,
            save_bytes=saves[-1].bytes if saves else None,
            time=time.time(),
        )
    )
    return f"no: it cannot be kept in {problem}" if problem else hardware


def report_of(found: Timed, plan: Plan | Unplanned, run: RunDirectory, job: Job) -> dict[str, Any]:
    """Return what `--json` prints, without what fits."""
    batch = job.batch()
    work = None if isinstance(plan, Unplanned) else plan.work
    forecast = None if isinstance(plan, Unplanned) else plan.forecast
    samples_s = batch.global_batch / found.step_s if batch is not None else None
    tokens = work.tokens if work is not None else None
    saves = [one for one in run.events_of(CheckpointSaved) if one.written_s is not None]
    planned = None
    if forecast is not None:
        planned = {"step_s": forecast.step_s, "error": forecast.correction.error, "text": forecast.correction.text}
    mfu = None
    if forecast is not None and forecast.mfu is not None:
        mfu = forecast.mfu * forecast.step_s / found.step_s
    return {
        "steps": found.steps,
        "ranks": found.ranks,
        "device": found.device,
        "step_s": found.step_s,
        "fastest_s": found.fastest_s,
        "slowest_s": found.slowest_s,
        "cpu_s": found.cpu_s,
        "mean_cpu_s": found.mean_cpu_s,
        "is_busy": found.is_busy,
        "calibrating_s": found.calibrating_s,
        "samples_s": samples_s,
        "tokens_s": samples_s * tokens if samples_s and tokens else None,
        "mfu": mfu,
        "steps_per_epoch": found.steps_per_epoch,
        "epoch_s": found.steps_per_epoch * found.step_s if found.steps_per_epoch else None,
        "save_s": (saves[-1].blocked_s or 0.0) + (saves[-1].written_s or 0.0) if saves else None,
        "save_bytes": saves[-1].bytes if saves else None,
        "planned": planned,
        "run": run.path.name,
    }


def what_fits(found: Timed, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Return the steps and epochs that fit in each limit, in seconds, by its name; and the overrides for them."""
    return [
        {
            "limit": name,
            "seconds": limit,
            "steps": (steps := fitting(limit, found.step_s)),
            "epochs": steps / found.steps_per_epoch if found.steps_per_epoch else None,
            "overrides": overrides_for(steps) if steps else None,
        }
        for name, limit in limits.items()
    ]


def lines(report: dict[str, Any]) -> list[str]:
    """Return the lines that are printed."""
    plural = "" if report["ranks"] == 1 else "s"
    on = report["device"] or f"CPU rank{plural}"
    spread = f"fastest {seconds(report['fastest_s'])}, slowest {seconds(report['slowest_s'])}"
    rows = [("measured", f"{report['steps']} steps on {report['ranks']} x {on}")]
    rows.append(("step", seconds(report["step_s"]) + ("" if report["device"] else f" ({spread})")))
    if report["cpu_s"] is not None:
        note = "; the machine is busy, or ranks wait for each other" if report["is_busy"] else ""
        rows.append(("CPU time", f"{seconds(report['cpu_s'])} of a step{note}"))
    speed = [f"{report['samples_s']:,.4g} samples/s"] if report["samples_s"] else []
    speed += [f"{report['tokens_s']:,.0f} tokens/s"] if report["tokens_s"] else []
    speed += [f"MFU {report['mfu']:.1%}"] if report["mfu"] else []
    rows += [("speed", ", ".join(speed))] if speed else []
    if report["steps_per_epoch"]:
        rows.append(("epoch", f"{report['steps_per_epoch']:,} steps, {duration(report['epoch_s'])}"))
    if report["save_s"] is not None:
        rows.append(("save", f"{seconds(report['save_s'])} for {size(report['save_bytes'])}"))
    if report["planned"]:
        planned = report["planned"]
        off = planned["step_s"] / report["calibrating_s"] - 1
        text = f"{seconds(planned['step_s'])} before this measurement ({off:+.0%}); {planned['text']}"
        rows.append(("planned", text))
    rows.append(("calibrates", report["kept"]))
    for fit in report["fits"]:
        epochs = "" if fit["epochs"] is None else f", {three_digits(fit['epochs'])} epochs"
        rows.append((fit["limit"], f"{fit['steps']:,} steps{epochs}: {fit['overrides'] or 'not one step'}"))
    return [f"{title:<16}{text}" for title, text in rows]
