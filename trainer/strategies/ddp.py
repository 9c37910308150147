"""Distributed data parallel: the whole model on each rank, gradients averaged in buckets while backward runs."""

from __future__ import annotations

from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy

from trainer.config.strategy import Ddp


def build(options: Ddp, device: torch.device, timeout_s: float) -> DDPStrategy:
    """NCCL on CUDA, gloo elsewhere. No `static_graph`: ranks were reported to drift apart with it."""
    return DDPStrategy(
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        bucket_cap_mb=options.bucket_cap_mb,
        find_unused_parameters=options.find_unused_parameters,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
    )
