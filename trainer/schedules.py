"""Learning rate schedules, a function of the optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Warmup:
    """Factor of the learning rate: linear up to 1 over `warmup_steps`, then `after`. LambdaLR saves the attributes of
    such an object, as it would not those of a closure."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        """`step`: optimizer steps completed, so that step 0 already trains."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after(step)

    def after(self, step: int) -> float:
        """The factor at a step behind the warm-up."""
        return 1.0


class Decay(Warmup):
    """A warm-up, then from 1 down to `min_ratio` at `total_steps`."""

    def __init__(self, total_steps: int, warmup_steps: int, min_ratio: float) -> None:
        super().__init__(warmup_steps)
        self.total_steps, self.min_ratio = total_steps, min_ratio

    def after(self, step: int) -> float:
        span = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        return self.min_ratio + (1 - self.min_ratio) * self.left(done)

    def left(self, done: float) -> float:
        """Of the way down, at the part `done` of the steps behind the warm-up: from 1 to 0."""
        raise NotImplementedError


class WarmupCosine(Decay):
    """Half a cosine. Loshchilov and Hutter 2017, without restarts."""

    def left(self, done: float) -> float:
        return 0.5 * (1 + cos(pi * done))


class WarmupPolynomial(Decay):
    """A power of what is left; 1 is a line."""

    def __init__(self, total_steps: int, warmup_steps: int, min_ratio: float, power: float) -> None:
        super().__init__(total_steps, warmup_steps, min_ratio)
        self.power = power

    def left(self, done: float) -> float:
        return float((1 - done) ** self.power)


class WarmupStable(Decay):
    """1 until the last `decay_steps`, then a line. Hu et al. 2024 (MiniCPM), Hagele et al. 2024."""

    def __init__(self, total_steps: int, warmup_steps: int, min_ratio: float, decay_steps: int) -> None:
        super().__init__(total_steps, warmup_steps, min_ratio)
        self.decay_steps = decay_steps

    def after(self, step: int) -> float:
        left = min(1.0, max(0, self.total_steps - step) / max(1, self.decay_steps))
        return self.min_ratio + (1 - self.min_ratio) * left


class WarmupInverseSqrt(Warmup):
    """sqrt(warmup_steps / step). Vaswani et al. 2017, section 5.3, scaled to 1 at its peak."""

    def after(self, step: int) -> float:
        return float((max(1, self.warmup_steps) / (step + 1)) ** 0.5)


def cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Warm-up, then a cosine down to `min_ratio` of the optimizer's rate at `total_steps`.

    A warm-up as long as the job would never reach the rate that was asked for; it is cut to a tenth of the job.
    """
    return _scheduled(optimizer, WarmupCosine(total_steps, _fitting(warmup_steps, total_steps), min_ratio))


def linear(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Warm-up (cut as `cosine`'s), then a line down to `min_ratio` of the optimizer's rate at `total_steps`."""
    return polynomial(optimizer, total_steps, warmup_steps, 1.0, min_ratio)


def polynomial(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, power: float = 1.0, min_ratio: float = 0.0
) -> LambdaLR:
    """Warm-up (cut as `cosine`'s), then `(1 - t) ** power` of the rate down to `min_ratio` at `total_steps`."""
    warmup = _fitting(warmup_steps, total_steps)
    return _scheduled(optimizer, WarmupPolynomial(total_steps, warmup, min_ratio, power))


def warmup_stable_decay(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, decay_ratio: float = 0.2, min_ratio: float = 0.0
) -> LambdaLR:
    """Warm-up (cut as `cosine`'s), the optimizer's rate, and a line down to `min_ratio` over the last part."""
    warmup, decay = _fitting(warmup_steps, total_steps), round(decay_ratio * total_steps)
    return _scheduled(optimizer, WarmupStable(total_steps, warmup, min_ratio, decay))


def inverse_sqrt(optimizer: Optimizer, warmup_steps: int = 0) -> LambdaLR:
    """Warm-up, then down with the inverse square root of the step, whatever the length of the training."""
    return _scheduled(optimizer, WarmupInverseSqrt(warmup_steps))


def constant(optimizer: Optimizer, total_steps: int = 0, warmup_steps: int = 0) -> LambdaLR:
    """Warm-up, then the optimizer's own rate. `total_steps` is not read: this one needs no length."""
    return _scheduled(optimizer, Warmup(warmup_steps))


def _fitting(warmup_steps: int, total_steps: int) -> int:
    return min(warmup_steps, total_steps // 10) if warmup_steps >= total_steps else warmup_steps


def _scheduled(optimizer: Optimizer, factor: Callable[[int], float]) -> LambdaLR:
    return LambdaLR(optimizer, factor)
