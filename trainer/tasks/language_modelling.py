"""The next token."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.tasks.base import Task, stack_sums

IGNORED = -100
"""A target that is not to be learnt or counted: padding, other people's turns."""


class LanguageModelling(Task):
    """Cross entropy of the model's (n, length, vocabulary) logits against the (n, length) next tokens.

    `val/loss` in nats a token, `val/ppl`, `val/acc` of tokens, and `val/bpb` in bits a byte where it is known how
    many bytes a token stands for: the one that can be compared between tokenizers.
    """

    primary_metric = ("val/loss", "min")

    def __init__(self, model: nn.Module, bytes_per_token: float | None = None) -> None:
        """`bytes_per_token`: of the evaluation data; null: what the data module's facts say."""
        super().__init__(model)
        self.bytes_per_token = bytes_per_token

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def setup(self, stage: str) -> None:
        facts = getattr(getattr(self.trainer, "datamodule", None), "facts", None)
        if self.bytes_per_token is None and facts is not None:
            self.bytes_per_token = facts().get("bytes_per_token")

    def on_test_epoch_end(self) -> None:
        """Beside the model's own metrics, what n-gram models reach on the same text, where the data can tell."""
        super().on_test_epoch_end()
        baselines = getattr(getattr(self.trainer, "datamodule", None), "baselines", None)
        if baselines is not None:
            self.log_dict({f"test/{name}": value for name, value in baselines("test").items()})

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self.model(batch[0]).argmax(-1)

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets = batch
        logits, flat = self.model(inputs).flatten(0, 1).float(), targets.flatten()
        loss = functional.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
        return stack_sums(loss, (logits.argmax(-1) == flat).sum(), (flat != IGNORED).sum())

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        loss = sums[0] / sums[2]
        metrics = {"loss": loss, "ppl": torch.exp(loss), "acc": sums[1] / sums[2]}
        if self.bytes_per_token:
            metrics["bpb"] = loss / log(2) / self.bytes_per_token
        return metrics
