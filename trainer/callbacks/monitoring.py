"""Callbacks that monitor a training, in addition to the step clock. Each costs nothing if it has nothing to do."""

from __future__ import annotations

import torch
import torch.distributed
from lightning.pytorch import Callback, Trainer

from trainer.callbacks.accumulation import Accumulation
from trainer.callbacks.data_time import DataTime
from trainer.callbacks.device_time import DeviceTime
from trainer.callbacks.gpu_metrics import GpuMetrics
from trainer.callbacks.guard import Guard
from trainer.callbacks.profiling import ProfileWindow, make_recorder
from trainer.config.batch import BatchPlan
from trainer.config.schema import PROFILED_WINDOWS, ResilienceOptions, TrainerOptions
from trainer.runs.directory import RunDirectory
from trainer.runtime.attempt import Attempt
from trainer.runtime.gpu_load import GpuLoad, reader_of
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.memory import MemoryReport


def make_guard(
    options: ResilienceOptions, directory: RunDirectory, attempt: int, group: torch.distributed.ProcessGroup | None
) -> Guard | None:
    """Return the guard; None if neither non-finite numbers nor spikes are checked."""
    if options.on_nonfinite == "off" and options.spike_z is None:
        return None
    return Guard(options, directory, attempt, group)


def make_callbacks(attempt: Attempt, plan: BatchPlan, device: torch.device, waits_in_forward: bool) -> list[Callback]:
    """Return the monitoring callbacks of a rank, and report its device in the heartbeat.

    Args:
        attempt: The attempt.
        plan: Split of the global batch.
        device: Device of this rank.
        waits_in_forward: Whether this rank waits for other ranks inside its forward pass.
    """
    callbacks: list[Callback] = [Accumulation(plan.accumulate), MemoryReport(attempt)]
    if device.type == "cuda":
        attempt.heartbeat.update(device=f"{device}, {torch.cuda.get_device_name(device)}")
        return [*callbacks, DeviceTime(attempt.heartbeat, waits_in_forward)]
    if waits_in_forward:
        callbacks.append(DataTime(attempt.heartbeat))
    attempt.heartbeat.update(device=device.type)
    return callbacks


def make_profiler(options: TrainerOptions, attempt: Attempt) -> list[Callback]:
    """Return the callback of `trainer.profiler` on the rank that is recorded; empty on others, and for Lightning's."""
    if options.profiler is None or options.profiler not in PROFILED_WINDOWS:
        return []
    rank, recorded = attempt.rank, options.profile_rank
    after, count = options.profile_after, options.profile_steps
    folder = attempt.directory.path / "profiler"
    recorder, output = make_recorder(options.profiler, folder, rank.attempt, recorded, after=after, steps=count)
    if rank.is_first:
        first = (attempt.first_step or 0) + after + 1
        steps = f"steps {first} to {first + count - 1} on rank {recorded}"
        print(f"profiler {options.profiler}: {steps}, to {output}", flush=True)
    return [ProfileWindow(recorder, after, count)] if rank.rank == recorded else []


def gpu_metrics(heartbeat: Heartbeat, device: torch.device) -> GpuMetrics | None:
    """Return the metrics of this rank's GPU, and let the heartbeat read its load; None on CPU."""
    if device.type != "cuda":
        return None
    read = reader_of(device)
    load = GpuLoad(read) if read is not None else None
    if load is not None:
        heartbeat.samplers.append(load.sample)
    return GpuMetrics(device, load)


def report_data_wait(trainer: Trainer, heartbeat: Heartbeat) -> None:
    """Report the seconds spent waiting for data in the heartbeat; Lightning's own loop does not count them."""
    loop = trainer.fit_loop.epoch_loop
    heartbeat.waited_s = lambda: getattr(loop, "waited_s", 0.0)
