"""Load of each node of a job on several, at logged steps: W&B's own system metrics are those of the first node only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.core.host_memory import used_bytes
from trainer.runtime.process import Rank

GIGABYTE = 1e9
MOST_NODES = 64
"""Nodes up to which each has its metrics. They are in every logged line, whose readers take 2,000 metrics of a run."""
EVERY_S = 1.0
"""Shortest time between two readings of a node."""
_SUMS = ("gpu_memory_gb", "gpu_power_w")
"""Sums over the ranks of a node; all else is a mean over those that know it."""
_NAMES = ("cpu_percent", "memory_gb", "gpu_utilization", *_SUMS)


class NodeMetrics:
    """Metrics `system/node-N/...` of every node.

    Each rank has two numbers for each metric of each node: its value and 1, or 0 twice where it does not know it. The
    values of the host come from the first rank of a node, those of a GPU from its rank. So the one reduction over the
    ranks that a logged step makes anyway brings them together.

    Args:
        rank: This rank.
        device: Its device.
        root: Root of the file system, for tests.
    """

    def __init__(self, rank: Rank, device: torch.device, root: Path = Path("/")) -> None:
        self._rank, self._device, self._root = rank, device, root
        self._node = rank.rank // rank.local_world_size
        self._ticks = self._read_ticks()
        self._read_at = time.monotonic()
        self._host: dict[str, float] = {}

    def loads(self, gpu_loads: Sequence[float]) -> list[float]:
        """Return what is averaged over the ranks.

        Args:
            gpu_loads: `GpuMetrics.loads()` of this rank; empty on CPU.
        """
        values = dict(self._host_values()) if self._rank.local_rank == 0 else {}
        if gpu_loads:
            utilization, knows_utilization, power_w, knows_power = gpu_loads
            values["gpu_memory_gb"] = torch.cuda.memory_reserved(self._device) / GIGABYTE
            values |= {"gpu_utilization": utilization} if knows_utilization else {}
            values |= {"gpu_power_w": power_w} if knows_power else {}
        loads = [0.0] * (2 * len(_NAMES) * self._rank.num_nodes)
        for place, name in enumerate(_NAMES, self._node * len(_NAMES)):
            if name in values:
                loads[2 * place : 2 * place + 2] = values[name], 1.0
        return loads

    def metrics(self, loads: Sequence[float]) -> dict[str, float]:
        """Return the metrics of all nodes from the means of `loads()` over the ranks."""
        metrics = {}
        for place, name in enumerate(_NAMES * self._rank.num_nodes):
            value, known = loads[2 * place : 2 * place + 2]
            if known:
                key = f"system/node-{place // len(_NAMES)}/{name}"
                metrics[key] = value * self._rank.world_size if name in _SUMS else value / known
        return metrics

    def _host_values(self) -> dict[str, float]:
        """Return the load of the processors since the last reading, and the memory in use now."""
        now = time.monotonic()
        if now - self._read_at >= EVERY_S or not self._host:
            before, self._ticks, self._read_at = self._ticks, self._read_ticks(), now
            idle, total = (after - earlier for after, earlier in zip(self._ticks, before, strict=True))
            if total > 0:
                self._host["cpu_percent"] = 100.0 * (1 - idle / total)
            if (used := used_bytes(self._root)) is not None:
                self._host["memory_gb"] = used / GIGABYTE
        return self._host

    def _read_ticks(self) -> tuple[int, int]:
        """Return the idle and all ticks of all processors of the node since it was started (proc(5))."""
        try:
            with (self._root / "proc/stat").open() as file:
                ticks = [int(text) for text in file.readline().split()[1:9]]  # guest time is part of user time
        except (OSError, ValueError):
            return 0, 0
        return sum(ticks[3:5]), sum(ticks)
