"""Smooth a curve by an exponential moving average over all of its points, before any is left out for the screen."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LARGEST = 0.9999
_NEGLIGIBLE = 1e-12
"""Weight of the points that are left out when a smoothed curve begins in the middle."""
_SMALLEST_POWER = 1e-6
"""Blocks end before the weight of their first point is smaller: their sums would lose digits."""


class Smoother:
    """The average that TensorBoard shows, over pieces of a curve.

    `s[k] = sum over j <= k of w^(k-j) y[j] / sum over j <= k of w^(k-j)`, the exponential moving average with weight w,
    corrected for its start (Kingma and Ba, 2015, section 3).

    Args:
        weight: w, from 0 (nothing is smoothed) to `LARGEST`.
    """

    def __init__(self, weight: float) -> None:
        self.weight = min(max(weight, 0.0), LARGEST)
        self._sum = 0.0
        self._count = 0

    @property
    def history(self) -> int:
        """Number of points before a range that the average in the range depends on."""
        return 0 if self.weight == 0 else math.ceil(math.log(_NEGLIGIBLE) / math.log(self.weight))

    def __call__(self, y: Array) -> Array:
        """Return the averages at the next points, whose values are finite."""
        if self.weight == 0 or not len(y):
            return y
        sums = _decayed_sums(y, self.weight, self._sum)
        powers = np.arange(self._count + 1, self._count + len(y) + 1, dtype=np.float64)
        self._sum, self._count = float(sums[-1]), self._count + len(y)
        return sums * (1 - self.weight) / -np.expm1(powers * math.log(self.weight))


def _decayed_sums(y: Array, weight: float, before: float) -> Array:
    """Return `s[k] = weight * s[k-1] + y[k]` with `s[-1] = before`.

    By blocks, each of which is a cumulative sum of `y[j] / weight^j`; the last sum of each is carried into the next by
    the same recurrence over the blocks, whose weight is so small that two terms of it are exact.
    """
    length = max(1, min(len(y), int(math.log(_SMALLEST_POWER) / math.log(weight))))
    blocks = -(-len(y) // length)
    padded = np.zeros(blocks * length)
    padded[: len(y)] = y
    rows = padded.reshape(blocks, length)
    powers = weight ** np.arange(1, length + 1, dtype=np.float64)
    rows = np.cumsum(rows / powers, axis=1) * powers
    ends = rows[:, -1].copy()
    carried = np.concatenate(([before], ends[:-1]))
    jump = float(powers[-1])
    for _ in range(4):  # jump^4 <= 1e-24, unless there is one block only, which needs no second pass
        carried[1:] = ends[:-1] + jump * carried[:-1]
    rows += carried[:, None] * powers
    return np.asarray(rows.reshape(-1)[: len(y)])
