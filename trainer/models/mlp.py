"""Fully connected network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Literal

from torch import Tensor, nn

from trainer.core.errors import UserError

NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Module):
    """Multi-layer perceptron: `(batch, *input_shape)` to `(batch, num_classes)` logits.

    Linear, norm, ReLU and dropout for each of `hidden`, then a linear layer.

    Args:
        input_shape: Shape of a sample.
        num_classes: Number of classes.
        hidden: Sizes of the hidden layers.
        dropout: Dropout probability.
        norm: `batch`, `layer` or None.
    """

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        norm: Literal["batch", "layer"] | None = None,
    ) -> None:
        super().__init__()
        if norm is not None and norm not in NORMS:
            raise UserError(f"model.norm={norm}: unknown norm", "use batch, layer or null")
        sizes = [prod(input_shape), *hidden]
        self.hidden = nn.ModuleList(_layer(before, after, dropout, norm) for before, after in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one."""
        return list(self.hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(batch, *input_shape)` to `(batch, num_classes)` logits."""
        features = inputs.flatten(1)
        for layer in self.hidden:
            features = layer(features)
        logits: Tensor = self.head(features)
        return logits


def _layer(before: int, after: int, dropout: float, norm: str | None) -> nn.Sequential:
    linear = nn.Linear(before, after)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")  # He et al. 2015
    nn.init.zeros_(linear.bias)
    parts: list[nn.Module] = [linear]
    if norm is not None:
        parts.append(NORMS[norm](after))
    parts.append(nn.ReLU())
    if dropout:
        parts.append(nn.Dropout(dropout))
    return nn.Sequential(*parts)
