"""EfficientNet-Lite0, for fine-tuning: small, without squeeze-and-excitation, and with published weights.

Tan and Le 2019 (arXiv:1905.11946), table 1. The authors' "Lite" variant of 2020 has ReLU6 and a fixed stem and head.
Parameter names are those of the published PyTorch weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""The stages: blocks, kernel size, stride of the first block, expansion, channels."""
STEM, HEAD = 32, 1280


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: `(batch, 3 or 1, height, width)` images to `(batch, num_classes)` logits.

    A greyscale image is expanded to three equal channels.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Number of classes.
        resize: Height and width in pixels that images are scaled to first; None: not scaled. The network halves images
            five times, so that nothing is left of 28 pixels.
        dropout: Dropout probability before the last layer.
        stages: As in `LITE0`.
    """

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        resize: int | None = None,
        dropout: float = 0.2,
        stages: Sequence[Sequence[int]] = LITE0,
    ) -> None:
        super().__init__()
        self.channels, self.resize = input_shape[0], resize
        self._conv_stem = nn.Conv2d(3, STEM, 3, 2, 1, bias=False)
        self._bn0 = _norm(STEM)
        blocks: list[nn.Module] = []
        width = STEM
        for count, kernel, stride, expansion, channels in stages:
            for number in range(count):
                blocks.append(Block(width, channels, kernel, 1 if number else stride, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, HEAD, 1, bias=False)
        self._bn1 = _norm(HEAD)
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(HEAD, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one."""
        return list(self._blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(batch, channels, height, width)` images to `(batch, num_classes)` logits."""
        if self.resize is not None:
            images = functional.interpolate(images, (self.resize, self.resize), mode="bilinear", align_corners=False)
        if self.channels == 1:
            images = images.expand(-1, 3, -1, -1)
        hidden = functional.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            hidden = block(hidden)
        hidden = functional.relu6(self._bn1(self._conv_head(hidden)))
        logits: Tensor = self._fc(self._dropout(hidden.mean((2, 3))))
        return logits


class Block(nn.Module):
    """Inverted residual block: 1x1 expansion, depthwise convolution, 1x1 projection (Sandler et al. 2018, MobileNetV2).

    The input is added if the shapes agree.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Kernel size of the depthwise convolution.
        stride: Its stride.
        expansion: Hidden channels per input channel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False) if expansion > 1 else None
        self._bn0 = _norm(width) if expansion > 1 else None
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `(batch, inputs, height, width)` to `(batch, outputs, height / stride, width / stride)`."""
        hidden = inputs
        if self._expand_conv is not None and self._bn0 is not None:
            hidden = functional.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        output: Tensor = hidden + inputs if self.is_residual else hidden
        return output


def _norm(channels: int) -> nn.BatchNorm2d:
    # Momentum 0.01, as in the original training, would keep the statistics of photographs for a thousand steps.
    return nn.BatchNorm2d(channels, eps=1e-3)
