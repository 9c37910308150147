"""Energy counters of a node: what the devices of a job have used, as the hardware itself counts it.

- GPUs: NVML's total energy, on Volta and later.
- CPU packages and their memory: RAPL, from the kernel's files in /sys/class/powercap
  (https://docs.kernel.org/power/powercap/powercap.html). Most systems let only root read them, since 5.10:
  CVE-2020-8694. A package counts for all of its cores; a job gets the share of the cores that it may use.

A device without a counter is not measured, and the reason is kept. Nothing is estimated from a nominal power.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.core import nvml
from trainer.core.gpu import Gpu
from trainer.core.gpus import inventory
from trainer.core.hardware import usable_cores
from trainer.core.nvml import NvmlError

Part = Literal["gpu", "cpu", "memory"]
SYSFS_VARIABLE = "TRAINER_SYSFS"
"""Where /sys of the host is mounted in a container that hides its powercap files."""
_POWERCAP, _CPUS = "class/powercap", "devices/system/cpu"


@dataclass
class Counter:
    """A counter of joules that only grows, until it starts again from 0."""

    part: Part
    name: str
    """Of the device, for messages."""
    read: Callable[[], float]
    """Returns joules since an unknown start; raises OSError, ValueError or NvmlError."""
    range_j: float | None = None
    """The value after which the counter starts again from 0; None: it does so at a reload of the driver only."""
    share: float = 1.0
    """The share of the job in what is counted."""
    last: float | None = None
    """The value that was read last."""

    def used(self) -> float:
        """Return the joules of the job since the last call: 0 at the first one, and where the counter cannot be read.

        A counter that cannot be read now may be later: then what it counted meanwhile is returned.
        """
        try:
            value = self.read()
        except (OSError, ValueError, NvmlError):
            return 0.0
        before, self.last = self.last, value
        if before is None or not math.isfinite(value):
            return 0.0
        if value < before:
            # Of a counter that was reset it is not known how far it had come.
            return 0.0 if self.range_j is None else max(0.0, value + self.range_j - before) * self.share
        return (value - before) * self.share


@dataclass
class Counters:
    """The counters of a job on this node, and what has none."""

    counters: list[Counter] = field(default_factory=list)
    missing: dict[Part, str] = field(default_factory=dict)
    """Why a part, or some of its devices, are not measured."""

    def measured(self, part: Part) -> int:
        """Return the number of counters of a part."""
        return sum(counter.part == part for counter in self.counters)

    def used(self) -> dict[Part, float]:
        """Return the joules of each part since the last call."""
        joules: dict[Part, float] = {}
        for counter in self.counters:
            joules[counter.part] = joules.get(counter.part, 0.0) + counter.used()
        return joules


def counters_of(
    num_gpus: int,
    environment: Mapping[str, str] = os.environ,
    *,
    library: Any | None = None,
    sysfs: Path | None = None,
    cores: Iterable[int] | None = None,
) -> Counters:
    """Return the counters of the devices of a job on this node. Each was read once.

    Args:
        num_gpus: Number of GPUs that the job uses: the first that its environment shows; 0: a job on CPUs.
        environment: The environment of the job.
        library: NVML; None: that of this machine.
        sysfs: Root of the files of the kernel; None: TRAINER_SYSFS, or /sys.
        cores: Numbers of the CPU cores that the job may use; None: the affinity of this process.
    """
    found = Counters()
    sysfs = sysfs or Path(environment.get(SYSFS_VARIABLE) or "/sys")
    if num_gpus:
        _add_gpus(found, num_gpus, environment, library)
    _add_packages(found, environment, sysfs, cores)
    found.used()  # the values from which they count
    return found


def _add_gpus(found: Counters, num_gpus: int, environment: Mapping[str, str], library: Any | None) -> None:
    gpus = inventory(environment, library=library).gpus[:num_gpus]
    library = library or nvml.load()
    problems = [] if len(gpus) == num_gpus else [f"{len(gpus)} of {num_gpus} GPUs were found"]
    for gpu in gpus:
        counter = _gpu_counter(gpu, library)
        if isinstance(counter, Counter):
            found.counters.append(counter)
        else:
            problems.append(f"GPU {gpu}: {counter}")
    if problems:
        found.missing["gpu"] = "; ".join(problems)


def _gpu_counter(gpu: Gpu, library: Any | None) -> Counter | str:
    """Return the counter of a GPU, or why it has none."""
    if gpu.kind == "rocm":
        return "this release reads no counters of AMD GPUs"
    if gpu.is_mig:
        return "a MIG instance has no counter of its own"
    handle = nvml.device_of(library, gpu.uuid) if library is not None and gpu.uuid else None
    if handle is None:
        return "NVML does not show it"
    counter = Counter("gpu", str(gpu), functools.partial(nvml.energy_of, library, handle))
    try:
        counter.read()
    except NvmlError as error:
        return f"{gpu.name} has no energy counter" if error.code == nvml.NOT_SUPPORTED else str(error)
    return counter


def _add_packages(
    found: Counters, environment: Mapping[str, str], sysfs: Path, cores: Iterable[int] | None = None
) -> None:
    """Add the counters of the CPU packages that have cores of the job, and of their memory."""
    package_of = _packages(sysfs)
    own = set(os.sched_getaffinity(0) if cores is None else cores)
    used = {package for core, package in package_of.items() if core in own}
    in_them = sum(package in used for package in package_of.values())
    usable = usable_cores(environment) if cores is None else len(own)
    share = min(1.0, usable / in_them) if in_them else 1.0
    zones = [zone for zone in _zones(sysfs) if not used or _number(zone) in used]
    if not zones:
        found.missing["cpu"] = f"no RAPL counters in {sysfs / _POWERCAP}"
        return
    for zone in zones:
        memory = [inner for inner in sorted(zone.glob(f"{zone.name}:*")) if _name(inner) == "dram"]
        folders: list[tuple[Part, Path]] = [("cpu", zone), *(("memory", inner) for inner in memory)]
        for part, folder in folders:
            try:
                found.counters.append(_rapl_counter(part, folder, share))
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                found.missing.setdefault(part, f"{folder / 'energy_uj'}: {reason}")


def _rapl_counter(part: Part, zone: Path, share: float) -> Counter:
    path = zone / "energy_uj"
    _joules(path)
    try:
        range_j = _joules(zone / "max_energy_range_uj")
    except (OSError, ValueError):
        range_j = None
    return Counter(part, _name(zone), functools.partial(_joules, path), range_j, share)


def _joules(path: Path) -> float:
    return int(path.read_text()) / 1e6


def _packages(sysfs: Path) -> dict[int, int]:
    """Return the package of each CPU core."""
    found = {}
    for path in (sysfs / _CPUS).glob("cpu[0-9]*/topology/physical_package_id"):
        try:
            found[int(path.parts[-3][3:])] = int(path.read_text())
        except (OSError, ValueError):  # switched off
            continue
    return found


def _zones(sysfs: Path) -> list[Path]:
    """Return the folder of each package, or of each die of it. `psys` and `intel-rapl-mmio` count the same again."""
    zones = sorted((sysfs / _POWERCAP).glob("intel-rapl:[0-9]*"))
    return [zone for zone in zones if zone.name.count(":") == 1 and _name(zone).startswith("package-")]


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except (OSError, ValueError):
        return ""


def _number(zone: Path) -> int | None:
    """Return N of the zone `package-N` or `package-N-die-M`."""
    number = _name(zone).split("-")[1]
    return int(number) if number.isdigit() else None
