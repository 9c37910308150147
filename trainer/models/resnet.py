"""Residual networks: He et al. 2015, "Deep Residual Learning for Image Recognition"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from trainer.core.errors import UserError

LAYERS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
"""Depth to the kind and the number of blocks in each stage: table 1 of the paper."""


class ResNet(nn.Module):
    """Residual network: `(batch, channels, height, width)` images to `(batch, num_classes)` logits.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Number of classes.
        depth: One of `LAYERS`; None: set `layers` (and `block`).
        layers: Number of blocks in each stage.
        block: Kind of block, `basic` or `bottleneck`; None: that of `depth`, else `basic`.
        width: Channels of the first stage. Each further stage doubles them and halves the height and width.
        stem: `imagenet` (7x7 and pooling, a quarter of the size) or `small` (3x3, full size; for 32x32 images).

    Raises:
        UserError: A choice is unknown, or not exactly one of `depth` and `layers` is set.
    """

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int | None = 18,
        *,
        layers: Sequence[int] | None = None,
        block: Literal["basic", "bottleneck"] | None = None,
        width: int = 64,
        stem: Literal["imagenet", "small"] = "imagenet",
    ) -> None:
        super().__init__()
        kind, counts = _shape(depth, layers, block)
        self.stem = _stem(stem, input_shape[0], width)
        channels = width
        blocks: list[nn.Module] = []
        for stage, count in enumerate(counts):
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                made = kind(channels, width * 2**stage, stride)
                channels = made.channels
                blocks.append(made)
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)
        self.init_weights()

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one."""
        return list(self.body)

    def init_weights(self) -> None:
        """Initialise the weights: Kaiming normal for convolutions (He et al. 2015, "Delving Deep into Rectifiers").

        The last norm of each block starts at 0, so that each block starts as the identity (Goyal et al. 2017, section
        5.1).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, (Basic, Bottleneck)):
                nn.init.zeros_(module.main[-1].get_parameter("weight"))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` images to `(batch, num_classes)` logits."""
        logits: Tensor = self.head(self.body(self.stem(inputs)).mean((2, 3)))
        return logits


class Basic(nn.Module):
    """Two 3x3 convolutions and the shortcut.

    Args:
        before: Input channels.
        width: Output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.channels = width
        self.main = nn.Sequential(
            *_convolution(before, width, 3, stride), nn.ReLU(inplace=True), *_convolution(width, width, 3)
        )
        self.shortcut = _shortcut(before, width, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(batch, before, height, width)` to `(batch, channels, height / stride, width / stride)`."""
        output: Tensor = (self.main(inputs) + self.shortcut(inputs)).relu_()
        return output


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and the shortcut; the stride is in the 3x3, as in most ResNet-50s since 2016.

    Args:
        before: Input channels.
        width: Channels of the 3x3 convolution; the output has four times as many.
        stride: Stride of the 3x3 convolution.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.channels = 4 * width
        self.main = nn.Sequential(
            *_convolution(before, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, self.channels, 1),
        )
        self.shortcut = _shortcut(before, self.channels, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(batch, before, height, width)` to `(batch, channels, height / stride, width / stride)`."""
        output: Tensor = (self.main(inputs) + self.shortcut(inputs)).relu_()
        return output


def _shape(
    depth: int | None, layers: Sequence[int] | None, block: str | None
) -> tuple[type[Basic] | type[Bottleneck], Sequence[int]]:
    kinds: dict[str, type[Basic] | type[Bottleneck]] = {"basic": Basic, "bottleneck": Bottleneck}
    if depth is not None and layers is None:
        if depth not in LAYERS:
            raise UserError(f"model.depth={depth} is not a ResNet", f"use one of {', '.join(map(str, LAYERS))}")
        name, counts = LAYERS[depth]
        return kinds[block or name], counts
    if depth is not None or layers is None:
        raise UserError("a ResNet has either model.depth or model.layers", "set the other one to null")
    if (block or "basic") not in kinds:
        raise UserError(f"model.block={block}: unknown block", "use basic or bottleneck")
    return kinds[block or "basic"], layers


def _stem(name: str, channels: int, width: int) -> nn.Sequential:
    if name == "imagenet":
        return nn.Sequential(*_convolution(channels, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
    if name == "small":
        return nn.Sequential(*_convolution(channels, width, 3), nn.ReLU(inplace=True))
    raise UserError(f"model.stem={name}: unknown stem", "use imagenet or small")


def _convolution(before: int, after: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without a bias, which the norm after it would cancel, and the norm."""
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after)]


def _shortcut(before: int, after: int, stride: int) -> nn.Module:
    """Return the identity, or a projection if the shape changes (option B of the paper)."""
    if before == after and stride == 1:
        return nn.Identity()
    return nn.Sequential(*_convolution(before, after, 1, stride))
