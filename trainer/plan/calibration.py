"""Measured step times on the same hardware, and how far a roofline is from them. Imports no torch.

A record is written by `trainer time`, and read from past runs (`past.py`). A plan multiplies its roofline by the ratio
of measured to computed of the most similar jobs. The error of the result is what the ratio of each of these jobs would
have been off, had it been planned from the others.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.core.files import write_atomic
from trainer.core.paths import cache_root
from trainer.core.records import absent, dumps, read_or_skip
from trainer.plan.collectives import Traffic
from trainer.plan.roofline import Rates, step_time
from trainer.plan.work import Work

_MOST = 500
"""Records that are read: the newest."""
_LARGEST = 1e30
_SAME, _NEAR, _FAR = "the same kind of job", "the same model", "other models"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What jobs with similar ratios have in common."""

    model: str
    """`model._target_`."""
    strategy: str
    precision: str
    checkpointing: str = "none"
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measured step time: `timings/KEY.json` in the cache."""

    hardware: str
    """Name of the GPU, or the kind of CPU rank (`rates.cpu_hardware`)."""
    kind: Kind
    ranks: int
    micro_batch: int
    accumulate: int
    work: Work
    sent: list[Traffic] = field(default_factory=list)
    step_s: float
    basis: Literal["wall", "cpu", "fast"] = "wall"
    """Clock: `cpu` is the CPU time of a rank, which other processes on the machine do not change; `fast` the wall time
    of the fastest tenth of the steps."""
    steps: int
    source: str
    """trainer time, or the run."""
    save_s: float | None = absent()
    """Seconds of a save of a checkpoint."""
    save_bytes: int | None = absent()
    time: float
    """Seconds since 1970."""

    def ratio(self, rates: Rates) -> float:
        """Return measured seconds by computed seconds."""
        return self.step_s / step_time(self.work, self.sent, self.accumulate, rates).total


@dataclass(frozen=True)
class Correction:
    """The factor of a computed step time."""

    factor: float = 1.0
    error: float | None = None
    """Largest relative error of a job planned from the others; None: not known."""
    text: str = "not calibrated: trainer time measures this job"


def correction(known: Sequence[Measurement], kind: Kind, work: Work, rates: Rates) -> Correction:
    """Return the factor for a job.

    Args:
        known: Measurements on its hardware.
        kind: Its kind.
        work: Its work.
        rates: The rates of its roofline.
    """
    for label, group in _groups(known, kind):
        if not group:
            continue
        points = [(_size(one.work), one.ratio(rates)) for one in group]
        factor = _at(points, _size(work))
        error = _left_out(points)
        count = f"{len(group)} measurement{'' if len(group) == 1 else 's'}"
        return Correction(factor, error, f"calibrated by {count} of {label} on this hardware")
    return Correction()


def _groups(known: Sequence[Measurement], kind: Kind) -> list[tuple[str, list[Measurement]]]:
    return [
        (_SAME, [one for one in known if one.kind == kind]),
        (_NEAR, [one for one in known if one.kind.model == kind.model]),
        (_FAR, list(known)),
    ]


def _size(work: Work) -> float:
    passes = work.forward + work.backward
    return math.log(max(1.0, passes.flops + passes.other_bytes))


def _at(points: Sequence[tuple[float, float]], size: float) -> float:
    """Return the mean of the logarithms of the ratios, in which jobs of a similar size count more."""
    weights = [1 / (0.1 + abs(one - size)) ** 2 for one, _ in points]
    total = sum(weight * math.log(ratio) for weight, (_, ratio) in zip(weights, points, strict=True))
    return math.exp(total / sum(weights))


def _left_out(points: Sequence[tuple[float, float]]) -> float | None:
    if len(points) < 2:
        return None
    errors = []
    for index, (size, ratio) in enumerate(points):
        others = [one for place, one in enumerate(points) if place != index]
        errors.append(abs(_at(others, size) / ratio - 1))
    return max(errors) if len(errors) < 5 else statistics.quantiles(errors, n=10)[-1]


def folder() -> Path:
    """Return the folder of the records."""
    return cache_root() / "timings"


def keep(one: Measurement) -> str:
    """Write a measurement, which replaces one of the same job on the same hardware; return why it could not be kept.

    A file system that refuses is no error: the measurement was printed.
    """
    job = (one.hardware, one.kind, one.ranks, one.micro_batch, one.accumulate, round(one.work.forward.flops))
    path = folder() / f"{hashlib.sha256(repr(job).encode()).hexdigest()[:16]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, dumps(one, indent=1) + "\n")
    except OSError as error:
        return f"{path.parent}: {error.strerror}"
    return ""


def measurements(hardware: str) -> list[Measurement]:
    """Return the measurements on this hardware; a record that cannot be read is reported and left out."""
    try:
        paths = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime)[-_MOST:]
    except OSError:
        return []
    found = [read_or_skip(Measurement, path) for path in paths]
    return [one for one in found if one is not None and one.hardware == hardware and _is_possible(one)]


def _is_possible(one: Measurement) -> bool:
    """Return whether a ratio can be computed; the file may hold any numbers."""
    passes = one.work.forward, one.work.backward, one.work.update
    numbers = [one.step_s, *(number for work in passes for number in vars(work).values())]
    is_work = any(work.flops + work.other_bytes > 0 for work in passes)
    return one.step_s > 0 and is_work and all(0 <= number < _LARGEST for number in numbers)
