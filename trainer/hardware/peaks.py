"""Peak arithmetic rates of GPUs, the denominator of MFU. A device that the catalogue does not have has no MFU."""

from __future__ import annotations

from trainer.hardware.catalogue import known
from trainer.hardware.device import Arithmetic

_MATRIX_DTYPE: dict[str, Arithmetic] = {"bf16": "bf16", "16": "fp16", "64": "fp64"}


def arithmetic_of(precision: str, matmul_precision: str) -> Arithmetic:
    """Return what the matrix products of a training compute in.

    float8 training counts as bf16, as in torchtitan: only some of its products are in float8.

    Args:
        precision: Lightning's precision, such as `bf16-mixed`.
        matmul_precision: Value of `torch.get_float32_matmul_precision()`; all but `highest` permit TF32.
    """
    kind = precision.partition("-")[0]
    return _MATRIX_DTYPE.get(kind) or ("fp32" if matmul_precision == "highest" else "tf32")


def peak_flops(device_name: str, arithmetic: Arithmetic) -> float | None:
    """Return the peak FLOP/s of a device; None if the catalogue does not have the device or the arithmetic."""
    device = known(device_name)
    rate = None if device is None else device.peak_tflops.get(arithmetic)
    return None if rate is None else rate * 1e12
