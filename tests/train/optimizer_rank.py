"""One rank of `test_optimizers.py`: steps on sharded parameters beside the same steps on whole ones.

`python optimizer_rank.py OUTPUT.json`. Writes the largest difference by case; weights, codes and scales are compared.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainer.optimizers import LowMemoryAdamW, Muon

SHAPES = [(129, 64), (64, 320), (256,), (1, 4096)]
"""Rows that two ranks share unevenly, blocks of 64 and 256, a vector, and a matrix of which one rank has nothing."""
CASES: dict[str, Any] = {
    "8bit": lambda groups: LowMemoryAdamW(groups, lr=0.01, states="8bit"),
    "8bit-masters": lambda groups: LowMemoryAdamW(groups, lr=0.01, states="8bit", master_weights=True),
    "float32": lambda groups: LowMemoryAdamW(groups, lr=0.01, states="float32"),
    "muon": lambda groups: Muon(groups, lr=0.01),
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    meshes = {
        "fsdp": (init_device_mesh("cpu", (2,)), [Shard(0)]),
        "hsdp": (init_device_mesh("cpu", (2, 1)), [Replicate(), Shard(0)]),
        "columns": (init_device_mesh("cpu", (2,)), [Shard(1)]),
    }
    found = {}
    for case, make in CASES.items():
        for name, (mesh, placements) in meshes.items():
            if name == "columns" and case != "muon":  # refused with tp
                continue
            found[f"{case} {name}"] = difference(make, mesh, placements, case)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def difference(make: Any, mesh: Any, placements: Any, case: str) -> float:
    generator = torch.Generator().manual_seed(5)
    dtype = torch.bfloat16 if case == "8bit-masters" else torch.float32
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    wholes = [nn.Parameter(one.clone()) for one in values]
    shards = [nn.Parameter(_sharded(one, mesh, placements)) for one in values]
    optimizers = [make(_groups(parameters, case)) for parameters in (wholes, shards)]
    for _ in range(5):
        for whole, shard in zip(wholes, shards, strict=True):
            whole.grad = torch.randn(whole.shape, generator=generator).to(dtype)
            shard.grad = _sharded(whole.grad, mesh, placements)
        for optimizer in optimizers:
            optimizer.step()
    worst = 0.0
    for whole, shard in zip(wholes, shards, strict=True):
        pairs = [(whole, shard), *zip(optimizers[0].state[whole].items(), optimizers[1].state[shard].items())]  # noqa: B905
        for one, other in pairs:
            a, b = (one[1], other[1]) if isinstance(one, tuple) else (one, other)
            gathered = b.full_tensor() if isinstance(b, DTensor) else b
            assert gathered.shape == a.shape, (gathered.shape, a.shape)
            worst = max(worst, float((a.detach().float() - gathered.detach().float()).abs().max()))
    return worst


def _sharded(tensor: torch.Tensor, mesh: Any, placements: Any) -> DTensor:
    fitting = [one if not isinstance(one, Shard) or tensor.dim() > one.dim else Shard(0) for one in placements]
    return distribute_tensor(tensor, mesh, fitting)


def _groups(parameters: list[nn.Parameter], case: str) -> list[dict[str, Any]]:
    if case != "muon":
        return [{"params": parameters}]
    matrices = [one for one in parameters if one.dim() == 2]
    return [
        {"params": matrices, "muon": True},
        {"params": [one for one in parameters if one.dim() != 2], "muon": False},
    ]


if __name__ == "__main__":
    main()
