"""Lightning's precision plugins, with fixes; `precision_of` is where a run's precision is set."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from trainer.config.schema import Config
from trainer.config.strategy import DeepspeedZero1, DeepspeedZero2, DeepspeedZero3
from trainer.config.strategy_limits import LOW_MEMORY


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


def precision_note(config: Config, precision: str) -> str | None:
    """Return one line on what a true half precision gives up, and what does not; None if nothing is given up.

    DeepSpeed keeps fp32 master weights and states in any precision, and so may the optimizer.
    """
    if precision not in ("bf16-true", "16-true"):
        return None
    if isinstance(config.strategy, (DeepspeedZero1, DeepspeedZero2, DeepspeedZero3)):
        return None
    node = config.optimizer
    keeps = node.get("master_weights") or (node.get("stochastic_rounding", True) and precision == "bf16-true")
    if node.get("_target_") == LOW_MEMORY and keeps:
        return None
    bits, unscaled = (8, "") if precision == "bf16-true" else (11, ", no loss scaling")
    return (
        f"trainer.precision={precision}: no fp32 master weights, optimizer states in 16 bits{unscaled}; updates below"
        f" 2^-{bits + 1} of a weight are lost. Safe: trainer.precision=bf16-true optimizer=adamw_8bit (6 bytes per"
        " parameter, stochastic rounding), or trainer.precision=bf16-mixed (16; with optimizer=adamw_8bit 10)"
    )
