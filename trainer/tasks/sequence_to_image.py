"""Sequence to image: the image that a sequence of tokens describes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from trainer.tasks.base import Task, in_float32, stack_sums


class SequenceToImage(Task):
    """Mean squared error of the pixels.

    Batches: `(batch, length)` tokens and `(batch, channels, height, width)` images. Metrics: `val/loss`, and
    `val/explained`, the fraction of the pixels' variance that the model explains (R^2). 1 is out of reach if the
    sequence leaves something open, such as the handwriting of a digit.
    """

    primary_metric = ("val/loss", "min")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        tokens, images = batch
        return functional.mse_loss(in_float32(self.model(tokens)), in_float32(images))

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the predicted images, shape `(batch, channels, height, width)`."""
        images: Tensor = self.model(batch[0])
        return images

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        tokens, images = batch
        values = images.double()
        error = (self.model(tokens).double() - values).square().sum()
        return stack_sums(error, values.sum(), values.square().sum(), values.numel())

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        error, total, squares, count = sums
        return {"loss": error / count, "explained": 1 - error / (squares - total.square() / count)}
