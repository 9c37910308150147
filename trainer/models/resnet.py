"""Residual networks: He et al. 2015, "Deep Residual Learning for Image Recognition"."""

from __future__ import annotations

from collections.abc import Sequence

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
    """(n, channels, height, width) to (n, num_classes)."""

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int | None = 18,
        layers: Sequence[int] | None = None,
        block: str | None = None,
        width: int = 64,
        stem: str = "imagenet",
    ) -> None:
        """`depth`: one of `LAYERS`; null: `layers` (blocks a stage) of kind `block` (basic, bottleneck).

        `width`: channels of the first stage; each further stage doubles them and halves the picture.
        `stem`: imagenet (7x7 and pooling, a quarter of the size) or small (3x3, full size; for 32x32 pictures).
        """
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
        """What a sharding strategy wraps one by one."""
        return list(self.body)

    def init_weights(self) -> None:
        """Kaiming normal for convolutions; the last norm of each block starts at 0, so that each block starts as
        the identity (Goyal et al. 2017, section 5.1)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, (Basic, Bottleneck)):
                nn.init.zeros_(module.main[-1].get_parameter("weight"))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(self.stem(inputs)).mean((2, 3)))


class Basic(nn.Module):
    """Two 3x3 convolutions and the shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.channels = width
        self.main = nn.Sequential(
            *_convolution(before, width, 3, stride), nn.ReLU(inplace=True), *_convolution(width, width, 3)
        )
        self.shortcut = _shortcut(before, width, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.main(inputs) + self.shortcut(inputs)).relu_()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and the shortcut; the stride is in the 3x3, as everybody's ResNet-50 has it since 2016."""

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
        return (self.main(inputs) + self.shortcut(inputs)).relu_()


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
        raise UserError(f"model.block={block} is not known", "use basic or bottleneck")
    return kinds[block or "basic"], layers


def _stem(name: str, channels: int, width: int) -> nn.Sequential:
    if name == "imagenet":
        return nn.Sequential(*_convolution(channels, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
    if name == "small":
        return nn.Sequential(*_convolution(channels, width, 3), nn.ReLU(inplace=True))
    raise UserError(f"model.stem={name} is not known", "use imagenet or small")


def _convolution(before: int, after: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Without a bias, which the norm behind it would take away."""
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after)]


def _shortcut(before: int, after: int, stride: int) -> nn.Module:
    """The identity, or option B of the paper where the shape changes."""
    if before == after and stride == 1:
        return nn.Identity()
    return nn.Sequential(*_convolution(before, after, 1, stride))
