"""The device mesh of the sharding strategies, under torch's names of its axes and under Lightning's."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.core.errors import UserError

REPLICATE, SHARD, TENSOR = AXES = ("dp_replicate", "dp_shard", "tp")


class RunMesh(DeviceMesh):
    """(dp_replicate, dp_shard, tp), each of which may be 1.

    A module's `configure_model` finds it as `self.device_mesh`. `["data_parallel"]` and `["tensor_parallel"]` are the
    axes that Lightning's ModelParallelStrategy has; the first is one axis of all ranks that read different samples,
    with strategy=hsdp the two for which `fully_shard` shards inside of a group and replicates between groups.
    """

    def __getitem__(self, mesh_dim_names: str | tuple[str, ...]) -> DeviceMesh:
        names = (mesh_dim_names,) if isinstance(mesh_dim_names, str) else tuple(mesh_dim_names)
        return super().__getitem__(tuple(axis for name in names for axis in self._axes(name)))

    def get_group(self, mesh_dim: int | str | None = None) -> ProcessGroup:
        return self[mesh_dim].get_group() if isinstance(mesh_dim, str) else super().get_group(mesh_dim)

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        return self[mesh_dim].get_local_rank() if isinstance(mesh_dim, str) else super().get_local_rank(mesh_dim)

    def _axes(self, name: str) -> tuple[str, ...]:
        if name in AXES:
            return (name,)
        if name in ("data_parallel", "dp"):
            return (REPLICATE, SHARD) if self.size(0) > 1 else (SHARD,)
        if name == "tensor_parallel":
            return (TENSOR,)
        raise UserError(
            f'self.device_mesh["{name}"]: there is no such axis.',
            "Use data_parallel and tensor_parallel, or torch's dp_replicate, dp_shard and tp.",
        )


def make_mesh(device_type: str, sizes: tuple[int, int, int]) -> RunMesh:
    """The mesh of all ranks, in the order of their numbers. Collective."""
    ranks = torch.arange(sizes[0] * sizes[1] * sizes[2]).view(sizes)
    return RunMesh(device_type, ranks, mesh_dim_names=AXES)


def is_sharded(module: nn.Module) -> bool:
    """Whether the module has called `fully_shard` itself, on any part of it."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def is_split(module: nn.Module) -> bool:
    """Whether the module has distributed parameters itself: tensor parallel, or sharded."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
