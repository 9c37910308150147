"""Measure what a device reaches: matrix products and copies. For `trainer doctor` and the preflight of a job."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SIZES = {"cuda": {"fp64": 2048, "fp32": 4096, "tf32": 4096}, "cpu": {"fp32": 1024}}
_USUAL = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the matrices, large enough for the peak and done within about 0.1 s."""
_REPEATS = {"cuda": 10, "cpu": 3}
_COPY_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def matrix_flops(device: torch.device, arithmetic: str, during: Callable[[], None] = lambda: None) -> float:
    """Return the FLOP/s of a product of two square matrices, the best of three turns.

    Args:
        device: Where to compute.
        arithmetic: One of `DTYPES`, or fp8; for fp32 and tf32 TF32 is switched off and on.
        during: Called while the last turn runs on a GPU.
    """
    size = _SIZES[device.type].get(arithmetic, _USUAL[device.type])
    multiply = _product(device, arithmetic, size)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    try:
        multiply()
        _wait(device)
        best_s, repeats = float("inf"), _REPEATS[device.type]
        for turn in range(3):
            began = time.perf_counter()
            for _ in range(repeats):
                multiply()
            if turn == 2:
                during()
            _wait(device)
            best_s = min(best_s, (time.perf_counter() - began) / repeats)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / best_s


def _product(device: torch.device, arithmetic: str, size: int) -> Callable[[], object]:
    """Return a function that multiplies two matrices."""
    if arithmetic == "fp8":
        left = torch.ones(size, size, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(left, left.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    matrix = torch.randn(size, size, device=device).to(DTYPES[arithmetic])
    result = torch.empty_like(matrix)
    return lambda: torch.mm(matrix, matrix, out=result)


def works(device: torch.device, arithmetic: str) -> str:
    """Return an empty text if a small matrix product is right in this arithmetic, else what is wrong."""
    try:
        if arithmetic == "fp8":
            product = _product(device, arithmetic, 64)()
            assert isinstance(product, torch.Tensor)
        else:
            ones = torch.ones(64, 64, device=device, dtype=DTYPES[arithmetic])
            product = ones @ ones
        _wait(device)
        return "" if product.float().eq(64).all() else "a product of ones is wrong"
    except Exception as problem:  # torch has no common class for "not supported"
        return f"{type(problem).__name__}: {problem}".splitlines()[0]


def memory_bytes_s(device: torch.device) -> float:
    """Return the bytes that a copy within the memory of a device reads and writes per second."""
    values = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(values)
    return 2 * _copies_s(device, target, values)


def host_bytes_s(device: torch.device) -> float:
    """Return the bytes that are copied from pinned memory of the host to a GPU per second."""
    values = torch.zeros(_COPY_BYTES["cpu"], dtype=torch.uint8).pin_memory()
    return _copies_s(device, torch.empty_like(values, device=device), values)


def _copies_s(device: torch.device, target: torch.Tensor, values: torch.Tensor) -> float:
    target.copy_(values)
    _wait(device)
    best_s = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(values, non_blocking=True)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - began)
    return values.numel() / best_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
