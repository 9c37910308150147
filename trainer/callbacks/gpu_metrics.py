"""Memory, utilization and power of the GPUs at logged steps, without waiting for a device."""

from __future__ import annotations

import torch
import torch.distributed

from trainer.runtime import cpu_groups
from trainer.runtime.gpu_load import GpuLoad

GIGABYTE = 1e9


class GpuMetrics:
    """Metrics `gpu/...` over all ranks: the largest peak memory, the mean utilization and the sum of the power.

    Peak memory is that of the attempt, from the counters of torch's allocator on the host.

    Args:
        device: Device of this rank.
        load: Utilization and power of this rank's GPU; None: not known.
    """

    def __init__(self, device: torch.device, load: GpuLoad | None) -> None:
        self._device, self._load = device, load

    def loads(self) -> list[float]:
        """Return what is averaged over the ranks: utilization and power, each with 1, or 0 twice if not known."""
        load = self._load.take() if self._load is not None else None
        values = (load.utilization, load.power_w) if load is not None else (None, None)
        return [number for value in values for number in ((value, 1.0) if value is not None else (0.0, 0.0))]

    def metrics(self, loads: list[float], group: torch.distributed.ProcessGroup | None) -> dict[str, float]:
        """Return the metrics over all ranks.

        Args:
            loads: Means of `loads()` over the ranks.
            group: CPU (gloo) group of all ranks; None for one rank.
        """
        peaks = torch.tensor(
            [torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)],
            dtype=torch.float64,
        )
        num_ranks = 1
        if group is not None:
            cpu_groups.all_reduce(peaks, torch.distributed.ReduceOp.MAX, group)
            num_ranks = torch.distributed.get_world_size(group)
        allocated, reserved = (peaks / GIGABYTE).tolist()
        metrics = {"gpu/peak_allocated_gb": allocated, "gpu/peak_reserved_gb": reserved}
        utilization, share_with_utilization, power_w, share_with_power = loads
        if share_with_utilization:
            metrics["gpu/utilization"] = utilization / share_with_utilization
        if share_with_power:
            metrics["gpu/power_w"] = power_w * num_ranks
        return metrics
