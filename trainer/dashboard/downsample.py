"""Reduce a curve to the points that a screen can show, with every extreme at its exact place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST_PIXELS = 4096


class Downsampler:
    """Keeps the first, smallest, largest and last point of each pixel: what a line through all points would paint.

    The points arrive in pieces, sorted by x. Where a pixel is split by two pieces, it keeps these points of both. A
    pixel with at most four points keeps them all, so that a curve with fewer points than that is returned unchanged.

    Args:
        start: x of the left edge.
        end: x of the right edge.
        pixels: Number of pixels between them.
        log: Whether the axis is logarithmic.
    """

    def __init__(self, start: float, end: float, pixels: int, *, log: bool = False) -> None:
        pixels = min(max(pixels, 1), MOST_PIXELS)
        if log and end > 0:
            self._edges = np.geomspace(start if start > 0 else min(1.0, end / 1e6), end, pixels + 1)[1:-1]
        else:
            self._edges = np.linspace(start, end, pixels + 1)[1:-1]
        self._kept: list[tuple[Array, Array]] = []

    def add(self, x: Array, y: Array) -> None:
        """Add points whose y is finite. Points beyond the edges belong to the outermost pixels."""
        if len(x) <= 4:
            self._kept.append((x, y))
            return
        cuts = np.searchsorted(x, self._edges, side="left")
        bounds = np.unique(np.concatenate(([0], cuts, [len(x)])))
        if 4 * (len(bounds) - 1) >= len(x):  # nearly nothing to leave out: not worth the loop
            self._kept.append((x, y))
            return
        kept = np.fromiter(_extremes(y, bounds), dtype=np.intp)
        self._kept.append((x[kept], y[kept]))

    def points(self) -> tuple[Array, Array]:
        """Return x and y of the points that were kept."""
        if not self._kept:
            return np.empty(0), np.empty(0)
        return np.concatenate([x for x, _ in self._kept]), np.concatenate([y for _, y in self._kept])


def _extremes(y: Array, bounds: NDArray[np.intp]) -> Iterator[int]:
    """Yield the indices of the first, smallest, largest and last value between each two bounds, ascending.

    A loop over pixels, because NumPy has no `argmin` over segments: 1,000 calls cost less than one more pass over ten
    million values.
    """
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if end - begin <= 4:
            yield from range(begin, end)
            continue
        part = y[begin:end]
        low, high = begin + int(part.argmin()), begin + int(part.argmax())
        yield from sorted({begin, low, high, end - 1})
