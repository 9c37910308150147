"""Next-token prediction."""

from __future__ import annotations

import inspect
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.tasks.base import Task, in_float32, stack_sums

IGNORED = -100
"""A target that is ignored by the loss and the metrics: padding, other speakers' turns."""


class LanguageModelling(Task):
    """Cross entropy of the model's `(batch, length, vocab_size)` logits.

    Batches: `(batch, length)` tokens and the `(batch, length)` targets one position later. Metrics: `val/loss` in nats
    per token; `val/ppl`, perplexity; `val/acc`, accuracy of tokens; and `val/bpb`, bits per byte, if the number of
    bytes per token is known: it can be compared between tokenizers.

    A network that declares `computes_loss` computes the loss itself, `model(inputs, targets)`, so that the logits of
    all positions are never in memory at once (`models/linear_cross_entropy.py`). The loss is computed in float32 in
    any precision.

    Args:
        model: The network.
        bytes_per_token: Mean over the evaluation data; None: the fact of the data module.
        chunked_loss: Whether a network that can computes the loss in chunks of positions; False: from all logits.
    """

    primary_metric = ("val/loss", "min")

    def __init__(self, model: nn.Module, bytes_per_token: float | None = None, chunked_loss: bool = True) -> None:
        super().__init__(model)
        self.bytes_per_token = bytes_per_token
        self.computes_loss = chunked_loss and _computes_loss(model)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        inputs, targets = batch
        if self.computes_loss:
            total, count, _ = self.model(inputs, targets)
            mean: Tensor = total / count
            return mean
        logits = self.model(inputs).flatten(0, 1)
        return functional.cross_entropy(in_float32(logits), targets.flatten(), ignore_index=IGNORED)

    def setup(self, stage: str) -> None:
        """Take `bytes_per_token` from the data module's facts if it is not given."""
        facts = getattr(getattr(self.trainer, "datamodule", None), "facts", None)
        if self.bytes_per_token is None and facts is not None:
            self.bytes_per_token = facts().get("bytes_per_token")

    def on_test_epoch_end(self) -> None:
        """Log the metrics, and those of n-gram models on the same text if the data module has them."""
        super().on_test_epoch_end()
        baselines = getattr(getattr(self.trainer, "datamodule", None), "baselines", None)
        if baselines is not None:
            self.log_dict({f"test/{name}": value for name, value in baselines("test").items()})

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the most probable next token at each position, shape `(batch, length)`."""
        predicted: Tensor = self.model(batch[0]).argmax(-1)
        return predicted

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets = batch
        if self.computes_loss:
            total, count, correct = self.model(inputs, targets)
            return stack_sums(total, correct, count)
        logits, flat = self.model(inputs).flatten(0, 1).float(), targets.flatten()
        loss = functional.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
        return stack_sums(loss, (logits.argmax(-1) == flat).sum(), (flat != IGNORED).sum())

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        loss = sums[0] / sums[2]
        metrics = {"loss": loss, "ppl": torch.exp(loss), "acc": sums[1] / sums[2]}
        if self.bytes_per_token:
            metrics["bpb"] = loss / log(2) / self.bytes_per_token
        return metrics


def _computes_loss(model: nn.Module) -> bool:
    """Return whether a network takes targets; the forward pass of a subclass may not."""
    declares = bool(getattr(model, "computes_loss", False))
    return declares and "targets" in inspect.signature(model.forward).parameters
