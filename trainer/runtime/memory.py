"""Report what occupies memory when it runs out, with a snapshot on a GPU, and decide how the job continues."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from trainer.core.errors import JOB_FAILED, NEVER_RESTART
from trainer.runs.events import OutOfMemory
from trainer.runtime.attempt import Attempt
from trainer.runtime.micro_batch import smaller

_ERRORS = (torch.OutOfMemoryError, MemoryError)
_ON_CPU = "DefaultCPUAllocator: can't allocate memory"
"""In the message of the RuntimeError that torch raises for tensors of the host (c10/core/impl/alloc_cpu.cpp)."""
_WAIT_S = 30.0
"""Without the wait the other ranks would fail without this one, and torchrun would restart all of them before the node
process kills them (`FAILED_GRACE_S`)."""


def is_exhausted(error: BaseException) -> bool:
    """Return whether an exception says that the memory of a GPU, or of the host, ran out."""
    return isinstance(error, _ERRORS) or (isinstance(error, RuntimeError) and _ON_CPU in str(error))


@dataclass(frozen=True)
class Owners:
    """Bytes that this rank uses, by owner."""

    parameters: int
    gradients: int
    optimizer: int
    other: int | None
    """Other memory of the GPU, mostly activations; None on the CPU."""

    @staticmethod
    def of(trainer: Trainer, module: LightningModule) -> Owners:
        """Measure the memory of a module and its optimizers."""
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
        """Return the sizes as text, the largest first."""
        sizes = {"parameters": self.parameters, "gradients": self.gradients, "optimizer state": self.optimizer}
        if self.other is not None:
            sizes["activations and other"] = max(0, self.other)
        largest_first = sorted(sizes.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {_size(value)}" for name, value in largest_first)


class MemoryReport(Callback):
    """Describes the memory while everything still exists; `end` reports it."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Describe the memory if it has run out."""
        if is_exhausted(exception):
            owners = f"on this rank {Owners.of(trainer, pl_module)}"
            snapshot = self._snapshot() if trainer.strategy.root_device.type == "cuda" else None
            self._attempt.memory = f"{owners}; memory snapshot: {snapshot}" if snapshot else owners

    def _snapshot(self) -> str | None:
        """Write a snapshot for https://docs.pytorch.org/memory_viz; return its path, or None if that fails."""
        rank, directory = self._attempt.rank, self._attempt.directory
        path = directory.memory_snapshot(rank.attempt, rank.rank)
        try:
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        except Exception:  # out of memory; the message must still be written
            return None
        return str(path.relative_to(directory.path))


def end(attempt: Attempt, policy: str) -> int | None:
    """Record that this rank ran out of memory.

    Args:
        attempt: The attempt.
        policy: `resilience.on_oom`.

    Returns:
        The exit code after which torchrun restarts the workers, then with a smaller micro-batch. None: the job failed.
    """
    plan, rank = attempt.plan, attempt.rank
    size = f" with a micro-batch of {plan.micro_batch}" if plan else ""
    peak = _size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    owners = attempt.memory or f"the process has used up to {peak}"
    reason = f"rank {rank.rank} on {socket.gethostname()} ran out of memory{size}: {owners}"
    half = smaller(plan) if plan and policy == "halve" else None
    attempt.directory.add_event(
        OutOfMemory(
            attempt=rank.attempt,
            rank=rank.rank,
            host=socket.gethostname(),
            step=attempt.heartbeat.step,
            reason=reason,
            batch_size=plan.global_batch if plan else None,
            micro_batch=half,
        )
    )
    if half is None:
        attempt.end("failed", NEVER_RESTART, reason, every_rank=True)
        if rank.world_size > 1:
            time.sleep(_WAIT_S)
        return None
    print(f"{reason}; the next attempt uses a micro-batch of {half} and more gradient accumulation", flush=True)
    attempt.heartbeat.stop("failed")
    return JOB_FAILED


def _bytes(values: Iterable[Any]) -> int:
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return sum(one.numel() * one.element_size() for one in tensors if isinstance(one, torch.Tensor))


def _size(count: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
