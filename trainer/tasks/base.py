"""Base class of the tasks: sums over an evaluation, reduced over the ranks once at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed, nn

_HALVES = (torch.bfloat16, torch.float16)


class Task(LightningModule, ABC):
    """A network and its loss. The optimizer comes from the config.

    A subclass implements `training_step`, `_evaluate` and `_metrics`. Sums of numerators and counts, rather than means
    of batches, are exact however unequal the batches and the ranks' shares are.

    Args:
        model: The network.
    """

    primary_metric = ("val/loss", "min")
    """Name of the metric that checkpoints and sweeps compare by default, and whether `min` or `max` is better."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.step_metrics: dict[str, Tensor] = {}
        """Training metrics besides the loss, detached; read only on steps that are logged."""
        self._sums: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output of the network."""
        output: Tensor = self.model(*inputs)
        return output

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Add the sums of a batch."""
        self._add(batch)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Add the sums of a batch."""
        self._add(batch)

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._sums = None

    def on_test_epoch_start(self) -> None:
        """Reset the sums."""
        self._sums = None

    def on_validation_epoch_end(self) -> None:
        """Log the metrics as `val/NAME`."""
        self._log_sums("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics as `test/NAME`."""
        self._log_sums("test")

    def _add(self, batch: tuple[Tensor, ...]) -> None:
        sums = self._evaluate(batch)
        self._sums = sums if self._sums is None else self._sums + sums

    def _log_sums(self, stage: str) -> None:
        """Reduce the sums and log the metrics.

        The only collective of an evaluation, after all batches of every rank.
        """
        if self._sums is None:
            return
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._sums)
        self.log_dict({f"{stage}/{name}": value for name, value in self._metrics(self._sums).items()})

    @abstractmethod
    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the float64 sums of a batch, shape `(sums,)`."""

    @abstractmethod
    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        """Return the metrics of the whole evaluation from its sums, shape `(sums,)`."""


def stack_sums(*sums: Tensor | int) -> Tensor:
    """Stack sums and counts to a float64 tensor of shape `(sums,)`, on the device of the first tensor.

    float64 holds counts exactly up to 2^53.
    """
    device = next(value.device for value in sums if isinstance(value, Tensor))
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in sums])


def in_float32(output: Tensor) -> Tensor:
    """Return an output of a network in float32, in which losses are computed; in float64 if it has that.

    The output is in bfloat16 under `bf16-true` and under DeepSpeed, which have no autocast that would convert it.
    """
    return output.float() if output.dtype in _HALVES else output
