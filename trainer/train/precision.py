"""Precision plugins of Lightning with what has to be mended."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from trainer.config.schema import Config
from trainer.config.strategy import DeepspeedZero1, DeepspeedZero2, DeepspeedZero3


class BFloat16Mixed(MixedPrecision):
    """`bf16-mixed`, which clips the gradients of fused optimizers, too.

    Lightning refuses to: a fused optimizer unscales the gradients in its step, after the clipping. But bf16-mixed has
    no loss scaling, so there is nothing to unscale.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.0/src/lightning/pytorch/plugins/precision/amp.py#L107
    `tests/train/test_precision.py` fails once Lightning clips them.
    """

    def __init__(self, device: Literal["cpu", "cuda"]) -> None:
        super().__init__("bf16-mixed", device)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip as in any precision without loss scaling."""
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)


def precision_of(config: Config, device: torch.device) -> str:
    """Resolve `trainer.precision`; `auto` is bf16-mixed on a GPU with bf16 in hardware, else 32-true."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bf16 else "32-true"


def precision_plugins(config: Config, device: torch.device) -> list[Precision]:
    """Return our plugin if it replaces Lightning's; DeepSpeed has its own plugins."""
    has_own = isinstance(config.strategy, (DeepspeedZero1, DeepspeedZero2, DeepspeedZero3))
    if has_own or precision_of(config, device) != "bf16-mixed":
        return []
    return [BFloat16Mixed("cuda" if device.type == "cuda" else "cpu")]
