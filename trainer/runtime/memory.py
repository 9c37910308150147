"""What memory holds when it has run out, in a sentence and, on a GPU, a snapshot; what becomes of the job then."""

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

ERRORS = (torch.OutOfMemoryError, MemoryError)
"""Of a GPU, and of the host."""
_STAYS_S = 30.0
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
        rank, directory = self._attempt.rank, self._attempt.directory
        path = directory.memory_snapshot(rank.attempt, rank.rank)
        try:
            torch.cuda.memory._dump_snapshot(str(path))
        except Exception:  # memory is short, and the message must come out
            return None
        return str(path.relative_to(directory.path))


def end(attempt: Attempt, policy: str) -> int | None:
    """Write down that this rank ran out of memory. The exit code with which torchrun starts the workers again, then
    with a smaller micro-batch; None: the job is over."""
    plan, rank = attempt.plan, attempt.rank
    size = f" with a micro-batch of {plan.micro_batch}" if plan else ""
    owners = attempt.memory or f"the process has had {_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}"
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
            time.sleep(_STAYS_S)
        return None
    print(f"{reason}; the next attempt takes a micro-batch of {half}, in as many more passes a step", flush=True)
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
