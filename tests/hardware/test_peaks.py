"""Peak rates: by exact name and arithmetic, never guessed."""

from __future__ import annotations

import pytest

from trainer.hardware.device import Arithmetic
from trainer.hardware.peaks import arithmetic_of, peak_flops


@pytest.mark.parametrize(
    ("name", "arithmetic", "expected"),
    [
        ("NVIDIA H200", "bf16", 989.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("Tesla T4", "fp16", 65e12),
        ("Tesla T4", "bf16", None),  # emulated
        ("NVIDIA H100", "bf16", None),  # which of the three?
        ("NVIDIA H200 MIG 1g.18gb", "bf16", None),
        ("nvidia h200", "bf16", None),
    ],
)
def test_a_device_that_is_not_in_the_table_has_no_peak(name: str, arithmetic: Arithmetic, expected: float) -> None:
    assert peak_flops(name, arithmetic) == expected


@pytest.mark.parametrize(
    ("precision", "matmul", "expected"),
    [
        ("bf16-mixed", "highest", "bf16"),
        ("bf16-true", "high", "bf16"),
        ("16-mixed", "highest", "fp16"),
        ("32-true", "highest", "fp32"),
        ("32-true", "high", "tf32"),
        ("64-true", "medium", "fp64"),
    ],
)
def test_the_arithmetic_follows_from_both_precisions(precision: str, matmul: str, expected: str) -> None:
    assert arithmetic_of(precision, matmul) == expected
