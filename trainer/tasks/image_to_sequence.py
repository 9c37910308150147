"""Image to sequence: the tokens that an image shows, one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainer.tasks.base import Task, in_float32, stack_sums
from trainer.tasks.language_modelling import IGNORED


class ImageToSequence(Task):
    """Cross entropy of the next token, given the image and the correct tokens before it (teacher forcing).

    Batches: `(batch, channels, height, width)` images, `(batch, length)` input tokens, and the `(batch, length)`
    targets one position later. Metrics: `val/loss` in nats per token; `val/exact`, the fraction of images whose whole
    sequence is correct in greedy decoding.
    """

    primary_metric = ("val/exact", "max")

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        images, tokens, targets = batch
        logits = self.model(images, tokens).flatten(0, 1)
        return functional.cross_entropy(in_float32(logits), targets.flatten(), ignore_index=IGNORED)

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the greedily decoded tokens, shape `(batch, length)`."""
        return self.decode(batch[0], batch[1][:, :1], batch[1].shape[1])

    def decode(self, images: Tensor, start: Tensor, length: int) -> Tensor:
        """Decode greedily, one token at a time.

        Args:
            images: Tensor of shape `(batch, channels, height, width)`.
            start: First tokens of shape `(batch, 1)`.
            length: Number of tokens to decode.

        Returns:
            The most probable tokens after `start`, shape `(batch, length)`.
        """
        tokens = start
        for _ in range(length):
            next_token = self.model(images, tokens)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, next_token), 1)
        return tokens[:, 1:]

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        images, tokens, targets = batch
        logits, flat = self.model(images, tokens).flatten(0, 1).float(), targets.flatten()
        loss = functional.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
        known = targets != IGNORED
        decoded = self.decode(images, tokens[:, :1], tokens.shape[1])
        exact = ((decoded == targets) | ~known).all(1).sum()
        return stack_sums(loss, known.sum(), exact, len(targets))

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        return {"loss": sums[0] / sums[1], "exact": sums[2] / sums[3]}
