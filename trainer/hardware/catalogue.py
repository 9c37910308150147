"""GPUs by the name that `torch.cuda.get_device_name` returns: memory, bandwidth, dense peaks, each with its source.

The peaks are those of `core/peak_flops.py`, which names its sources. A device that is not in the table is not guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.core.errors import UserError
from trainer.core.near import did_you_mean
from trainer.core.peak_flops import TERAFLOPS

GIB = 2**30
DATA_SHEET = "data sheet, in units of 10^9 bytes"
PEAKS_SOURCE = "data sheet, or for GeForce the white paper of the architecture; dense, accumulated in fp32"


@dataclass(frozen=True)
class Device:
    """A GPU model."""

    name: str
    memory_bytes: int
    """Memory that torch reports, or the data sheet's if no report is known."""
    memory_source: str
    bandwidth_bytes_s: float
    """Of the memory."""
    bandwidth_source: str
    peak_tflops: dict[str, float] = field(default_factory=dict)
    """Dense peak by arithmetic."""
    peak_source: str = PEAKS_SOURCE


def device(name: str) -> Device:
    """Return the entry of a device.

    Raises:
        UserError: The catalogue does not have it; the message suggests the nearest name.
    """
    if name not in _MEMORY:
        fix = f"{did_you_mean(name, _MEMORY)}known: {', '.join(sorted(_MEMORY))}"
        raise UserError(f"--gpu {name!r}: the hardware catalogue does not have this device", fix)
    memory, source = _MEMORY[name]
    return Device(name, memory, source, _BANDWIDTH[name] * 1e9, DATA_SHEET, TERAFLOPS[name])


def names() -> list[str]:
    """Return the names of all devices."""
    return sorted(_MEMORY)


def _reported(gib: float, where: str) -> tuple[int, str]:
    """Return the memory in an error message of torch, and the public report with that message."""
    return int(gib * GIB), f"torch's total capacity in https://github.com/{where}"


def _sheet(gigabytes: float) -> tuple[int, str]:
    return int(gigabytes * 1e9), DATA_SHEET


_A100_80 = _reported(79.25, "HiDream-ai/VAREdit/issues/6")
_A100_40 = _reported(39.50, "TianheWu/CoSeR/issues/10")
_H100 = _reported(79.11, "vllm-project/vllm/issues/27508")
_V100_32 = _reported(31.75, "hiyouga/LlamaFactory/issues/182")

_MEMORY: dict[str, tuple[int, str]] = {
    "NVIDIA B200": _reported(178.35, "unslothai/unsloth/issues/3411"),
    "NVIDIA GH200 120GB": _sheet(96),
    "NVIDIA GH200 480GB": _sheet(96),
    "NVIDIA H200": _sheet(141),
    "NVIDIA H200 NVL": _sheet(141),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 NVL": _sheet(94),
    "NVIDIA H100 PCIe": _sheet(80),
    "NVIDIA A100-SXM4-40GB": _A100_40,
    "NVIDIA A100-SXM4-80GB": _A100_80,
    "NVIDIA A100-PCIE-40GB": _A100_40,
    "NVIDIA A100 80GB PCIe": _A100_80,
    "NVIDIA A30": _reported(23.53, "google/RB-Modulation/issues/5"),
    "NVIDIA A10": _sheet(24 * 15 / 16),
    "NVIDIA A40": _sheet(48 * 15 / 16),
    "NVIDIA RTX A6000": _sheet(48),
    "NVIDIA L4": _sheet(24 * 15 / 16),
    "NVIDIA L40": _reported(44.40, "QwenLM/Qwen3-VL/issues/2097"),
    "NVIDIA L40S": _reported(44.42, "stepfun-ai/Step-Video-T2V/issues/8"),
    "NVIDIA GeForce RTX 3090": _sheet(24),
    "NVIDIA GeForce RTX 4090": _reported(23.52, "Soul-AILab/SoulX-FlashTalk/issues/5"),
    "NVIDIA TITAN RTX": _sheet(24),
    "Tesla T4": _sheet(16 * 15 / 16),
    "Tesla V100-SXM2-16GB": _sheet(16),
    "Tesla V100-SXM2-32GB": _V100_32,
    "Tesla V100-PCIE-16GB": _sheet(16),
    "Tesla V100-PCIE-32GB": _V100_32,
    "AMD Instinct MI300X": _sheet(192),
}
"""A10, A40, L4 and T4 keep a sixteenth of their GDDR6 for error correction."""

_BANDWIDTH = {
    "NVIDIA B200": 8000.0,
    "NVIDIA GH200 120GB": 4000.0,
    "NVIDIA GH200 480GB": 4000.0,
    "NVIDIA H200": 4800.0,
    "NVIDIA H200 NVL": 4800.0,
    "NVIDIA H100 80GB HBM3": 3350.0,
    "NVIDIA H100 NVL": 3900.0,
    "NVIDIA H100 PCIe": 2000.0,
    "NVIDIA A100-SXM4-40GB": 1555.0,
    "NVIDIA A100-SXM4-80GB": 2039.0,
    "NVIDIA A100-PCIE-40GB": 1555.0,
    "NVIDIA A100 80GB PCIe": 1935.0,
    "NVIDIA A30": 933.0,
    "NVIDIA A10": 600.0,
    "NVIDIA A40": 696.0,
    "NVIDIA RTX A6000": 768.0,
    "NVIDIA L4": 300.0,
    "NVIDIA L40": 864.0,
    "NVIDIA L40S": 864.0,
    "NVIDIA GeForce RTX 3090": 936.0,
    "NVIDIA GeForce RTX 4090": 1008.0,
    "NVIDIA TITAN RTX": 672.0,
    "Tesla T4": 300.0,
    "Tesla V100-SXM2-16GB": 900.0,
    "Tesla V100-SXM2-32GB": 900.0,
    "Tesla V100-PCIE-16GB": 900.0,
    "Tesla V100-PCIE-32GB": 900.0,
    "AMD Instinct MI300X": 5300.0,
}
"""Peak bandwidth of the memory in GB/s."""
