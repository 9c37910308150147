"""Detects loss spikes: losses far above the recent ones, in robust standard deviations."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

WINDOW = 128
"""Number of recent losses to compare with."""
MIN_LOSSES = 32
"""With fewer recent losses, no loss is a spike."""
MAD_TO_STD = 1.4826
"""Factor from median absolute deviation to standard deviation, for a normal distribution (Rousseeuw and Croux 1993)."""
MIN_RELATIVE_DEVIATION = 1e-3
"""Smallest deviation, relative to the median: losses that hardly differ have no spikes in the last digit."""


class LossSpikes:
    """Losses of the last good steps.

    Args:
        limit: Robust z-score above which a loss is a spike.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def check(self, loss: float) -> str | None:
        """Return a description of a spike, which is not added to the recent losses; None for a good loss."""
        if len(self.losses) >= MIN_LOSSES:
            median, deviation = median_and_deviation(self.losses)
            score = (loss - median) / deviation
            if score > self.limit:
                return (
                    f"the loss is {loss:.4g}, {score:.1f} robust deviations above {median:.4g}, "
                    f"the median of {len(self.losses)} steps"
                )
        if math.isfinite(loss):
            self.losses.append(loss)
        return None


def median_and_deviation(losses: Sequence[float]) -> tuple[float, float]:
    """Return the median, and the standard deviation estimated from the median absolute deviation."""
    median = statistics.median(losses)
    deviation = MAD_TO_STD * statistics.median(abs(loss - median) for loss in losses)
    return median, max(deviation, MIN_RELATIVE_DEVIATION * abs(median), 1e-12)
