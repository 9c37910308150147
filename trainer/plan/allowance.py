"""What a GPU's memory holds beside the tensors: an allowance, because it is not computed. Imports no torch.

These are assumptions, not measurements: their error is not known.
"""

from __future__ import annotations

_MIB = 2**20
CONTEXT = 512 * _MIB
"""CUDA's context with its loaded kernels: about half a GB on recent drivers."""
WORKSPACES = 128 * _MIB
"""cuBLAS and cuBLASLt keep a workspace for each handle and stream: 32 MiB on Hopper, 8 MiB before."""
COLLECTIVES = 512 * _MIB
"""NCCL's channels: their number depends on the links and the ranks."""
FRAGMENTATION = 0.05
"""Share of the planned peak that the allocator reserves and cannot use."""


def allowance(peak: int, world_size: int) -> dict[str, int]:
    """Return the bytes that are added to a peak on a GPU, by name."""
    return {
        "CUDA context": CONTEXT,
        "workspaces": WORKSPACES,
        **({"NCCL": COLLECTIVES} if world_size > 1 else {}),
        "fragmentation": int(FRAGMENTATION * peak),
    }
