"""Fully connected network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from trainer.core.errors import UserError

NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Module):
    """Linear, norm, ReLU, dropout for each of `hidden`, then a linear layer: (n, *input_shape) to (n, num_classes)."""

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        norm: str | None = None,
    ) -> None:
        """`norm`: batch, layer or null."""
        super().__init__()
        if norm is not None and norm not in NORMS:
            raise UserError(f"model.norm={norm} is not known", "use batch, layer or null")
        sizes = [prod(input_shape), *hidden]
        self.hidden = nn.ModuleList(_layer(before, after, dropout, norm) for before, after in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)

    def blocks(self) -> list[nn.Module]:
        """What a sharding strategy wraps one by one."""
        return list(self.hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        features = inputs.flatten(1)
        for layer in self.hidden:
            features = layer(features)
        return self.head(features)


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
