"""Measures batches on the GPU with CUDA events, without waiting for it.

The host does not notice that its own GPU is slow: it only launches kernels, and then waits with all the other ranks.
Nor does its clock tell how long a batch takes while it is ahead of a busy GPU. So the times by which stragglers are
found are times between events on the GPU; they are read when a later batch finds that they have happened.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule

from trainer.runtime.heartbeat import DeviceBatch, Heartbeat

EVERY_N_BATCHES = 8
"""Batches between two measurements: six events and a query take about 20 us."""


class DeviceTime(Callback):
    """Appends batches to `Heartbeat.device_batches`; for a rank on CUDA.

    Args:
        heartbeat: The heartbeat of this rank.
        waits_in_forward: Whether this rank waits for others inside its forward pass. Then the time before it is
            measured, and under FSDP that of one block, from the moment at which its parameters are there.
    """

    read_only = True
    """Hooks change nothing in place, so the loop need not copy the loss for them (`train/loop_plan.py`)."""

    def __init__(self, heartbeat: Heartbeat, waits_in_forward: bool = False) -> None:
        self._heartbeat, self._waits = heartbeat, waits_in_forward
        event: Any = torch.cuda.Event  # its methods have no types
        names = ("before", "start", "block_start", "block_end", "forward_end", "end")
        self._events = {name: event(enable_timing=True) for name in names}
        self._state: Literal["idle", "before", "forward", "backward", "recorded"] = "idle"
        """The part of a batch that is being measured; `recorded`: its times have not been read."""
        self._has_block = False
        self._batches = 0
        self._hooks: list[Any] = []
        self._num_blocks = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch a block in the middle of the model, unless it is compiled: a hook would be compiled into it."""
        parts: list[Any] = [part for part in pl_module.modules() if isinstance(part, FSDPModule)]
        classes = Counter(map(type, parts))
        blocks = [part for part in parts if classes[type(part)] == max(classes.values())]
        if self._waits and blocks and not getattr(getattr(trainer.strategy, "options", None), "compile", False):
            block = blocks[len(blocks) // 2]
            self._num_blocks = len(blocks)
            # FSDP's own hook, which waits for the parameters, runs before this one.
            self._hooks = [
                block.register_forward_pre_hook(self._block_starts),
                block.register_forward_hook(self._block_ends),
            ]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching the block."""
        for hook in self._hooks:
            hook.remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the start of a batch."""
        if self._state == "before":
            self._record("start", "forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Record the end of the forward pass."""
        if self._state == "forward":
            self._record("forward_end", "backward")

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Record the end of a batch; every `EVERY_N_BATCHES` read the last measurement and begin another."""
        if self._state == "backward":
            self._record("end", "recorded")
        self._batches += 1
        if self._batches % EVERY_N_BATCHES:
            return
        if self._state == "recorded" and self._events["end"].query():
            self._read()
            self._state = "idle"
        if self._state == "idle":
            self._has_block = False
            self._record("before", "before")

    def on_train_epoch_start(self, *arguments: Any) -> None:
        """Discard a measurement that includes the end of an epoch."""
        self._discard()

    def on_validation_start(self, *arguments: Any) -> None:
        """Discard a measurement that includes a validation."""
        self._discard()

    def on_save_checkpoint(self, *arguments: Any) -> None:
        """Discard a measurement that includes a save."""
        self._discard()

    def _discard(self) -> None:
        if self._state != "recorded":
            self._state = "idle"

    def _record(self, name: str, state: Literal["before", "forward", "backward", "recorded"]) -> None:
        self._events[name].record()
        self._state = state

    def _block_starts(self, *arguments: Any) -> None:
        if self._state == "forward" and not self._has_block:
            self._events["block_start"].record()

    def _block_ends(self, *arguments: Any) -> None:
        if self._state == "forward" and not self._has_block:
            self._events["block_end"].record()
            self._has_block = True

    def _read(self) -> None:
        forward_s: float | None = self._between("start", "forward_end")
        if self._hooks:  # the whole forward pass includes waiting for other ranks
            block_s = self._between("block_start", "block_end") if self._has_block else None
            forward_s = None if block_s is None else block_s * self._num_blocks
        self._heartbeat.device_batches.append(
            DeviceBatch(
                own_s=self._between("before", "forward_end"),
                batch_s=self._between("before", "end"),
                data_s=self._between("before", "start") if self._waits else None,
                forward_s=forward_s,
            )
        )

    def _between(self, first: str, last: str) -> float:
        """Return the seconds between two events that have happened."""
        return float(self._events[first].elapsed_time(self._events[last])) / 1000
