"""Read the last, lowest and highest value of each metric from `metrics.jsonl`, and later only what was appended."""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.core.files import open_regular
from trainer.runs.metrics_lines import NOT_FINITE, OWN_NAMES

_LONGEST_LINE, _MOST_BYTES = 1 << 20, 2 << 30
"""Lines behind the first 2 GB are not read."""
_MARK_BYTES = 256


@dataclass(frozen=True)
class MetricRange:
    """The values of one metric over a run. Values that are not finite are neither lowest nor highest."""

    last: float | str
    """A number, or `nan`, `inf`, `-inf`."""
    step: int
    """The step of the last value."""
    lowest: float | None = None
    lowest_step: int | None = None
    highest: float | None = None
    highest_step: int | None = None

    def best(self, mode: str) -> tuple[float, int] | None:
        """Return the best value and its step, by `min` or `max`; None if no value was finite."""
        value, step = (self.lowest, self.lowest_step) if mode == "min" else (self.highest, self.highest_step)
        return None if value is None or step is None else (value, step)


Ranges = dict[str, MetricRange]
_Growing = dict[str, list[Any]]
"""The fields of the `MetricRange` of each name."""


class RangeScan:
    """Reads a `metrics.jsonl` once, and on each further call what was appended since.

    The last line is read again each time, because its writer extends it until the step changes. A file that was
    rewound is read from its start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._growing: _Growing = {}
        self._offset = 0
        """Where the last line began."""
        self._inode = 0
        self._mark = 0
        """Checksum of the bytes before the offset."""

    def read(self) -> Ranges:
        """Return the range of each metric now; empty if there is no file."""
        try:
            file = open_regular(self._path)
        except OSError:
            self._forget()
            return {}
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset or self._checksum(file) != self._mark:
                self._forget()
                self._inode = found.st_ino
            last = self._read_on(file)
            self._mark = self._checksum(file)
        growing = {name: list(values) for name, values in self._growing.items()}
        _add(growing, last)
        return {name: MetricRange(*values) for name, values in growing.items() if name not in OWN_NAMES}

    def _read_on(self, file: BinaryIO) -> bytes:
        """Add all lines but the last complete one, which is returned. Parts of an overlong line are lines of no use."""
        file.seek(self._offset)
        last = b""
        while self._offset < _MOST_BYTES and (line := file.readline(_LONGEST_LINE)):
            if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:  # it is being written
                break
            _add(self._growing, last)
            self._offset += len(last)
            last = line
        return last

    def _checksum(self, file: BinaryIO) -> int:
        start = max(0, self._offset - _MARK_BYTES)
        file.seek(start)
        return zlib.crc32(file.read(self._offset - start))


def read_ranges(path: Path) -> Ranges:
    """Return the range of each metric in a `metrics.jsonl`."""
    return RangeScan(path).read()


def _add(growing: _Growing, text: bytes) -> None:
    try:
        line = json.loads(text)
        step = int(line.pop("step"))
        for name, value in line.items():
            _add_value(growing, name, value, step)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return


def _add_value(growing: _Growing, name: str, value: Any, step: int) -> None:
    before = growing.get(name)
    if type(value) not in (float, int):
        if not isinstance(value, str) or value not in NOT_FINITE:
            return
    elif not math.isfinite(value):
        value = str(value)
    elif before is None:
        growing[name] = [value, step, value, step, value, step]
        return
    else:
        if before[2] is None or value < before[2]:
            before[2:4] = value, step
        if before[4] is None or value > before[4]:
            before[4:6] = value, step
    if before is None:
        growing[name] = [value, step, None, None, None, None]
    else:
        before[0:2] = value, step
