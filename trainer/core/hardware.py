"""GPUs and CPU cores of this machine, counted without torch, which the control plane never imports."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from trainer.core.gpus import inventory

_ROOT = Path("/")


def count_gpus(environment: Mapping[str, str] = os.environ, root: Path = _ROOT) -> int:
    """Return the number of GPUs that the processes of a job started from here can use, one each.

    0 may also mean that this machine has GPUs that cannot be used: `gpus.inventory` tells why.
    """
    return inventory(environment, root).most


def usable_cores(environment: Mapping[str, str] = os.environ, root: Path = _ROOT) -> int:
    """Return the number of CPU cores that this process may use, at least 1.

    It is the smallest of the affinity mask, SLURM's share of the node (`SLURM_CPUS_ON_NODE`) and the cgroup v2 quota
    of a container.
    """
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    on_node = environment.get("SLURM_CPUS_ON_NODE", "")
    if on_node.isdigit():
        counts.append(int(on_node))
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            counts.append(math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2
        pass
    return max(1, min(counts))
