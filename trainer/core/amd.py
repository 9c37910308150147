"""AMD's GPUs, from the kernel's table for ROCm: /sys/class/kfd, documented in Documentation/ABI and amdkfd."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from trainer.core.errors import EnvironmentFault
from trainer.core.gpu import Gpu, hold_of

LEAST_VRAM_BYTES = 4 << 30
"""GPUs with less memory of their own are parts of processors."""


def amd_gpus(environment: Mapping[str, str], root: Path) -> tuple[tuple[Gpu, ...], EnvironmentFault | None]:
    """Return AMD's GPUs in the order of ROCm, and the problem if there are some and none can be used.

    The entries are numbers for HIP_VISIBLE_DEVICES, which counts those that ROCR_VISIBLE_DEVICES leaves.
    """
    found: list[Gpu] = []
    closed: list[tuple[Gpu, str]] = []
    for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*"), key=lambda path: int(path.name)):
        values = _values(node / "properties")
        if not values.get("simd_count"):
            continue  # a processor, or a GPU that is not given to this container
        render = f"renderD{values.get('drm_render_minor', 0)}"
        gpu = _gpu(root, node, values, render, len(found))
        devices = [root / "dev/kfd", root / "dev/dri" / render]
        refused = [device for device in devices if not os.access(device, os.R_OK | os.W_OK)]
        if refused:
            closed.append((gpu, f"/{refused[0].relative_to(root)}"))
        else:
            found.append(gpu)
    if closed and not found and not all(gpu.is_integrated for gpu, _ in closed):
        fix = "join the groups render and video, or start the container with --device=/dev/kfd --device=/dev/dri"
        message = f"this machine has {len(closed)} AMD GPU(s), and this process may not open {closed[0][1]}"
        return (), EnvironmentFault(message, f"{fix}; or write resources.gpus=0 to train on CPU")
    return tuple(_left_by_rocr(found, environment.get("ROCR_VISIBLE_DEVICES"))), None


def _gpu(root: Path, node: Path, values: dict[str, int], render: str, index: int) -> Gpu:
    device = root / "sys/class/drm" / render / "device"
    total, used = (_number(device / f"mem_info_vram_{what}") for what in ("total", "used"))
    gpu_id = _number(node / "gpu_id")
    # 0 bytes: a process that has opened the GPU, as rocm-smi does, and has nothing on it
    holding = [path.parent.name for path in (root / "sys/class/kfd/kfd/proc").glob(f"*/vram_{gpu_id}") if _number(path)]
    return Gpu(
        str(index),
        index,
        f"GPU-{values['unique_id']:x}" if values.get("unique_id") else "",
        _text(node / "name") or "AMD GPU",
        kind="rocm",
        is_integrated=total is not None and total < LEAST_VRAM_BYTES,
        holder=hold_of(sorted(int(pid) for pid in holding if pid.isdigit()), used, total),
    )


def _left_by_rocr(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    if visible is None:
        return gpus
    left = []
    for entry in (part.strip() for part in visible.split(",")):
        gpu = next((one for one in gpus if entry in (str(one.index), one.uuid)), None)
        if gpu is None:
            break
        left.append(gpu)
    return [
        Gpu(str(number), number, one.uuid, one.name, "rocm", is_integrated=one.is_integrated, holder=one.holder)
        for number, one in enumerate(left)
    ]


def _values(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", _text(path), re.MULTILINE)}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not for this container
        return ""
