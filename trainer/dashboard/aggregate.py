"""The mean of several runs, and a band around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Band = Literal["deviation", "error", "range"]
BANDS: tuple[Band, ...] = get_args(Band)
"""One standard deviation of the runs on each side, one standard error of the mean, the smallest and largest run."""
_MOST_EXACT = 2000
"""Up to so many different x the mean is that of the logged values; beyond, they are interpolated at each pixel."""


def aggregate(
    runs: Sequence[tuple[Array, Array]], edges: tuple[float, float], pixels: int, band: Band
) -> tuple[Array, Array, Array, Array]:
    """Return x, the mean over the runs, and the lower and upper edge of the band.

    A run counts between its first and its last point, where it is interpolated between points. The deviation is that of
    a sample (divided by n - 1), and 0 for one run.

    Args:
        runs: x and y of each run, x ascending.
        edges: The left and the right edge.
        pixels: Number of pixels between them.
        band: What the band is.
    """
    empty = np.empty(0)
    if not runs:
        return empty, empty, empty, empty
    x = np.unique(np.concatenate([one for one, _ in runs]))
    if len(x) > _MOST_EXACT:
        x = np.linspace(max(edges[0], x[0]), min(edges[1], x[-1]), max(pixels, 2))
    values = np.full((len(runs), len(x)), np.nan)
    for number, (at, y) in enumerate(runs):
        values[number] = np.interp(x, at, y, left=np.nan, right=np.nan)
    counts = np.isfinite(values).sum(axis=0)
    x, values, counts = x[counts > 0], values[:, counts > 0], counts[counts > 0]
    if not len(x):
        return empty, empty, empty, empty
    mean = np.nansum(values, axis=0) / counts
    if band == "range":
        return x, mean, np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    deviation = np.sqrt(np.nansum((values - mean) ** 2, axis=0) / np.maximum(counts - 1, 1))
    if band == "error":
        deviation = deviation / np.sqrt(counts)
    return x, mean, mean - deviation, mean + deviation
