"""A tree of files as the kernel shows RAPL's counters and the packages of the CPU cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.hardware.energy import SYSFS_VARIABLE

RANGE_UJ = 262_143_328_850
"""Of Intel's server processors: 262 kJ."""


class Powercap:
    """`Powercap(tmp_path, packages={0: 4, 1: 4})`: two packages with four cores each, with memory counters."""

    def __init__(self, root: Path, packages: dict[int, int] | None = None) -> None:
        self.root = root / "sys"
        core = 0
        for package, cores in (packages or {0: 4}).items():
            zone = self.zone(package)
            (zone / f"{zone.name}:0").mkdir(parents=True)
            for folder, name in ((zone, f"package-{package}"), (zone / f"{zone.name}:0", "dram")):
                (folder / "name").write_text(f"{name}\n")
                (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
                (folder / "energy_uj").write_text("0\n")
            for _ in range(cores):
                topology = self.root / f"devices/system/cpu/cpu{core}/topology"
                topology.mkdir(parents=True)
                (topology / "physical_package_id").write_text(f"{package}\n")
                core += 1

    def zone(self, package: int) -> Path:
        return self.root / "class/powercap" / f"intel-rapl:{package}"

    @contextmanager
    def using(self, watts: float) -> Iterator[dict[str, str]]:
        """Let the counter of package 0 run; yields the environment of a job that reads it."""
        ended = threading.Event()
        began = time.monotonic()

        def count() -> None:
            while not ended.wait(0.02):
                self.set((time.monotonic() - began) * watts)

        thread = threading.Thread(target=count)
        thread.start()
        try:
            yield {SYSFS_VARIABLE: str(self.root)}
        finally:
            ended.set()
            thread.join()

    def set(self, joules: float, package: int = 0, memory_joules: float | None = None) -> None:
        """Both counters, in place as in the kernel's file: a reader never finds it empty."""
        zone = self.zone(package)
        _overwrite(zone / "energy_uj", joules)
        if memory_joules is not None:
            _overwrite(zone / f"{zone.name}:0" / "energy_uj", memory_joules)


def _overwrite(path: Path, joules: float) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(f"{round(joules * 1e6)}\n")
    temporary.replace(path)
