"""Utilization and power of this rank's GPU, read through NVML in the heartbeat thread, so that a step never waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.core import nvml


@dataclass(frozen=True)
class Load:
    """Load of a GPU; None: the driver does not report it."""

    utilization: float | None
    """Percent of the time in which a kernel ran."""
    power_w: float | None
    """Watts."""


class GpuLoad:
    """Means of the readings since they were last taken.

    Args:
        read: Returns the load now.
    """

    def __init__(self, read: Callable[[], Load]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._readings: list[Load] = []
        self._last = Load(None, None)

    def sample(self) -> None:
        """Read once; for the heartbeat thread."""
        reading = self._read()
        with self._lock:
            self._readings.append(reading)

    def take(self) -> Load:
        """Return the means since the last call; without a reading since then, those of the last call."""
        with self._lock:
            readings, self._readings = self._readings, []
        if readings:
            self._last = Load(
                _mean([one.utilization for one in readings]),
                _mean([one.power_w for one in readings]),
            )
        return self._last


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def reader_of(device: torch.device) -> Callable[[], Load] | None:
    """Return a function that reads the load of a CUDA device; None without NVML, such as on Jetson or ROCm."""
    library = nvml.load()
    if library is None:
        return None
    # By UUID: NVML does not know CUDA_VISIBLE_DEVICES.
    handle = nvml.device_of(library, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return None if handle is None else lambda: Load(*nvml.load_of(library, handle))
