"""What a picture says, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainer.tasks.base import Task, stack_sums
from trainer.tasks.language_modelling import IGNORED


class ImageToSequence(Task):
    """Cross entropy of the next token, given the picture and the right tokens before it.

    A batch has pictures, (n, length) tokens and the (n, length) targets that follow them. `val/loss` in nats a
    token; `val/exact`, the share of pictures whose whole sequence is right when the model reads it out by itself.
    """

    primary_metric = ("val/exact", "max")

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        pictures, tokens, targets = batch
        return functional.cross_entropy(
            self.model(pictures, tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self.read_out(batch[0], batch[1][:, :1], batch[1].shape[1])

    def read_out(self, pictures: Tensor, start: Tensor, length: int) -> Tensor:
        """The (n, length) most probable tokens, one by one, after the (n, 1) tokens `start`."""
        tokens = start
        for _ in range(length):
            following = self.model(pictures, tokens)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, following), 1)
        return tokens[:, 1:]

    def _evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        pictures, tokens, targets = batch
        logits, flat = self.model(pictures, tokens).flatten(0, 1).float(), targets.flatten()
        loss = functional.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
        known = targets != IGNORED
        read = self.read_out(pictures, tokens[:, :1], tokens.shape[1])
        exact = ((read == targets) | ~known).all(1).sum()
        return stack_sums(loss, known.sum(), exact, len(targets))

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        return {"loss": sums[0] / sums[1], "exact": sums[2] / sums[3]}
