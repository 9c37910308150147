"""Limit the micro-batch of an attempt, with more gradient accumulation, so that the global batches stay the same.

The micro-batch that `trainer.find_micro_batch` has found holds for every later attempt (`train/find_micro_batch.py`).
After an attempt that ran out of memory the next one has half the micro-batch (`resilience.on_oom`). An attempt on fewer
nodes than the run requests (`resources.min_nodes`) has no larger micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from trainer.config.batch import BatchPlan
from trainer.runs.directory import RunDirectory
from trainer.runs.events import MicroBatchFound, OutOfMemory
from trainer.runtime.process import Rank


def smaller(plan: BatchPlan) -> int | None:
    """Return the largest micro-batch of at most half the size that divides a rank's share; None if there is none."""
    return _largest_part(plan.global_batch // plan.world_size, plan.micro_batch // 2)


def limited(
    data: dict[str, Any],
    directory: RunDirectory,
    rank: Rank,
    readers: int,
    group: torch.distributed.ProcessGroup | None,
) -> dict[str, Any]:
    """Return the section `data` with the micro-batch of this attempt. Collective.

    Args:
        data: The section.
        directory: The run; the first rank reads the events of earlier attempts.
        rank: This rank.
        readers: Number of ranks that read different samples.
        group: The CPU process group; None for one rank.
    """
    chosen: list[Any] = [None]
    if rank.is_first:
        chosen = [_limit(data, directory, rank.world_size, readers)]
    if group is not None:
        torch.distributed.broadcast_object_list(chosen, src=0, group=group)
    if chosen[0] is None:
        return data
    batch_size, most = chosen[0]
    return {**data, "batch_size": batch_size, "micro_batch": _largest_part(batch_size // readers, most)}


def _limit(data: dict[str, Any], directory: RunDirectory, ranks: int, readers: int) -> tuple[int, int] | None:
    """Return the global batch and the largest micro-batch; None if nothing limits it."""
    events = [event for event in directory.events_of(OutOfMemory) if event.micro_batch]
    batch_size = data.get("batch_size") or (events[-1].batch_size if events else None)
    if batch_size is None:
        return None
    limits = [event.micro_batch for event in events[-1:] if event.micro_batch]
    limits += _found(directory)
    shape = directory.launch().shape
    requested = shape.world_size if shape else ranks
    if requested > ranks:
        limits.append(max(1, batch_size * ranks // (requested * readers)))
    return (batch_size, min([*limits, data.get("micro_batch") or batch_size])) if limits else None


def sizes(plan: BatchPlan) -> list[int]:
    """Return the micro-batches that divide a rank's share of a global batch, the smallest first."""
    share = plan.global_batch // plan.world_size
    return [size for size in range(1, share + 1) if share % size == 0]


def is_found(directory: RunDirectory, rank: Rank, group: torch.distributed.ProcessGroup | None) -> bool:
    """Return whether an earlier attempt has found the micro-batch. Collective: the first rank reads the events."""
    chosen = [bool(_found(directory)) if rank.is_first else False]
    if group is not None:
        torch.distributed.broadcast_object_list(chosen, src=0, group=group)
    return chosen[0]


def _found(directory: RunDirectory) -> list[int]:
    """Return what the ranks have found, one number each that has reported it; the smallest fits on all."""
    return [event.micro_batch for event in directory.events_of(MicroBatchFound)]


def _largest_part(share: int, most: int) -> int | None:
    return next((size for size in range(most, 0, -1) if share % size == 0), None)
