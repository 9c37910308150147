from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.core.hardware import count_gpus, usable_cores


def machine(root: Path, listed: int, device_files: int) -> Path:
    for index in range(listed):
        (root / f"proc/driver/nvidia/gpus/0000:{index:02x}:00.0").mkdir(parents=True)
    (root / "dev").mkdir()
    for name in [*(f"nvidia{index}" for index in range(device_files)), "nvidiactl", "nvidia-uvm", "null"]:
        (root / "dev" / name).touch()
    return root


@pytest.mark.parametrize(
    ("listed", "device_files", "expected"),
    [(0, 0, 0), (8, 8, 8), (8, 2, 2), (4, 0, 0), (0, 3, 3)],
)
def test_counts_what_the_driver_shows(tmp_path: Path, listed: int, device_files: int, expected: int) -> None:
    assert count_gpus({}, machine(tmp_path, listed, device_files)) == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,1", 2),
        ("2", 1),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0,9,1", 1),
        ("GPU-8a9, GPU-7b2", 2),
        ("GPU-8a9, MIG-12/3/0", 1),
        ("0,0", 0),
        ("3 ,0", 2),
    ],
)
def test_respects_cuda_visible_devices(tmp_path: Path, visible: str, expected: int) -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}, machine(tmp_path, 4, 4)) == expected


def test_visible_devices_without_a_driver_are_none(tmp_path: Path) -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, machine(tmp_path, 0, 0)) == 0


def test_cores_are_the_smallest_of_mask_share_and_quota(tmp_path: Path) -> None:
    here = len(os.sched_getaffinity(0))
    assert usable_cores({}, tmp_path) == here
    assert usable_cores({"SLURM_CPUS_ON_NODE": "1"}, tmp_path) == 1
    assert usable_cores({"SLURM_CPUS_ON_NODE": "4096"}, tmp_path) == here
    quota = tmp_path / "sys/fs/cgroup/cpu.max"
    quota.parent.mkdir(parents=True)
    quota.write_text("50000 100000\n")
    assert usable_cores({}, tmp_path) == 1
    quota.write_text("max 100000\n")
    assert usable_cores({}, tmp_path) == here
