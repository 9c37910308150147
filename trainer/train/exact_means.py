"""Exact `self.log(..., sync_dist=True)` means where ranks have evaluated unequal numbers of samples.

Lightning averages the number of samples over the ranks in an integer: 17 and 16 become 16, and the mean over the 33 is
3% too large. Its own samplers pad each rank to the same number. Here each sample is evaluated once, so the numbers may
differ.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

_original = _ResultMetric.compute


def use_exact_means() -> None:
    """Replace how a logged mean is reduced over the ranks, in this process. Local sums are unchanged."""
    if _ResultMetric.compute is _original:
        _ResultMetric.compute = _compute  # type: ignore[method-assign]


def _compute(self: Any) -> torch.Tensor:
    if not (self.is_tensor and self.meta.is_mean_reduction and self.meta.sync.should):
        return _original(self)
    value: torch.Tensor = self.meta.sync(self.value.clone())
    precise = torch.float32 if value.device.type == "mps" else torch.float64
    count: torch.Tensor = self.meta.sync(self.cumulated_batch_size.to(precise))
    return (value.to(precise) / count).to(value.dtype)
