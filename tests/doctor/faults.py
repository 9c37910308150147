"""How the tables of faults are written."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.doctor.machine import Nvml, healthy, write
from trainer.doctor.finding import Status
from trainer.doctor.probe import Probe
from trainer.hardware.baseline import Baseline, Sample

Broken = Callable[[Path], Probe]


@dataclass(frozen=True)
class Fault:
    """A machine with a fault, and what must be said of it."""

    check: str
    name: str
    machine: Broken
    status: Status
    text: str
    fix: str


def fault(check: str, name: str, status: Status, text: str, fix: str, **changes: Any) -> Fault:
    """A healthy machine with some fields of its probe changed."""
    return Fault(check, name, lambda root: healthy(root, **changes), status, text, fix)


def with_file(check: str, name: str, status: Status, text: str, fix: str, **files: str) -> Fault:
    """A healthy machine with the content of files changed; `__` stands for `/` in their names."""

    def machine(root: Path) -> Probe:
        probe = healthy(root)
        for path, content in files.items():
            write(root, path.replace("__", "/"), content)
        return probe

    return Fault(check, name, machine, status, text, fix)


def with_variables(check: str, name: str, status: Status, text: str, fix: str, **variables: str) -> Fault:
    """A healthy machine with other environment variables."""
    return Fault(
        check,
        name,
        lambda root: replace(healthy(root), environment={**healthy(root).environment, **variables}),
        status,
        text,
        fix,
    )


def nvml(**gpu: Any) -> dict[str, Any]:
    """The change of a probe whose second GPU reports something else."""
    return {"library": Nvml([{}, gpu])}


def used(kind: str, **values: float) -> Baseline:
    """A baseline with one sample of each measurement."""
    names = {name.replace("__", " "): value for name, value in values.items()}
    return Baseline(
        host="node1", hardware=kind, samples={name: [Sample(time=1.0, value=value)] for name, value in names.items()}
    )


def limits(**changed: int) -> Callable[[int], tuple[int, int]]:
    """A stand-in for `getrlimit` with other limits."""
    values = {getattr(resource, f"RLIMIT_{name}"): value for name, value in changed.items()}
    return lambda which: (values.get(which, 1 << 40), 1 << 20)
