"""Distributed data parallel: the whole model on each rank, gradients averaged in buckets while backward runs."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config.strategy import Ddp
from trainer.strategies.blocks import prepare
from trainer.strategies.buffers import BuffersOfRank0, DDPWithQuietBuffers
from trainer.strategies.saving import WholeCheckpoints


class RunDDPStrategy(WholeCheckpoints, BuffersOfRank0, DDPStrategy):
    def __init__(self, options: Ddp, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.options = options
        self._broadcast_buffers = options.broadcast_buffers

    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        averages = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if averages and self._broadcast_buffers == "auto":  # each rank averages its own, and evaluates with that
            self._broadcast_buffers = "always"
        prepare(self.model, self.options)
        super().setup(trainer)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Lightning's, but with buffers that are sent when somebody reads them."""
        if self._broadcast_buffers == "always":
            return super()._setup_model(model)
        always_quiet = self._broadcast_buffers == "evaluation"
        device_ids = self.determine_ddp_device_ids()
        with torch.cuda.stream(torch.cuda.Stream()) if device_ids is not None else nullcontext():
            return DDPWithQuietBuffers(model, always_quiet=always_quiet, device_ids=device_ids, **self._ddp_kwargs)


def build(options: Ddp, device: torch.device, timeout_s: float) -> RunDDPStrategy:
    """NCCL on CUDA, gloo elsewhere. No `static_graph`: ranks were reported to drift apart with it."""
    return RunDDPStrategy(
        options,
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        bucket_cap_mb=options.bucket_cap_mb,
        find_unused_parameters=options.find_unused_parameters,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
    )
