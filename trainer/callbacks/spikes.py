"""How far a loss lies above those before it, in robust standard deviations."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

WINDOW = 128
"""Steps whose losses are compared with."""
LEAST = 32
"""Before so many are known no loss is a spike."""
NORMAL = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution (Rousseeuw and Croux 1993)."""
SMALLEST_DEVIATION = 1e-3
"""Of the median: of losses that hardly differ none is a spike for a last digit."""


class Spikes:
    """The losses of the last good steps. `limit`: the robust z-score from which a loss is a spike."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def found(self, loss: float) -> str | None:
        """What to say of a spike, which does not become one of the losses compared with; None for a good loss."""
        if len(self.losses) >= LEAST:
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
    """The median, and the standard deviation as the median absolute deviation tells it."""
    median = statistics.median(losses)
    deviation = NORMAL * statistics.median(abs(loss - median) for loss in losses)
    return median, max(deviation, SMALLEST_DEVIATION * abs(median), 1e-12)
