"""What a machine reached earlier: a record per host, with which later measurements are compared.

`trainer doctor` and the preflight of a job on SLURM write and read it: `~/.cache/trainer/baselines/HOST.json`. A
measurement that is clearly slower than the median of the kept ones is reported and not kept, so that a machine cannot
become slow unnoticed. Other hardware under the same name starts a new record.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.core import records
from trainer.core.files import write_atomic
from trainer.core.paths import cache_root

MOST_SAMPLES = 20
SLOWER = {"matrix": 0.85, "memory": 0.85, "host": 0.7, "all-reduce": 0.7, "cpu": 0.5, "storage": 0.3}
"""By the first word of a measurement: below this share of the median it counts as slower. GPUs keep their rate within a
few percent; a CPU, a network and a file server are shared with others."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A measurement."""

    time: float
    """Seconds since 1970."""
    value: float


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The kept measurements of a machine."""

    host: str
    hardware: str
    """What the measurements depend on: `hardware_of`."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """Measurement, such as `matrix bf16 GPU 0`, to its samples, oldest first."""

    def usual(self, name: str) -> float | None:
        """Return the median of a measurement; None if there is none yet."""
        kept = self.samples.get(name)
        return statistics.median(one.value for one in kept) if kept else None

    def slower(self, name: str, value: float) -> float | None:
        """Return the share of the usual value that this one is, if it counts as slower; else None."""
        usual = self.usual(name)
        if not usual or value >= SLOWER[name.split()[0]] * usual:
            return None
        return value / usual

    def with_measured(self, values: Mapping[str, float], now: float | None = None) -> Baseline:
        """Return the baseline with these measurements, except those that are slower."""
        at = time.time() if now is None else now
        samples = {name: list(kept) for name, kept in self.samples.items()}
        for name, value in values.items():
            if value > 0 and self.slower(name, value) is None:
                samples[name] = [*samples.get(name, []), Sample(time=at, value=value)][-MOST_SAMPLES:]
        return replace(self, samples=samples)


def hardware_of(gpus: Sequence[str]) -> str:
    """Return what the speed of a machine depends on: the names of its GPUs, or the cores of its CPU.

    Not how many of them: a job may get any part of a node.
    """
    return ", ".join(sorted(set(gpus))) or f"{os.cpu_count()} cores"


def path_of(host: str) -> Path:
    """Return the file of a host's baseline."""
    return cache_root() / "baselines" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', host)}.json"


def read(host: str, hardware: str) -> Baseline:
    """Return the baseline of a host; an empty one if there is none, or it is of other hardware or damaged."""
    kept = records.read_or_skip(Baseline, path_of(host))
    return kept if kept is not None and kept.hardware == hardware else Baseline(host=host, hardware=hardware)


def write(baseline: Baseline) -> None:
    """Write the baseline. Folders that are made have mode 0700.

    Raises:
        OSError: The cache folder cannot be written.
    """
    path = path_of(baseline.host)
    for folder in (*reversed(path.parent.parents), path.parent):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
    write_atomic(path, records.dumps(baseline, indent=1))


def of_hardware(hardware: str) -> dict[str, float]:
    """Return what machines with these GPUs usually reach: the median of all hosts, of each the slowest of its GPUs.

    Keys are those of a baseline without the number of the GPU, such as `matrix bf16`. A home folder that nodes share
    has the baselines of all of them.
    """
    try:
        paths = sorted((cache_root() / "baselines").glob("*.json"))
    except OSError:
        return {}
    hosts: dict[str, list[float]] = {}
    for path in paths:
        kept = records.read_or_skip(Baseline, path)
        if kept is None or kept.hardware != hardware:
            continue
        slowest: dict[str, float] = {}
        for name in kept.samples:
            usual, kind = kept.usual(name), name.partition(" GPU ")[0]
            if usual:
                slowest[kind] = min(usual, slowest.get(kind, usual))
        for kind, value in slowest.items():
            hosts.setdefault(kind, []).append(value)
    return {kind: statistics.median(values) for kind, values in hosts.items()}
