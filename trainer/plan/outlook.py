"""The forecast of a planned variant: rates of its hardware, what past runs measured, limits of its cluster.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.core.hardware import usable_cores
from trainer.hardware import baseline
from trainer.hardware.catalogue import Device
from trainer.hardware.peaks import arithmetic_of
from trainer.plan import past, rates
from trainer.plan.answer import Plan
from trainer.plan.calibration import Kind, Measurement, correction, measurements
from trainer.plan.collectives import Traffic, of_tensor_parallelism, traffic
from trainer.plan.decoder import Decoder
from trainer.plan.forecast import Job, forecast
from trainer.plan.job import Variant
from trainer.plan.past import Save, Workload
from trainer.plan.roofline import Rates, step_time
from trainer.plan.work import Work


@dataclass(frozen=True)
class Surroundings:
    """What the forecasts of all variants of a job have in common."""

    config: Mapping[str, Any]
    device: Device | None
    """None: CPU ranks."""
    time_limit_s: float | None = None
    network_bytes_s: float | None = None
    known: Sequence[Measurement] = ()
    """Measurements on this hardware."""
    saves: list[Save] = field(default_factory=list)
    reached: Mapping[str, float] = field(default_factory=dict)
    """What `trainer doctor` measured of this GPU."""


def look_around(
    config: Mapping[str, Any],
    device: Device | None,
    ranks_of_node: int,
    time_limit_s: float | None,
    network_bytes_s: float | None = None,
) -> Surroundings:
    """Read the calibration and the measured saves of past runs."""
    known = measurements(hardware_of(device, ranks_of_node))
    saves = past.saves(Path(config["runs_dir"]))
    saves += [past.Save(one.save_s, one.save_bytes, one.source) for one in known if one.save_s and one.save_bytes]
    reached = {} if device is None else baseline.of_hardware(device.name)
    return Surroundings(config, device, time_limit_s, network_bytes_s, known, saves, reached)


def hardware_of(device: Device | None, ranks_of_node: int) -> str:
    """Return the name under which measurements of a rank are kept."""
    return device.name if device is not None else rates.cpu_hardware(threads_of(ranks_of_node))


def threads_of(ranks_of_node: int) -> int:
    """Return the threads of a CPU rank, as torchrun is started with (`supervise/rank_environment.py`)."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, usable_cores() // ranks_of_node)


def with_forecast(plan: Plan, around: Surroundings) -> Plan:
    """Return the plan with its forecast, or with the reason why there is none."""
    return with_forecasts([plan], around)[0]


def with_forecasts(plans: Sequence[Plan], around: Surroundings) -> list[Plan]:
    """Return the plans with their forecasts, all calibrated by the same measurements.

    These include past runs of the configured job: what they took beyond the roofline, its alternatives would, too.
    """
    runs: list[Measurement] = []
    for plan in plans:
        job = _workload(plan, around) if plan.variant.is_configured else ""
        if not isinstance(job, str):
            runs += past.same_jobs(Path(around.config["runs_dir"]), job)
    around = replace(around, known=[*around.known, *runs])
    return [_with_forecast(plan, around) for plan in plans]


def _workload(plan: Plan, around: Surroundings) -> Workload | str:
    """Return what a rank does in a step, or why it is not known."""
    variant, work = plan.variant, plan.work
    if work is None or not work.is_known:
        return plan.reason or "what a step computes was not counted"
    sent = traffic_of(variant, work, around.config)
    if isinstance(sent, str):
        return sent
    kind = kind_of(variant, around.config)
    work = rates.compiled(work) if kind.compile and variant.device == "cuda" else work
    hardware = hardware_of(around.device, variant.ranks_of_node)
    return Workload(
        around.config, hardware, kind, variant.world_size, variant.micro_batch, variant.accumulate, work, sent
    )


def _with_forecast(plan: Plan, around: Surroundings) -> Plan:
    variant, job = plan.variant, _workload(plan, around)
    found = roofline_of(variant, around) if not isinstance(job, str) else job
    if isinstance(job, str) or isinstance(found, str):
        return replace(plan, no_forecast=str(found))
    work = job.work
    step = step_time(work, job.sent, variant.accumulate, found)
    if variant.offloads and around.device is not None:
        step = rates.offloaded(step, work, plan.state_bytes, variant.accumulate, around.device)
    calibration = correction(around.known, job.kind, work, found)
    readers = max(1, variant.world_size // (variant.layout().tensor))
    batch = variant.micro_batch * variant.accumulate * readers
    size = _saved_bytes(plan, work)
    save = past.slowest_save(around.saves, size)
    sizes = Job(
        batch,
        work.tokens,
        plan.samples_per_epoch,
        variant.world_size,
        variant.world_size * (1 if variant.device == "cuda" else threads_of(variant.ranks_of_node)),
        variant.device,
        None if around.device is None else around.device.power_watts or None,
        around.time_limit_s,
        size,
        None if save is None else save[0],
        "" if save is None else save[1],
    )
    return replace(
        plan, forecast=forecast(around.config, sizes, step, calibration, _peak_s_per_sample(variant, work, around))
    )


def _saved_bytes(plan: Plan, work: Work) -> int:
    """Return the bytes of a checkpoint: all shards; of DeepSpeed the fp32 master weights, not its narrow ones."""
    layout = plan.variant.layout()
    if not layout.zero_stage:
        return plan.state_bytes * layout.shards * layout.tensor
    weights = layout.compute_bytes * work.elements
    return plan.state_bytes * layout.world_size - weights * (1 if layout.zero_stage == 3 else layout.world_size)


def roofline_of(variant: Variant, around: Surroundings) -> Rates | str:
    """Return the rates of the variant's hardware, or why they are not known."""
    if variant.device == "cpu":
        hardware = rates.cpu_hardware(threads_of(variant.ranks_of_node))
        machine = rates.machine(hardware)
        return (
            "the rates of this CPU are not measured: trainer time measures them" if machine is None else machine.rates
        )
    assert around.device is not None
    arithmetic = arithmetic_of(variant.precision, _matmul_precision(around.config))
    found = rates.of_device(around.device, arithmetic, around.network_bytes_s, around.reached)
    return f"the catalogue has no {arithmetic} peak of {around.device.name}" if found is None else found


def traffic_of(variant: Variant, work: Work, config: Mapping[str, Any]) -> list[Traffic] | str:
    """Return the collectives of a step, or why they are not known."""
    layout, strategy = variant.layout(), variant.strategy
    if _offloads(strategy):
        return "the copies of DeepSpeed's offloading are not planned"
    sent = traffic(strategy, layout, variant.ranks_of_node, work)
    if layout.tensor > 1:
        model = Decoder.of(config["model"])
        if model is None:
            return "the collectives of tensor parallelism are known for our decoder only"
        tokens = variant.micro_batch * (work.tokens or model.sequence_length)
        size = float(layout.compute_bytes * tokens * model.dim)
        sent += of_tensor_parallelism(layout.tensor, variant.ranks_of_node, model.layers, size)
    return sent


def kind_of(variant: Variant, config: Mapping[str, Any]) -> Kind:
    """Return what jobs with a similar ratio of measured to computed time have in common."""
    return Kind(
        model=str(config["model"].get("_target_")),
        strategy=variant.strategy["name"],
        precision=variant.precision,
        checkpointing=variant.checkpointing,
        compile=bool(variant.strategy.get("compile")),
    )


def _offloads(strategy: Mapping[str, Any]) -> bool:
    return any(strategy.get(key, "none") != "none" for key in ("offload_optimizer", "offload_parameters"))


def _matmul_precision(config: Mapping[str, Any]) -> str:
    return config["trainer"].get("matmul_precision") or "highest"


def _peak_s_per_sample(variant: Variant, work: Work, around: Surroundings) -> float | None:
    if around.device is None or variant.device != "cuda" or work.model_flops is None:
        return None
    peaks: Mapping[str, float] = dict(around.device.peak_tflops)  # type: ignore[arg-type]
    peak = peaks.get(arithmetic_of(variant.precision, _matmul_precision(around.config)))
    return None if peak is None else work.model_flops / (peak * 1e12 * variant.world_size)
