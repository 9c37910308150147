"""Distributed data parallel: the whole model on each rank, gradients averaged in buckets while backward runs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from trainer.config.strategy import Ddp
from trainer.strategies.blocks import prepare
from trainer.strategies.saving import WholeCheckpoints


class RunDDPStrategy(WholeCheckpoints, DDPStrategy):
    def __init__(self, options: Ddp, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.options = options

    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        prepare(self.model, self.options)
        super().setup(trainer)


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
