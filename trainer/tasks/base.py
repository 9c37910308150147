"""What the tasks share: sums over an evaluation, reduced over the ranks once at its end."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed, nn


class Task(LightningModule):
    """A network and its loss. The optimizer is the configuration's.

    A subclass gives `training_step`; `_evaluate(batch)`, the (k,) float64 sums of a batch; and
    `_metrics(sums)`, the values of the whole evaluation. Sums of numerators and counts, rather than means of
    batches, are exact however unequal the batches and the shares of the ranks are.
    """

    primary_metric = ("val/loss", "min")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.step_metrics: dict[str, Tensor] = {}
        """Training metrics beside the loss, detached; read on steps that are logged."""
        self._sums: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._add(batch)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._add(batch)

    def on_validation_epoch_start(self) -> None:
        self._sums = None

    def on_test_epoch_start(self) -> None:
        self._sums = None

    def on_validation_epoch_end(self) -> None:
        self._log_sums("val")

    def on_test_epoch_end(self) -> None:
        self._log_sums("test")

    def _add(self, batch: tuple[Tensor, ...]) -> None:
        sums = self._evaluate(batch)
        self._sums = sums if self._sums is None else self._sums + sums

    def _log_sums(self, stage: str) -> None:
        """The only collective of an evaluation, after every rank has read all its batches."""
        if self._sums is None:
            return
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._sums)
        self.log_dict({f"{stage}/{name}": value for name, value in self._metrics(self._sums).items()})

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


def stack_sums(*sums: Tensor | int) -> Tensor:
    """float64, in which counts are exact up to 2^53; on the device of the first."""
    device = next(number.device for number in sums if isinstance(number, Tensor))
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in sums])
