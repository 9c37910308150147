"""Learning rate schedules as functions of the optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import cos, pi

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Warmup:
    """Multiplier of the learning rate: linear from `1 / warmup_steps` to 1 over `warmup_steps`, then `after(step)`.

    A callable object rather than a closure, because LambdaLR saves its attributes in checkpoints.

    Args:
        warmup_steps: Optimizer steps of the linear warmup (Goyal et al. 2017, section 2.2).
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        """Return the multiplier after `step` completed optimizer steps.

        It is above 0 at step 0, which already trains.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after(step)

    def after(self, step: int) -> float:
        """Return the multiplier at a step after the warmup."""
        return 1.0


class Decay(Warmup, ABC):
    """A warmup, then a decay from 1 to `min_ratio` at `total_steps`.

    Args:
        total_steps: Optimizer steps of the whole training.
        warmup_steps: Optimizer steps of the warmup.
        min_ratio: Final multiplier.
    """

    def __init__(self, total_steps: int, warmup_steps: int, min_ratio: float) -> None:
        super().__init__(warmup_steps)
        self.total_steps, self.min_ratio = total_steps, min_ratio

    def after(self, step: int) -> float:
        """Return the multiplier at a step after the warmup."""
        span = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        return self.min_ratio + (1 - self.min_ratio) * self.remaining(done)

    @abstractmethod
    def remaining(self, done: float) -> float:
        """Return the remaining part of the decay, from 1 to 0.

        Args:
            done: Completed fraction of the steps after the warmup.
        """


class WarmupCosine(Decay):
    """Half a cosine: `0.5 * (1 + cos(pi * done))`. Loshchilov and Hutter 2017 (SGDR), without restarts."""

    def remaining(self, done: float) -> float:
        """Return `0.5 * (1 + cos(pi * done))`."""
        return 0.5 * (1 + cos(pi * done))


class WarmupPolynomial(Decay):
    """Polynomial decay: `(1 - done) ** power`; a power of 1 is linear.

    Args:
        total_steps: Optimizer steps of the whole training.
        warmup_steps: Optimizer steps of the warmup.
        min_ratio: Final multiplier.
        power: Exponent.
    """

    def __init__(self, total_steps: int, warmup_steps: int, min_ratio: float, power: float) -> None:
        super().__init__(total_steps, warmup_steps, min_ratio)
        self.power = power

    def remaining(self, done: float) -> float:
        """Return `(1 - done) ** power`."""
        return float((1 - done) ** self.power)


class WarmupStable(Warmup):
    """Warmup-stable-decay: 1 until the last `decay_steps`, then linear. Hu et al. 2024 (MiniCPM), Hagele et al. 2024.

    Args:
        total_steps: Optimizer steps of the whole training.
        warmup_steps: Optimizer steps of the warmup.
        min_ratio: Final multiplier.
        decay_steps: Optimizer steps of the decay.
    """

    def __init__(self, total_steps: int, warmup_steps: int, min_ratio: float, decay_steps: int) -> None:
        super().__init__(warmup_steps)
        self.total_steps, self.min_ratio, self.decay_steps = total_steps, min_ratio, decay_steps

    def after(self, step: int) -> float:
        """Return the multiplier at a step after the warmup."""
        left = min(1.0, max(0, self.total_steps - step) / max(1, self.decay_steps))
        return self.min_ratio + (1 - self.min_ratio) * left


class WarmupInverseSqrt(Warmup):
    """Inverse square root: `sqrt(warmup_steps / step)`. Vaswani et al. 2017, section 5.3, scaled to 1 at its peak."""

    def after(self, step: int) -> float:
        """Return the multiplier at a step after the warmup."""
        return float((max(1, self.warmup_steps) / (step + 1)) ** 0.5)


def cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Build a warmup followed by a cosine decay to `min_ratio` of the learning rate at `total_steps`.

    A warmup as long as the training would never reach the configured learning rate; it is cut to a tenth of the
    training.
    """
    return _scheduled(optimizer, WarmupCosine(total_steps, _cut_warmup(warmup_steps, total_steps), min_ratio))


def linear(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> LambdaLR:
    """Build a warmup (cut like that of `cosine`) followed by a linear decay to `min_ratio` at `total_steps`."""
    return polynomial(optimizer, total_steps, warmup_steps, 1.0, min_ratio)


def polynomial(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, power: float = 1.0, min_ratio: float = 0.0
) -> LambdaLR:
    """Build a warmup (cut like that of `cosine`) followed by a polynomial decay to `min_ratio` at `total_steps`."""
    warmup = _cut_warmup(warmup_steps, total_steps)
    return _scheduled(optimizer, WarmupPolynomial(total_steps, warmup, min_ratio, power))


def warmup_stable_decay(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, decay_ratio: float = 0.2, min_ratio: float = 0.0
) -> LambdaLR:
    """Build a warmup (cut like that of `cosine`), a constant phase, and a linear decay to `min_ratio`.

    The decay takes the last `decay_ratio` of the steps.
    """
    warmup, decay = _cut_warmup(warmup_steps, total_steps), round(decay_ratio * total_steps)
    return _scheduled(optimizer, WarmupStable(total_steps, warmup, min_ratio, decay))


def inverse_sqrt(optimizer: Optimizer, warmup_steps: int = 0) -> LambdaLR:
    """Build a warmup followed by a decay with the inverse square root of the step, which needs no training length."""
    return _scheduled(optimizer, WarmupInverseSqrt(warmup_steps))


def constant(optimizer: Optimizer, total_steps: int = 0, warmup_steps: int = 0) -> LambdaLR:
    """Build a warmup followed by a constant learning rate. `total_steps` is ignored."""
    return _scheduled(optimizer, Warmup(warmup_steps))


def _cut_warmup(warmup_steps: int, total_steps: int) -> int:
    return min(warmup_steps, total_steps // 10) if warmup_steps >= total_steps else warmup_steps


def _scheduled(optimizer: Optimizer, factor: Callable[[int], float]) -> LambdaLR:
    return LambdaLR(optimizer, factor)
