"""Peak arithmetic rates of GPUs, the denominator of MFU. A device that is not in the table has no MFU."""

from __future__ import annotations

from typing import Literal

Arithmetic = Literal["fp64", "fp32", "tf32", "bf16", "fp16"]
"""What a matrix product computes in. float8 training is measured against bf16, as torchtitan does: only some of its
products are in float8."""

_HOPPER = {"fp64": 67.0, "fp32": 67.0, "tf32": 494.5, "bf16": 989.5, "fp16": 989.5}
_HOPPER_NVL = {"fp64": 60.0, "fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}
_AMPERE = {"fp64": 19.5, "fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}
_VOLTA_SXM2 = {"fp64": 7.8, "fp32": 15.7, "fp16": 125.0}
_VOLTA_PCIE = {"fp64": 7.0, "fp32": 14.0, "fp16": 112.0}

TERAFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA B200": {"fp32": 75.0, "tf32": 1125.0, "bf16": 2250.0, "fp16": 2250.0},
    "NVIDIA GH200 120GB": _HOPPER,
    "NVIDIA GH200 480GB": _HOPPER,
    "NVIDIA H200": _HOPPER,
    "NVIDIA H200 NVL": _HOPPER_NVL,
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H100 NVL": _HOPPER_NVL,
    "NVIDIA H100 PCIe": {"fp64": 51.0, "fp32": 51.0, "tf32": 378.0, "bf16": 756.5, "fp16": 756.5},
    "NVIDIA A100-SXM4-40GB": _AMPERE,
    "NVIDIA A100-SXM4-80GB": _AMPERE,
    "NVIDIA A100-PCIE-40GB": _AMPERE,
    "NVIDIA A100 80GB PCIe": _AMPERE,
    "NVIDIA A30": {"fp64": 10.3, "fp32": 10.3, "tf32": 82.0, "bf16": 165.0, "fp16": 165.0},
    "NVIDIA A10": {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0},
    "NVIDIA A40": {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7},
    "NVIDIA RTX A6000": {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8, "fp16": 154.8},
    "NVIDIA L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0},
    "NVIDIA L40": {"fp32": 90.5, "tf32": 90.5, "bf16": 181.05, "fp16": 181.05},
    "NVIDIA L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.05, "fp16": 362.05},
    "NVIDIA GeForce RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0},
    "NVIDIA GeForce RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2},
    "NVIDIA TITAN RTX": {"fp32": 16.3, "fp16": 130.5},
    "Tesla T4": {"fp32": 8.1, "fp16": 65.0},
    "Tesla V100-SXM2-16GB": _VOLTA_SXM2,
    "Tesla V100-SXM2-32GB": _VOLTA_SXM2,
    "Tesla V100-PCIE-16GB": _VOLTA_PCIE,
    "Tesla V100-PCIE-32GB": _VOLTA_PCIE,
    "AMD Instinct MI300X": {"fp64": 163.4, "fp32": 163.4, "tf32": 653.7, "bf16": 1307.4, "fp16": 1307.4},
}
"""TFLOP/s by the name that `torch.cuda.get_device_name` returns; dense, with accumulation in fp32.

Source: NVIDIA's data sheets of each product (H100, H200, H200 NVL, GH200, HGX B200, A100, A30, A10, A40, L4, L40, L40S,
T4, V100, RTX A6000, TITAN RTX) and AMD's of MI300X, halved where a sheet gives the rate with 2:4 sparsity; for GeForce
the white papers of GA102 (appendix A) and AD102 (appendix A). fp64 includes tensor cores where the product has them.
"""

_MATRIX_DTYPE: dict[str, Arithmetic] = {"bf16": "bf16", "16": "fp16", "64": "fp64"}


def arithmetic_of(precision: str, matmul_precision: str) -> Arithmetic:
    """Return what the matrix products of a training compute in.

    Args:
        precision: Lightning's precision, such as `bf16-mixed`.
        matmul_precision: Value of `torch.get_float32_matmul_precision()`; all but `highest` permit TF32.
    """
    kind = precision.partition("-")[0]
    return _MATRIX_DTYPE.get(kind) or ("fp32" if matmul_precision == "highest" else "tf32")


def peak_flops(device_name: str, arithmetic: Arithmetic) -> float | None:
    """Return the peak FLOP/s of a device; None if the table does not have the device or the arithmetic."""
    rate = TERAFLOPS.get(device_name, {}).get(arithmetic)
    return None if rate is None else rate * 1e12
