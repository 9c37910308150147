"""One of several gloo ranks that measure what each collective allocates, and print it as JSON."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

ELEMENTS = 1_200_000
REPEATS = 5
FREED_S = 5.0


def _allocated(collective: Callable[[], object]) -> int:
    """Return the bytes at the peak of a collective; other threads may allocate something meanwhile, but not always."""
    counter = ctypes.CDLL(None)  # `benchmarks/planned_memory_held.c`, preloaded
    counter.held_now.restype = counter.held_peak.restype = ctypes.c_long
    sizes = []
    for _ in range(REPEATS):
        dist.barrier()
        before = counter.held_now()
        counter.held_begin()
        counter.held_enter(1)
        collective()
        counter.held_leave()
        sizes.append(counter.held_peak() - before)
        end = time.monotonic() + FREED_S
        while counter.held_staged() and time.monotonic() < end:
            time.sleep(0)  # gloo's thread frees after the collective has ended
    return min(sizes)


def _measure(whole: torch.Tensor, shard: torch.Tensor) -> dict[str, int]:
    return {
        "_allgather_base_": _allocated(lambda: dist.all_gather_into_tensor(whole, shard)),
        "_reduce_scatter_base_": _allocated(lambda: dist.reduce_scatter_tensor(shard, whole)),
        "allreduce_": _allocated(lambda: dist.all_reduce(whole)),
        "broadcast_": _allocated(lambda: dist.broadcast(whole, 0)),
    }


if __name__ == "__main__":
    rank, ranks, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    found = {}
    for kind in ("float32", "bfloat16"):
        tensor = torch.zeros(ELEMENTS, dtype=getattr(torch, kind))
        found[kind] = _measure(tensor, tensor.chunk(ranks)[0].clone())
    dist.destroy_process_group()
    print(json.dumps(found))
