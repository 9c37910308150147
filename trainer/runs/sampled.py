"""Read a curve of every metric in `metrics.jsonl` for a small plot: of a large file only parts, evenly spread."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from trainer.core.files import open_regular
from trainer.runs.metrics_lines import OWN_NAMES

WHOLE_BYTES = 4 << 20
"""Larger files are sampled."""
_PARTS, _PART_BYTES = 64, 32 << 10
_LEAST_RATES = 4

Curve = list[tuple[int, float]]
"""Steps and finite values."""


def sampled_curves(path: Path) -> dict[str, Curve]:
    """Return the values of each metric; of a file of more than 4 MB those in 64 parts of it."""
    curves: dict[str, Curve] = {}
    try:
        with open_regular(path) as file:
            for text in _lines(file):
                _add(curves, text)
    except OSError:
        return {}
    return curves


def step_seconds(curves: Mapping[str, Curve], batch_size: int | None) -> float | None:
    """Return the median seconds of a step by the logged throughput, without the first one; None: too little is logged.

    Args:
        curves: `sampled_curves` of a run.
        batch_size: Its global batch.
    """
    rates = [rate for _, rate in sorted(curves.get("train/samples_per_s", [])) if rate > 0]
    return batch_size / statistics.median(rates[1:]) if batch_size and len(rates) >= _LEAST_RATES else None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    size = os.fstat(file.fileno()).st_size
    if size <= WHOLE_BYTES:
        yield from file.read(WHOLE_BYTES).split(b"\n")
        return
    for part in range(_PARTS):
        file.seek((size - _PART_BYTES) * part // (_PARTS - 1))
        first, *lines = file.read(_PART_BYTES).split(b"\n")
        yield from [first, *lines] if part == 0 else lines  # the first one may be cut


def _add(curves: dict[str, Curve], text: bytes) -> None:
    try:
        line = json.loads(text)
        step = int(line["step"])
        values = {name: float(value) for name, value in line.items() if type(value) in (int, float)}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return
    for name, value in values.items():
        if name not in OWN_NAMES and math.isfinite(value):
            curves.setdefault(name, []).append((step, value))
