"""The environment of the ranks, as options of a run and the number of nodes decide it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from trainer.config.shape import LaunchShape
from trainer.core.network import LocalAddress
from trainer.supervise.rank_environment import Interpreter, environment
from trainer.supervise.rendezvous import Link, Place, Server
from trainer.supervise.torchrun import command

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
    variables = environment(given, Interpreter(code_dir=tmp_path, expandable_segments=True), shape, Place(), attempt=0)
    assert {name: value for name, value in variables.items() if "ALLOC_CONF" in name} == expected
    variables = environment(given, Interpreter(code_dir=tmp_path), shape, Place(), attempt=0)
    assert {name: value for name, value in variables.items() if "ALLOC_CONF" in name} == given


@pytest.mark.parametrize(
    ("interface", "given", "expected"),
    [
        ("ib0", {"NCCL_SOCKET_IFNAME": "eth9"}, ["ib0", "ib0", "ib0"]),
        (None, {}, ["eth0", None, None]),
        (None, {"GLOO_SOCKET_IFNAME": "bond0", "NCCL_SOCKET_IFNAME": "ib1"}, ["bond0", "ib1", None]),
    ],
    ids=["one option for all", "gloo by the route, NCCL as it likes", "the site's own variables"],
)
def test_interfaces_between_nodes(
    tmp_path: Path, interface: str | None, given: dict[str, str], expected: list[str | None]
) -> None:
    server = Server(address="10.0.0.1", port=4321, token="f00")
    place = Place(2, 1, "first", interface=interface, link=Link(LocalAddress("10.0.0.2", "eth0"), server))
    variables = environment(given, Interpreter(code_dir=tmp_path), GPU, place, attempt=0)
    assert [variables.get(f"{name}_SOCKET_IFNAME") for name in ("GLOO", "NCCL", "TP")] == expected
    assert variables["TRAINER_STORE"] == "tcp:f00"
    arguments = parse_args(command(tmp_path, "job", GPU, place, max_restarts=0, worker=["train.py"])[2:])
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("trainer", "10.0.0.1:4321")
    assert (arguments.local_addr, arguments.rdzv_conf) == ("10.0.0.2", "rank=1")


@pytest.mark.gpu
def test_the_allocator_of_a_gpu_process_has_expandable_segments(tmp_path: Path) -> None:
    code = "import torch; torch.ones(1, device='cuda'); print(torch.cuda.memory_snapshot()[0]['is_expandable'])"
    for is_on in (True, False):
        python = Interpreter(code_dir=tmp_path, expandable_segments=is_on)
        variables = environment(os.environ, python, GPU, Place(), attempt=0)
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(is_on)


@pytest.mark.parametrize(
    ("nodes", "given", "expected"), [(16, {}, None), (17, {}, "1"), (17, {"TORCH_GLOO_LAZY_INIT": "0"}, "0")]
)
def test_the_ranks_of_a_large_job_are_not_all_connected_to_each_other(
    tmp_path: Path, nodes: int, given: dict[str, str], expected: str | None
) -> None:
    python, shape = Interpreter(code_dir=tmp_path), LaunchShape(nodes, 8, "cuda")
    variables = environment(given, python, shape, Place(nodes), attempt=0)
    assert variables.get("TORCH_GLOO_LAZY_INIT") == expected
