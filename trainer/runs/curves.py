"""Find the first step at which the metrics of two runs differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.core.files import open_regular, parse_json

_OF_THE_CLOCK = ("_per_s", "mfu", "_ms", "_seconds")
"""Ends of the names of metrics that differ between any two runs."""
_LONGEST_LINE, _MOST_BYTES = 1 << 22, 2 << 30
"""Lines behind the first 2 GB are not compared."""


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
    """Yield the values of each step, without times. Lines of one step are merged; damaged ones are left out."""
    pending: tuple[int, dict[str, Any]] | None = None
    try:
        file = open_regular(path)
    except OSError:
        return
    with file:
        while file.tell() < _MOST_BYTES and (text := file.readline(_LONGEST_LINE)):
            try:
                line = parse_json(text.decode())
                step = int(line.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            values = {name: value for name, value in line.items() if not is_measured_time(name)}
            if pending is not None and pending[0] == step:
                pending[1].update(values)
                continue
            if pending is not None:
                yield pending
            pending = step, values
    if pending is not None:
        yield pending
