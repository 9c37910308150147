"""Every strategy on one GPU beside one process without sharding: the same losses, offload, moved checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_scenarios

STEPS, END = 20, 25
CPU = {"offload_optimizer": "cpu"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("single", {}),
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp-offload": ("fsdp", {"cpu_offload": True}),
    "zero1": ("deepspeed_zero1", {}),
    "zero2": ("deepspeed_zero2", {}),
    "zero3": ("deepspeed_zero3", {}),
    "zero1-offload": ("deepspeed_zero1", CPU),
    "zero2-offload": ("deepspeed_zero2", CPU),
    "zero3-offload": ("deepspeed_zero3", {**CPU, "offload_parameters": "cpu"}),
}
PRECISIONS = {"32-true": 1e-4, "bf16-mixed": 0.01}
"""Largest relative difference of the losses: kernels of other sizes sum in another order."""
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Results:
    scenarios = [
        {"strategy": strategy, "options": options, "cuda": True, "steps": STEPS, "precision": precision, "clip": 0.05}
        | {"name": f"{case}-{precision}"}
        for case, (strategy, options) in CASES.items()
        for precision in PRECISIONS
    ]
    return run_scenarios(1, scenarios, folder, "trained", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_one_gpu_gives_the_losses_of_one_process(trained: Results, case: str, precision: str) -> None:
    found, expected = trained[f"{case}-{precision}"], trained[f"single-{precision}"]
    assert found["failure"] is None
    differences = [abs(one - other) / other for one, other in zip(found["losses"], expected["losses"], strict=True)]
    assert max(differences) < PRECISIONS[precision]


@pytest.mark.gpu
def test_checkpoints_move_between_strategies_on_one_gpu(trained: Results, folder: Path) -> None:
    moves = [
        ("zero3-offload", "ddp"),
        ("fsdp-offload", "zero2-offload"),
        ("zero1", "fsdp"),
        ("single", "zero3-offload"),
    ]
    scenarios = [
        {"strategy": CASES[target][0], "options": CASES[target][1], "cuda": True, "steps": END, "from_step": STEPS}
        | {"load": str(folder / f"{source}-32-true" / f"step-{STEPS:08d}"), "clip": 0.05, "name": f"{source}-{target}"}
        for source, target in [*moves, ("single", "single")]
    ]
    moved = run_scenarios(1, scenarios, folder, "moved", device="cuda")
    expected = moved["single-single"]["losses"]
    for source, target in moves:
        found = moved[f"{source}-{target}"]
        assert found["failure"] is None
        assert [pytest.approx(one, rel=1e-4) for one in expected] == found["losses"], (source, target)
