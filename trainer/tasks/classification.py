"""One label per input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from trainer.tasks.base import Task, in_float32, stack_sums

IGNORED = -100
"""Label of a sample that could not be read: ignored by the loss and the metrics. torch's own default."""


class Classification(Task):
    """Cross entropy of the model's `(batch, classes)` logits.

    Batches: inputs of any shape that the model takes, and `(batch,)` int64 classes. Metrics over every sample once:
    `val/loss` in nats, and the accuracy `val/acc`.

    Args:
        model: The network.
        label_smoothing: Label smoothing of the training loss only, so that `val/loss` stays comparable (Szegedy et al.
            2016, section 7).
    """

    primary_metric = ("val/acc", "max")

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.label_smoothing = label_smoothing

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        inputs, targets = batch
        return functional.cross_entropy(
            in_float32(self.model(inputs)), targets, ignore_index=IGNORED, label_smoothing=self.label_smoothing
        )

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the predicted classes, shape `(batch,)`."""
        predicted: Tensor = self.model(batch[0]).argmax(-1)
        return predicted

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets = batch
        logits = self.model(inputs)
        loss = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        return stack_sums(loss, (logits.argmax(-1) == targets).sum(), (targets != IGNORED).sum())

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        loss, correct, count = sums
        return {"loss": loss / count, "acc": correct / count}
