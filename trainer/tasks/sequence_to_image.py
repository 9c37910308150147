"""A picture of what a sequence says."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from trainer.tasks.base import Task, stack_sums


class SequenceToImage(Task):
    """Mean squared error of the pixels. A batch has (n, length) tokens and their pictures.

    `val/loss`, and `val/explained`: the share of the pixels' variance that the drawing explains. 1 is out of reach
    where the sequence leaves something open, such as the hand that wrote a digit.
    """

    primary_metric = ("val/loss", "min")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, pictures = batch
        return functional.mse_loss(self.model(tokens), pictures)

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        tokens, pictures = batch
        values = pictures.double()
        error = (self.model(tokens).double() - values).square().sum()
        return stack_sums(error, values.sum(), values.square().sum(), values.numel())

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        error, total, squares, count = sums
        return {"loss": error / count, "explained": 1 - error / (squares - total.square() / count)}
