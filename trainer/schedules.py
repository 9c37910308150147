"""Learning rate schedules, a function of the optimizer step."""

from __future__ import annotations

from math import cos, pi

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine:
    """Factor of the learning rate: linear up to 1 over `warmup_steps`, then half a cosine down to `min_ratio`.

    Loshchilov and Hutter 2017, without restarts. A class, not a closure: LambdaLR saves its attributes.
    """

    def __init__(self, total_steps: int, warmup_steps: int, min_ratio: float) -> None:
        self.total_steps, self.warmup_steps, self.min_ratio = total_steps, warmup_steps, min_ratio

    def __call__(self, step: int) -> float:
        """`step`: optimizer steps completed, so that step 0 already trains."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        span = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + cos(pi * done))


def cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Warm-up, then a cosine down to `min_ratio` of the optimizer's rate at `total_steps`.

    A warm-up as long as the job would never reach the rate that was asked for; it is cut to a tenth of the job.
    """
    warmup = min(warmup_steps, total_steps // 10) if warmup_steps >= total_steps else warmup_steps
    return LambdaLR(optimizer, WarmupCosine(total_steps, warmup, min_ratio))


def constant(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Warm-up, then the optimizer's own rate."""
    return LambdaLR(optimizer, WarmupCosine(total_steps, warmup_steps, 1.0))
