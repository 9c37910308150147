"""What the x axis of a curve can be: each is a function of the step and the time, and grows with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
AxisName = Literal["step", "time", "date", "epoch", "samples", "tokens"]
NAMES: tuple[AxisName, ...] = get_args(AxisName)
_LARGEST = 1e300


@dataclass(frozen=True)
class Axis:
    """An x axis of one run."""

    name: AxisName
    scale: float = 1.0
    """Samples or tokens of a step."""
    origin: float = 0.0
    """Time of the first line, of the axis `time`."""
    knots: list[list[float]] = field(default_factory=list)
    """Of the axis `epoch`: steps, and the number of epochs completed at each."""

    def of(self, steps: Array, times: Array) -> Array:
        """Return x of points, in the unit of the axis: steps, seconds, epochs, samples, tokens."""
        if self.name == "date":
            return times
        if self.name == "time":
            return times - self.origin
        if self.name == "epoch":
            return np.asarray(np.interp(steps, self.knots[0], self.knots[1]))
        return steps * self.scale


def is_drawable(x: Array) -> NDArray[np.bool_]:
    """Return which x can be drawn: a line may have no time, or a step so large that differences are infinite."""
    drawable: NDArray[np.bool_] = np.abs(x) <= _LARGEST
    return drawable


def axis_of(name: AxisName, row: dict[str, Any], epochs: list[list[float]], first_time: float | None) -> Axis | None:
    """Return the axis of a run; None if the run did not record what it needs.

    Args:
        name: The axis.
        row: The row of the run (`rows.py`).
        epochs: `[epoch, last step of it]`, as `CurveFile.epochs`.
        first_time: Time of its first line.
    """
    if name == "time":
        return None if first_time is None else Axis(name, origin=first_time)
    if name == "epoch":
        knots = _knots(epochs)
        return Axis(name, knots=knots) if knots else None
    if name in ("samples", "tokens"):
        scale = row.get("batch_size")
        if name == "tokens" and scale:
            per_sample = tokens_per_sample(row.get("metrics") or {})
            scale = scale * per_sample if per_sample else None
        return Axis(name, scale=float(scale)) if scale else None
    return Axis(name)


def tokens_per_sample(metrics: dict[str, Any]) -> int | None:
    """Return the length of a sequence, which follows from the two throughputs of a run on text."""
    tokens, samples = metrics.get("train/tokens_per_s"), metrics.get("train/samples_per_s")
    if not isinstance(tokens, (int, float)) or not isinstance(samples, (int, float)) or samples <= 0:
        return None
    return round(tokens / samples) or None


def _knots(epochs: list[list[float]]) -> list[list[float]]:
    """Return steps and epochs completed at them; the length of the last epoch, which may not be over, as the longest.

    The last line of an epoch is that of the validation after its last step.
    """
    if not epochs:
        return []
    steps, done = [0.0], [min(epochs[0][0], 0.0)]
    longest = 0.0
    for epoch, last in epochs[:-1]:
        longest = max(longest, (last - steps[-1]) / max(epoch + 1 - done[-1], 1.0))
        steps.append(last)
        done.append(epoch + 1)
    epoch, last = epochs[-1]
    begun = last - steps[-1]
    share = min(1.0, begun / longest) if longest else 1.0
    if begun > 0:
        steps.append(last)
        done.append(max(done[-1], epoch + share))
    return [steps, done]
