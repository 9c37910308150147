"""Parse lines of `metrics.jsonl` into columns."""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.runs.metrics_lines import MOST_METRICS, NOT_FINITE, OWN_NAMES

Array = NDArray[np.float64]
LONGEST_NAME = 300


@dataclass
class Columns:
    """The points of the metrics of a part of a run."""

    metrics: dict[str, tuple[array[float], array[float], array[float]]] = field(default_factory=dict)
    """Steps, times and values by metric."""
    epochs: list[list[float]] = field(default_factory=list)
    """`[epoch, last step of it]`, ascending."""
    first_time: float | None = None
    last_step: float = -math.inf
    last_time: float = -math.inf
    rewound_to: float = math.inf
    """The smallest step that came again: earlier points from there on were undone."""

    def add(self, line: dict[str, Any]) -> None:
        """Add the values of a line. One without a step is left out, as is a value that is no number."""
        step, time, epoch = _number(line.get("step")), _number(line.get("time")), _number(line.get("epoch"))
        if step is None or not math.isfinite(step):
            return
        if step < self.last_step:
            self._rewind(step)
        self.last_step = step
        # A clock that was set back must not turn the curve back.
        self.last_time = max(self.last_time, time if time is not None and math.isfinite(time) else -math.inf)
        if self.first_time is None and math.isfinite(self.last_time):
            self.first_time = self.last_time
        if epoch is not None and math.isfinite(epoch):
            self._add_epoch(epoch, step)
        for name, value in line.items():
            if name not in OWN_NAMES and (number := _number(value)) is not None:
                self._add(name, step, number)

    def _add(self, name: str, step: float, value: float) -> None:
        columns = self.metrics.get(name)
        if columns is None:
            if len(self.metrics) >= MOST_METRICS or len(name) > LONGEST_NAME:
                return
            columns = self.metrics[name] = array("d"), array("d"), array("d")
        steps, times, values = columns
        if steps and steps[-1] == step:  # two lines of a step: the later value counts
            times[-1], values[-1] = self.last_time, value
            return
        steps.append(step)
        times.append(self.last_time)
        values.append(value)

    def _add_epoch(self, epoch: float, step: float) -> None:
        if self.epochs and epoch <= self.epochs[-1][0]:
            self.epochs[-1][1] = max(self.epochs[-1][1], step)
        else:
            self.epochs.append([epoch, step])

    def _rewind(self, step: float) -> None:
        """Drop what was logged at `step` and later: a resume logs these steps again."""
        self.rewound_to = min(self.rewound_to, step)
        for columns in self.metrics.values():
            keep = bisect_left(columns[0], step)
            for column in columns:
                del column[keep:]
        self.epochs = [[epoch, last] for epoch, last in self.epochs if last < step]

    def arrays(self, name: str) -> tuple[Array, Array, Array]:
        """Return steps, times and values of a metric."""
        columns = self.metrics.get(name, (array("d"),) * 3)
        steps, times, values = (np.array(column, dtype=np.float64) for column in columns)
        return steps, times, values

    def __len__(self) -> int:
        return sum(len(values) for _, _, values in self.metrics.values())


def parse_lines(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of the lines; a damaged line is left out.

    All lines at once take half the time of one by one, which is left for a part with a damaged line.
    """
    try:
        parsed = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        yield from _one_by_one(lines)
        return
    yield from (one for one in parsed if isinstance(one, dict))


def _one_by_one(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict):
            yield parsed


def _number(value: Any) -> float | None:
    if type(value) is float:
        return value
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return None
    return NOT_FINITE.get(value) if isinstance(value, str) else None
