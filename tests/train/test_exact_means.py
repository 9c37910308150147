"""A mean over ranks that have evaluated unequal numbers of samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

from trainer.train import exact_means


def mean_over(shares: list[list[float]]) -> float:
    """What the first rank computes of its share (batches of 8), with Lightning's average over the ranks."""
    other_sums = [sum(share) for share in shares[1:]]
    other_counts = [len(share) for share in shares[1:]]

    def average(value: torch.Tensor, reduce_op: Any = None, group: Any = None) -> torch.Tensor:
        """As `lightning.fabric.utilities.distributed._sync_ddp` does it: in place, in the tensor's own type."""
        is_count = not value.is_floating_point() or value.dtype == torch.float64
        total = value.double() + sum(other_counts if is_count else other_sums)
        return value.copy_(total / len(shares))

    metadata = _Metadata(fx="validation_step", name="loss", reduce_fx=torch.mean)
    metadata.sync = _Sync(fn=average, _should=True)
    metric = _ResultMetric(metadata, is_tensor=True)
    for start in range(0, len(shares[0]), 8):
        batch = shares[0][start : start + 8]
        metric.update(torch.tensor(sum(batch) / len(batch)), len(batch))
    return float(metric.compute())


def test_unequal_shares_have_the_mean_of_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [[float(number) for number in range(17)], [float(number) for number in range(17, 33)]]
    expected = sum(range(33)) / 33
    monkeypatch.setattr(_ResultMetric, "compute", exact_means._original)
    assert mean_over(shares) == pytest.approx(expected * 16.5 / 16)  # Lightning's own, of whole numbers of samples
    exact_means.use_exact_means()
    assert mean_over(shares) == pytest.approx(expected)
    assert mean_over([[1.0, 2.0], [4.0, 5.0]]) == pytest.approx(3.0)
