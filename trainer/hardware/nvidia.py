"""How the tables of NVIDIA's GPUs write an entry."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.hardware.device import GIB, Arithmetic, Device, Figure, Link, Reach

Peaks = Mapping[Arithmetic, float]
_OUT_OF_MEMORY = "torch's total capacity in an out-of-memory report"


def nvidia(
    name: str,
    chip: tuple[str, str, int | None],
    memory: tuple[float, str],
    bandwidth: float,
    peaks: Peaks,
    *,
    watts: float,
    document: str,
    nvlink: tuple[float, Reach] | None = None,
    pcie: str = "4 x16",
    seen: Mapping[Figure, str] | None = None,
    note: str = "",
) -> Device:
    """Return an entry.

    Args:
        name: As torch has it.
        chip: Architecture, compute capability, multiprocessors.
        memory: GiB, and where the figure is from; "": the data sheet.
        bandwidth: GB/s.
        peaks: TFLOP/s.
        watts: Board power.
        document: NVIDIA's document with all figures that name no other.
        nvlink: GB/s in both directions, and whom it reaches.
        pcie: Generation and lanes.
        seen: See `Device.seen`.
        note: What else to know.
    """
    architecture, capability, multiprocessors = chip
    gib, where = memory
    return Device(
        name,
        architecture,
        capability,
        multiprocessors,
        int(gib * GIB),
        where or document,
        bandwidth * 1e9,
        document,
        dict(peaks),
        document,
        None if nvlink is None else Link("NVLink", nvlink[0] * 1e9, nvlink[1]),
        document,
        pcie,
        watts,
        document,
        dict(seen or {}),
        note,
    )


def reported(gib: float, where: str = "") -> tuple[float, str]:
    """Return the memory in an error message of torch, and the public report with that message, if it has an address."""
    return gib, f"{_OUT_OF_MEMORY}: https://github.com/{where}" if where else f"{_OUT_OF_MEMORY} (several repositories)"


def sheet(gigabytes: float) -> tuple[float, str]:
    """Return a data sheet's memory, taken as units of 10^9 bytes, which is the smaller of the two readings."""
    return gigabytes * 1e9 / GIB, ""
