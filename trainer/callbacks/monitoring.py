"""Callbacks that monitor a training, in addition to the step clock. Each costs nothing if it has nothing to do."""

from __future__ import annotations

import torch
import torch.distributed
from lightning.pytorch import Callback, Trainer

from trainer.callbacks.accumulation import Accumulation
from trainer.callbacks.data_time import DataTime
from trainer.callbacks.device_time import DeviceTime
from trainer.callbacks.guard import Guard
from trainer.config.batch import BatchPlan
from trainer.config.schema import ResilienceOptions
from trainer.runs.directory import RunDirectory
from trainer.runtime.attempt import Attempt
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
    if waits_in_forward:
        callbacks.append(DataTime(attempt.heartbeat))
    if device.type == "cuda":
        attempt.heartbeat.update(device=f"{device}, {torch.cuda.get_device_name(device)}")
        return [*callbacks, DeviceTime(attempt.heartbeat)]
    attempt.heartbeat.update(device=device.type)
    return callbacks


def report_data_wait(trainer: Trainer, heartbeat: Heartbeat) -> None:
    """Report the seconds spent waiting for data in the heartbeat; Lightning's own loop does not count them."""
    loop = trainer.fit_loop.epoch_loop
    heartbeat.waited_s = lambda: getattr(loop, "waited_s", 0.0)
