"""Plain deep convolutional networks: Simonyan and Zisserman 2014, "Very Deep Convolutional Networks"."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from trainer.core.errors import UserError

CONVOLUTIONS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Depth to the number of 3x3 convolutions in each stage: columns A, B, D and E of table 1."""


class VGG(nn.Module):
    """Plain convolutional network: `(batch, channels, height, width)` images to `(batch, num_classes)` logits.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Number of classes.
        depth: One of `CONVOLUTIONS`; None: set `convolutions`.
        convolutions: Number of convolutions in each stage.
        width: Channels of the first stage. Each further stage doubles them, up to 8 times; each ends with halving the
            height and width.
        batch_norm: Whether batch normalisation follows each convolution.
        pooled: Height and width to which the last feature map is averaged before the hidden layers.
        hidden: Sizes of the hidden linear layers.
        dropout: Dropout probability after each hidden layer.

    Raises:
        UserError: The depth is unknown, or the images are too small for the number of stages.
    """

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int | None = 16,
        *,
        convolutions: Sequence[int] | None = None,
        width: int = 64,
        batch_norm: bool = False,
        pooled: int = 7,
        hidden: Sequence[int] = (4096, 4096),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        counts = _counts(depth, convolutions)
        if min(input_shape[1:]) < 2 ** len(counts):
            raise UserError(
                f"{len(counts)} stages halve an image of {input_shape[1]}x{input_shape[2]} to nothing",
                "set model.depth=null and model.convolutions to fewer stages, [2,2,2] for one",
            )
        channels, stages = input_shape[0], []
        for stage, count in enumerate(counts):
            after = width * min(2**stage, 8)
            stages.append(_stage(channels, after, count, batch_norm))
            channels = after
        self.body = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        sizes = [channels * pooled * pooled, *hidden]
        self.hidden = nn.Sequential(
            *(nn.Sequential(nn.Linear(*pair), nn.ReLU(inplace=True), nn.Dropout(dropout)) for pair in pairwise(sizes))
        )
        self.head = nn.Linear(sizes[-1], num_classes)
        self.init_weights()

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one.

        They are the stages, and the hidden layers, which hold most weights.
        """
        return [*self.body, *self.hidden]

    def init_weights(self) -> None:
        """Initialise the weights.

        Kaiming normal for convolutions (He et al. 2015), normal with standard deviation 0.01 for linear layers.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` images to `(batch, num_classes)` logits."""
        logits: Tensor = self.head(self.hidden(self.pool(self.body(inputs)).flatten(1)))
        return logits


def _counts(depth: int | None, convolutions: Sequence[int] | None) -> Sequence[int]:
    if (depth is None) == (convolutions is None):
        raise UserError("a VGG has either model.depth or model.convolutions", "set the other one to null")
    if convolutions is not None:
        return convolutions
    if depth not in CONVOLUTIONS:
        raise UserError(f"model.depth={depth} is not a VGG", f"use one of {', '.join(map(str, CONVOLUTIONS))}")
    return CONVOLUTIONS[depth]


def _stage(before: int, after: int, count: int, batch_norm: bool) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(count):
        parts.append(nn.Conv2d(before, after, 3, padding=1))
        if batch_norm:
            parts.append(nn.BatchNorm2d(after))
        parts.append(nn.ReLU(inplace=True))
        before = after
    return nn.Sequential(*parts, nn.MaxPool2d(2))
