"""Read the curves of `metrics.jsonl`: down-sampled with their extremes, or compared with those of another run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.core.files import open_regular, parse_json
from trainer.runs.metrics_lines import MOST_METRICS, NOT_FINITE, OWN_NAMES

_OF_THE_CLOCK = ("_per_s", "mfu", "_ms", "_seconds")
"""Ends of the names of metrics that differ between any two runs."""
_LONGEST_LINE, _MOST_BYTES = 1 << 22, 2 << 30
"""Lines behind the first 2 GB are not read."""
_LARGEST_STEP = 1 << 53

Point = tuple[int, float]
"""Step and value."""


@dataclass
class Bin:
    """The points of a stretch of a curve, in the order of the steps."""

    first: Point
    low: Point
    high: Point
    last: Point
    total: float
    count: int

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return self.total / self.count

    def points(self) -> list[Point]:
        """Return the first, smallest, largest and last point, each once."""
        return sorted({self.first, self.low, self.high, self.last})

    def join(self, other: Bin) -> None:
        """Add the points of the stretch that follows."""
        self.low, self.high = min(self.low, other.low, key=_value), max(self.high, other.high, key=_value)
        self.last, self.total, self.count = other.last, self.total + other.total, self.count + other.count


@dataclass
class Curve:
    """A metric over the steps in at most `2 * most` bins; extremes keep their exact step and value.

    The points are added one by one in any number, without knowing the last step: when there are too many bins, each
    two become one.
    """

    most: int
    bins: list[Bin] = field(default_factory=list)
    width: int = 1
    """Steps of a bin."""
    not_finite: int = 0
    """Number of values that were NaN or infinite."""
    first_not_finite: int | None = None
    """Step of the first of them."""

    def add(self, step: int, value: float) -> None:
        """Add a point. A step before the last one undoes the points from there on, as a resume does."""
        if self.bins and step < self.bins[-1].last[0]:
            self._rewind(step)
        point = (step, value)
        new = Bin(point, point, point, point, value, 1)
        if self.bins and self.bins[-1].first[0] // self.width == step // self.width:
            self.bins[-1].join(new)
            return
        self.bins.append(new)
        while len(self.bins) > 2 * self.most:
            self._widen()

    def _rewind(self, step: int) -> None:
        while self.bins and self.bins[-1].first[0] >= step:
            self.bins.pop()
        if self.bins and self.bins[-1].last[0] >= step:
            kept = [point for point in self.bins.pop().points() if point[0] < step]
            for at, value in kept:
                self.add(at, value)

    def _widen(self) -> None:
        self.width *= 2
        bins, self.bins = self.bins, []
        for one in bins:
            if self.bins and self.bins[-1].first[0] // self.width == one.first[0] // self.width:
                self.bins[-1].join(one)
            else:
                self.bins.append(one)

    @property
    def count(self) -> int:
        """Number of finite points."""
        return sum(one.count for one in self.bins)

    @property
    def low(self) -> Point:
        """The smallest value, at its first step."""
        return min((one.low for one in self.bins), key=_value)

    @property
    def high(self) -> Point:
        """The largest value, at its first step."""
        return max((one.high for one in self.bins), key=_value)

    @property
    def last(self) -> Point:
        """The last point."""
        return self.bins[-1].last

    def points(self) -> list[Point]:
        """Return the points that a line through all of them would show, by step."""
        return [point for one in self.bins for point in one.points()]


@dataclass
class Curves:
    """The curves of a run."""

    by_name: dict[str, Curve] = field(default_factory=dict)
    cut_at: int | None = None
    """The last step that was read before the deadline; None: all were."""


def read_curves(path: Path, most: int, deadline: float = math.inf) -> Curves:
    """Read all metrics of a `metrics.jsonl` in one pass, in memory that does not depend on its length.

    Args:
        path: The file. Lines that are damaged are left out; without a file there are no curves.
        most: Each curve has at most twice as many bins.
        deadline: When to stop reading, by `time.monotonic`.
    """
    curves = Curves()
    for number, (step, line) in enumerate(_read(path)):
        if number % 256 == 255 and time.monotonic() > deadline:
            curves.cut_at = step
            break
        for name, value in line.items():
            if name in OWN_NAMES:
                continue
            curve = curves.by_name.get(name)
            if curve is None:
                if len(curves.by_name) >= MOST_METRICS or not _is_value(value):
                    continue
                curve = curves.by_name[name] = Curve(most)
            if isinstance(value, str):
                if value in NOT_FINITE:
                    curve.not_finite += 1
                    curve.first_not_finite = step if curve.first_not_finite is None else curve.first_not_finite
            elif _is_value(value):
                curve.add(step, float(value))
    return curves


def _value(point: Point) -> float:
    return point[1]


def _is_value(value: Any) -> bool:
    return value in NOT_FINITE if isinstance(value, str) else type(value) in (int, float) and abs(value) < 1e300


def is_measured_time(name: str) -> bool:
    """Return whether a metric depends on the speed or the load of the machine."""
    return name == "time" or name.startswith(("gpu/", "system/")) or name.endswith(_OF_THE_CLOCK)


def first_difference(first: Path, second: Path) -> dict[str, Any]:
    """Compare two `metrics.jsonl` at the steps that both have, by exact values.

    Returns:
        `steps`, the number of steps compared, and where they differ also `step`, the first one, with `metrics`.
    """
    compared = 0
    others = _lines(second)
    step, other = next(others, (None, {}))
    for at, line in _lines(first):
        while step is not None and step < at:
            step, other = next(others, (None, {}))
        if step is None:
            break
        if step != at:
            continue
        compared += 1
        names = sorted(name for name in line.keys() & other.keys() if repr(line[name]) != repr(other[name]))
        if names:
            return {"steps": compared, "step": at, "metrics": names}
    return {"steps": compared}


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the values of each step, without times. Lines of one step are merged."""
    pending: tuple[int, dict[str, Any]] | None = None
    for step, line in _read(path):
        values = {name: value for name, value in line.items() if not is_measured_time(name)}
        if pending is not None and pending[0] == step:
            pending[1].update(values)
            continue
        if pending is not None:
            yield pending
        pending = step, values
    if pending is not None:
        yield pending


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the step and the other values of each line; damaged lines are left out."""
    try:
        file = open_regular(path)
    except OSError:
        return
    with file:
        while file.tell() < _MOST_BYTES and (text := file.readline(_LONGEST_LINE)):
            try:
                line = parse_json(text.decode())
                step = int(line.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                continue
            if 0 <= step < _LARGEST_STEP:
                yield step, line
