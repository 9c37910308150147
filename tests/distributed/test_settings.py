"""Options that change how a strategy communicates or computes, on real gloo ranks beside the same job without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_scenarios

STEPS = 20
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ddp-bf16": {"strategy": "ddp", "options": {"comm_hook": "bf16_compress"}},
    "ddp-fp16": {"strategy": "ddp", "options": {"comm_hook": "fp16_compress", "bucket_cap_mb": 1}},
    "ddp-copies": {"strategy": "ddp", "options": {"gradient_as_bucket_view": False}},
}
WITHIN = {"ddp-bf16": 5e-3, "ddp-fp16": 1e-3}
"""Largest relative difference of a loss: a gradient keeps 8 (bf16) or 11 (fp16) of its 24 bits."""
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder: Path = tmp_path_factory.mktemp("settings")
    return run_scenarios(2, [{"name": name, "steps": STEPS, **case} for name, case in CASES.items()], folder, "two")


@pytest.mark.parametrize("case", WITHIN)
def test_a_communication_hook_rounds_gradients_and_little_else(two_ranks: Results, case: str) -> None:
    found, expected = two_ranks[case]["losses"], two_ranks["ddp"]["losses"]
    differences = [abs(one - other) / other for one, other in zip(found, expected, strict=True)]
    assert differences[0] == 0  # before the first update
    assert 0 < max(differences) < WITHIN[case]  # 0: the hook was not called


def test_gradients_as_views_of_the_buckets_change_nothing(two_ranks: Results) -> None:
    assert two_ranks["ddp-copies"]["weights"] == two_ranks["ddp"]["weights"]
