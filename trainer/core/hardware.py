"""GPUs and CPU cores of this machine, counted without torch, which the control plane never imports."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path("/")


def count_gpus(environment: Mapping[str, str] = os.environ, root: Path = _ROOT) -> int:
    """Return the number of NVIDIA GPUs that a process started from here may use.

    A container may see every GPU of its host under /proc but only its own device files. A driver that was just loaded
    may have no device files yet. So the result is the smaller of the two counts that are not zero, limited by
    `CUDA_VISIBLE_DEVICES`.
    """
    listed = _count(root / "proc/driver/nvidia/gpus", re.compile(r".+"))
    device_files = _count(root / "dev", re.compile(r"nvidia\d+"))
    present = min(listed, device_files) if listed and device_files else listed or device_files
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    return _count_visible(visible, present)


def _count(folder: Path, name: re.Pattern[str]) -> int:
    try:
        return sum(1 for entry in os.listdir(folder) if name.fullmatch(entry))
    except OSError:
        return 0


def _count_visible(visible: str, present: int) -> int:
    """Count the devices that CUDA uses: those before the first invalid entry. UUIDs are not verified."""
    count = 0
    for entry in (part.strip() for part in visible.split(",")):
        is_device = entry.startswith(("GPU-", "MIG-")) or (entry.isdigit() and int(entry) < present)
        if not is_device:
            break
        count += 1
    return count


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
