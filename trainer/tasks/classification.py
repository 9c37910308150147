"""One label for each input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from trainer.tasks.base import Task, stack_sums

IGNORED = -100
"""The label of a sample that could not be read: not learnt from, not counted. torch's own default."""


class Classification(Task):
    """Cross entropy of the model's (n, classes) logits; `val/loss` and `val/acc` over every sample once."""

    primary_metric = ("val/acc", "max")

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        """`label_smoothing`: of the training loss only, so that `val/loss` stays comparable."""
        super().__init__(model)
        self.label_smoothing = label_smoothing

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(
            self.model(inputs), targets, ignore_index=IGNORED, label_smoothing=self.label_smoothing
        )

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self.model(batch[0]).argmax(-1)

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets = batch
        logits = self.model(inputs)
        loss = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        return stack_sums(loss, (logits.argmax(-1) == targets).sum(), (targets != IGNORED).sum())

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        loss, correct, count = sums
        return {"loss": loss / count, "acc": correct / count}
