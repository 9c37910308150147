"""The arguments and the environment of torchrun that options of a run decide."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from trainer.config.shape import LaunchShape
from trainer.supervise.torchrun import Place, command, environment

GPU, CPU = LaunchShape(1, 2, "cuda"), LaunchShape(1, 2, "cpu")


@pytest.mark.parametrize(
    ("shape", "given", "expected"),
    [
        (GPU, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (GPU, {"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (GPU, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}),
        (GPU, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
        (CPU, {}, {}),
    ],
)
def test_expandable_segments_unless_the_user_has_set_the_allocator(
    tmp_path: Path, shape: LaunchShape, given: dict[str, str], expected: dict[str, str]
) -> None:
    variables = environment(given, tmp_path, shape, Place(), attempt=0, expandable_segments=True)
    assert {name: value for name, value in variables.items() if "ALLOC_CONF" in name} == expected
    variables = environment(given, tmp_path, shape, Place(), attempt=0, expandable_segments=False)
    assert {name: value for name, value in variables.items() if "ALLOC_CONF" in name} == given


@pytest.mark.parametrize("binding", ["node", "socket", "exclusive", "core-complex"])
def test_numa_binding_is_an_option_of_torchrun(tmp_path: Path, binding: str) -> None:
    arguments = command(tmp_path, "job", GPU, Place(), max_restarts=0, worker=["train.py"], numa_binding=binding)
    assert parse_args(arguments[2:]).numa_binding == binding


def test_numa_binding_is_not_passed_for_cpu_ranks_or_without_the_option(tmp_path: Path) -> None:
    on_cpu = command(tmp_path, "job", CPU, Place(), max_restarts=0, worker=["train.py"], numa_binding="node")
    without = command(tmp_path, "job", GPU, Place(), max_restarts=0, worker=["train.py"])
    assert parse_args(on_cpu[2:]).numa_binding is parse_args(without[2:]).numa_binding is None
