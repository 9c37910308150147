"""What watches a training beside the step clock: each in a callback that costs nothing where it has nothing to do."""

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
    """None where neither bad numbers nor spikes are looked for."""
    if options.on_nonfinite == "off" and options.spike_z is None:
        return None
    return Guard(options, directory, attempt, group)


def callbacks(attempt: Attempt, plan: BatchPlan, device: torch.device, waits_in_forward: bool) -> list[Callback]:
    """Also tells the heartbeat what this rank computes on."""
    found: list[Callback] = [Accumulation(plan.accumulate), MemoryReport(attempt)]
    if waits_in_forward:
        found.append(DataTime(attempt.heartbeat))
    if device.type == "cuda":
        attempt.heartbeat.update(device=f"{device}, {torch.cuda.get_device_name(device)}")
        return [*found, DeviceTime(attempt.heartbeat)]
    attempt.heartbeat.update(device=device.type)
    return found


def count_waits(trainer: Trainer, heartbeat: Heartbeat) -> None:
    """Give the heartbeat the seconds waited for data; Lightning's own loop does not count them."""
    loop = trainer.fit_loop.epoch_loop
    heartbeat.waited_s = lambda: getattr(loop, "waited_s", 0.0)
