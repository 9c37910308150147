"""The device mesh of the sharding strategies, with torch's and Lightning's names for its axes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.core.errors import UserError
from trainer.strategies import MeshSizes

REPLICATE, SHARD, TENSOR = AXES = ("dp_replicate", "dp_shard", "tp")


class RunMesh(DeviceMesh):
    """A mesh with the axes (dp_replicate, dp_shard, tp); each may have size 1.

    In a module's `configure_model` it is `self.device_mesh`. It also accepts Lightning's names for the axes of
    ModelParallelStrategy, `"data_parallel"` and `"tensor_parallel"`. `["data_parallel"]` is one axis over the ranks
    that read different samples. With strategy=hsdp it is the two axes with which `fully_shard` shards within a group
    and replicates between groups.
    """

    def __getitem__(self, mesh_dim_names: str | tuple[str, ...]) -> DeviceMesh:
        """Return the submesh of one axis or several."""
        names = (mesh_dim_names,) if isinstance(mesh_dim_names, str) else tuple(mesh_dim_names)
        return super().__getitem__(tuple(axis for name in names for axis in self._axes(name)))

    def get_group(self, mesh_dim: int | str | None = None) -> ProcessGroup:
        """Return the process group of an axis."""
        return self[mesh_dim].get_group() if isinstance(mesh_dim, str) else super().get_group(mesh_dim)

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        """Return this process's index along an axis."""
        return self[mesh_dim].get_local_rank() if isinstance(mesh_dim, str) else super().get_local_rank(mesh_dim)

    def _axes(self, name: str) -> tuple[str, ...]:
        if name in AXES:
            return (name,)
        if name in ("data_parallel", "dp"):
            return (REPLICATE, SHARD) if self.size(0) > 1 else (SHARD,)
        if name == "tensor_parallel":
            return (TENSOR,)
        raise UserError(
            f'self.device_mesh["{name}"]: no such axis.',
            "Use data_parallel and tensor_parallel, or torch's dp_replicate, dp_shard and tp.",
        )


def make_mesh(device_type: str, sizes: MeshSizes) -> RunMesh:
    """Build the mesh of all ranks, in rank order. Collective."""
    ranks = torch.arange(sizes.dp_replicate * sizes.dp_shard * sizes.tp).view(sizes)
    return RunMesh(device_type, ranks, mesh_dim_names=AXES)


def is_sharded(module: nn.Module) -> bool:
    """Return whether the module itself has applied `fully_shard` to any of its submodules."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def is_split(module: nn.Module) -> bool:
    """Return whether any parameter is a DTensor: the module has sharded itself or uses tensor parallelism."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
