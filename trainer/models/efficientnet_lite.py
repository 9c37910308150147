"""EfficientNet-Lite0, for fine-tuning: small, without squeeze-and-excitation, and with published weights.

Tan and Le 2019 (arXiv:1905.11946), table 1; what its authors published as "Lite" in 2020 has ReLU6 and a fixed stem and
head. Names of the parameters are those of the published PyTorch weights.
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
"""Of the stages: blocks, kernel, stride of the first block, expansion, channels."""
STEM, HEAD = 32, 1280


class EfficientNetLite(nn.Module):
    """(n, 3 or 1, height, width) to (n, num_classes). The only channel of a grey picture stands for all three."""

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        resize: int | None = None,
        dropout: float = 0.2,
        stages: Sequence[Sequence[int]] = LITE0,
    ) -> None:
        """`resize`: pixels of a side that pictures are scaled to first: the network halves them five times, so that
        of 28 there is nothing left. Null: as they are. `stages`: as in `LITE0`."""
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
        return list(self._blocks)

    def forward(self, pictures: Tensor) -> Tensor:
        if self.resize is not None:
            pictures = functional.interpolate(
                pictures, (self.resize, self.resize), mode="bilinear", align_corners=False
            )
        if self.channels == 1:
            pictures = pictures.expand(-1, 3, -1, -1)
        hidden = functional.relu6(self._bn0(self._conv_stem(pictures)))
        for block in self._blocks:
            hidden = block(hidden)
        hidden = functional.relu6(self._bn1(self._conv_head(hidden)))
        return self._fc(self._dropout(hidden.mean((2, 3))))


class Block(nn.Module):
    """Wider by 1x1, each channel alone by `kernel`, narrower by 1x1; added to its input where the shapes agree."""

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
        hidden = inputs
        if self._expand_conv is not None and self._bn0 is not None:
            hidden = functional.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + inputs if self.is_residual else hidden


def _norm(channels: int) -> nn.BatchNorm2d:
    # Momentum 0.01, which they were trained with, would keep the statistics of photographs for a thousand steps.
    return nn.BatchNorm2d(channels, eps=1e-3)
