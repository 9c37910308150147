"""The axes of a chart: where the marks are, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MOST_DECADES = 40


@dataclass(frozen=True)
class Scale:
    """Maps values to a stretch of pixels, in equal steps or by their logarithm."""

    low: float
    high: float
    begin: float
    """Pixel of `low`."""
    end: float
    """Pixel of `high`."""
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self._inner(self.low), self._inner(self.high)
        share = (self._inner(value) - low) / (high - low) if high > low else 0.5
        return self.begin + share * (self.end - self.begin)

    def _inner(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, about: int) -> list[float]:
        """Return round values between the ends."""
        return _log_ticks(self.low, self.high, about) if self.log else _linear_ticks(self.low, self.high, about)


def covering(values: list[float], begin: float, end: float, *, log: bool = False) -> Scale:
    """Return a scale that shows all values, with a margin; equal ones are in its middle."""
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.05 if high > low else 1.5
        return Scale(low / margin, high * margin, begin, end, log=True)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, begin, end)


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low] if math.isfinite(low) else []
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if span / (factor * power) <= about), 10 * power)
    first = math.ceil(low / step)
    count = int(math.floor(high / step) - first) + 1
    return [round((first + number) * step, 12 - math.floor(math.log10(step))) for number in range(min(count, 20))]


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    if len(decades) >= 2:
        every = max(1, math.ceil(min(len(decades), _MOST_DECADES * 16) / about))
        return [10.0**decade for decade in decades if decade % every == 0]
    factors = [factor * 10.0**decade for decade in range(decades.start - 1, decades.stop + 1) for factor in (1, 2, 5)]
    return [value for value in factors if low <= value <= high] or _linear_ticks(low, high, about)


def short(value: float) -> str:
    """Return the text of a mark: `1.5k`, `20M`, `0.05`, `3e-5`."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            divisor = 1e3 if unit == "k" else limit
            return f"{value / divisor:.4g}{unit}" if size < 1e15 else f"{value:.1e}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.2g}".replace("e-0", "e-")
