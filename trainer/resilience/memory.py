"""What memory holds when it has run out, in a sentence and, on a GPU, a snapshot; and a smaller micro-batch after it.

The next attempt takes half the micro-batch and twice as many of them a step: the global batches and their samples stay.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from trainer.config.batch import BatchPlan
from trainer.errors import JOB_FAILED, NEVER_RESTART
from trainer.runs.directory import RunDirectory
from trainer.worker.attempt import Attempt

ERRORS = (torch.OutOfMemoryError, MemoryError)
"""Of a GPU, and of the host."""
EVENT = "out_of_memory"
_STAYS_S = 10.0
"""If this rank left at once, the others would fail for want of it, and torchrun would start them all again before the
node process (`FAILED_GRACE_S`) ends them."""


@dataclass(frozen=True)
class Owners:
    """Bytes on this rank."""

    parameters: int
    gradients: int
    optimizer: int
    other: int | None
    """What else the GPU has given out, activations above all; null on the CPU."""

    @staticmethod
    def of(trainer: Trainer, module: LightningModule) -> Owners:
        parameters = list(module.parameters())
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        known = (
            _bytes(parameters),
            _bytes(parameter.grad for parameter in parameters),
            _bytes(value for state in states for value in state.values()),
        )
        device = trainer.strategy.root_device
        other = torch.cuda.memory_allocated(device) - sum(known) if device.type == "cuda" else None
        return Owners(*known, other)

    def __str__(self) -> str:
        """The largest first."""
        sizes = {"parameters": self.parameters, "gradients": self.gradients, "optimizer state": self.optimizer}
        if self.other is not None:
            sizes["activations and the rest"] = max(0, self.other)
        told = sorted(sizes.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {_size(value)}" for name, value in told)


class MemoryReport(Callback):
    """Looks while everything is still there; `end` says it."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, ERRORS):
            said = f"on this rank {Owners.of(trainer, pl_module)}"
            snapshot = self._snapshot() if trainer.strategy.root_device.type == "cuda" else None
            self._attempt.memory = f"{said}; a snapshot of it is in {snapshot}" if snapshot else said

    def _snapshot(self) -> str | None:
        """For https://docs.pytorch.org/memory_viz, where it was taken at all."""
        rank = self._attempt.rank
        path = self._attempt.directory.logs_dir / f"attempt-{rank.attempt:02d}" / f"rank-{rank.rank}.memory.pickle"
        try:
            torch.cuda.memory._dump_snapshot(str(path))
        except Exception:  # memory is short, and the message must come out
            return None
        return str(path.relative_to(self._attempt.directory.path))


def end(attempt: Attempt, policy: str) -> int | None:
    """Write down that this rank ran out of memory. The exit code with which torchrun starts the workers again, then
    with a smaller micro-batch; None: the job is over."""
    plan, rank = attempt.plan, attempt.rank
    size = f" with a micro-batch of {plan.micro_batch}" if plan else ""
    owners = attempt.memory or f"the process has had {_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}"
    reason = f"rank {rank.rank} on {socket.gethostname()} ran out of memory{size}: {owners}"
    smaller = smaller_micro_batch(plan) if plan and policy == "halve" else None
    attempt.directory.event(
        EVENT,
        attempt=rank.attempt,
        rank=rank.rank,
        host=socket.gethostname(),
        step=attempt.heartbeat.step,
        reason=reason,
        batch_size=plan.global_batch if plan else None,
        micro_batch=smaller,
    )
    if smaller is None:
        attempt.end("failed", NEVER_RESTART, reason, every_rank=True)
        if rank.world_size > 1:
            time.sleep(_STAYS_S)
        return None
    print(f"{reason}; the next attempt takes a micro-batch of {smaller}, in as many more passes a step", flush=True)
    attempt.heartbeat.stop("failed")
    return JOB_FAILED


def smaller_micro_batch(plan: BatchPlan) -> int | None:
    """The largest one of at most half the size that divides a rank's share of the global batch; None below 1."""
    return _largest_part(plan.global_batch // plan.world_size, plan.micro_batch // 2)


def halved(
    data: dict[str, Any],
    directory: RunDirectory,
    readers: int,
    is_first: bool,
    group: torch.distributed.ProcessGroup | None,
) -> dict[str, Any]:
    """The `data` section with the micro-batch that an attempt before this one has left; the first rank reads it.

    `readers`: ranks that read different samples.
    """
    chosen: list[Any] = [None]
    if is_first:
        events = [event for event in directory.events() if event["event"] == EVENT and event.get("micro_batch")]
        chosen = [events[-1] if events else None]
    if group is not None:
        torch.distributed.broadcast_object_list(chosen, src=0, group=group)
    if chosen[0] is None:
        return data
    batch_size = data.get("batch_size") or chosen[0]["batch_size"]
    most = min(chosen[0]["micro_batch"], data.get("micro_batch") or batch_size)
    return {**data, "batch_size": batch_size, "micro_batch": _largest_part(batch_size // readers, most)}


def _largest_part(share: int, most: int) -> int | None:
    return next((size for size in range(most, 0, -1) if share % size == 0), None)


def _bytes(values: Iterable[Any]) -> int:
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return sum(one.numel() * one.element_size() for one in tensors if isinstance(one, torch.Tensor))


def _size(count: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
