"""The state of NVIDIA's GPUs that does not show in their speed: errors, clocks, power, links. Through NVML.

Functions and constants: https://docs.nvidia.com/deploy/nvml-api/, nvml.h of driver 580.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_UNCORRECTED, _VOLATILE = 1, 0
_MOST_LINKS = 18
# nvmlClocksEventReasons
THROTTLED = {
    0x08: "slowed down by the hardware",
    0x20: "slowed down by the driver for its temperature",
    0x40: "slowed down by the hardware for its temperature",
    0x80: "slowed down by the power supply (power brake)",
}
"""Reasons for lower clocks that are faults. A power limit (0x04) and idleness (0x01) are not."""


@dataclass(frozen=True)
class GpuState:
    """The state of a GPU; None for what it, or this driver, does not report."""

    index: int
    uuid: str
    name: str
    ecc: bool | None = None
    """Whether error correction is on."""
    uncorrected: int | None = None
    """Uncorrected memory errors since the driver was loaded."""
    remap_pending: bool | None = None
    """Whether a row of the memory waits for a reset to be replaced."""
    remap_failed: bool | None = None
    persistence: bool | None = None
    throttling: int = 0
    temperature: int | None = None
    """Degrees Celsius."""
    power_limit_w: float | None = None
    link_width: tuple[int, int] | None = None
    """Lanes of the PCI bus in use, and the most that both ends have."""
    nvlinks: tuple[int, int] | None = None
    """NVLinks that are up, and those that the GPU has; None: it has none."""


def driver_version(library: Any) -> str:
    """Return the version of the driver, such as 570.86.10; empty if it is not known."""
    if _try(library, "nvmlInit_v2") != 0:
        return ""
    try:
        return _text(library, "nvmlSystemGetDriverVersion")
    finally:
        _try(library, "nvmlShutdown")


def states(library: Any) -> list[GpuState]:
    """Return the state of every GPU that this process may see; none if NVML cannot be used."""
    if _try(library, "nvmlInit_v2") != 0:
        return []
    try:
        count, found = ctypes.c_uint(), []
        _try(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if _try(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle)) == 0:
                found.append(_state(library, handle, index))
        return found
    finally:
        _try(library, "nvmlShutdown")


def throttle_reasons(library: Any, handle: Any) -> int:
    """Return the bits of `THROTTLED` that hold now."""
    reasons = ctypes.c_ulonglong()
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        if _try(library, name, handle, ctypes.byref(reasons)) == 0:
            return int(reasons.value) & sum(THROTTLED)
    return 0


def _state(library: Any, handle: Any, index: int) -> GpuState:
    ecc = _integers(library, "nvmlDeviceGetEccMode", handle, 2)
    errors = ctypes.c_ulonglong()
    counted = _try(
        library,
        "nvmlDeviceGetTotalEccErrors",
        handle,
        ctypes.c_uint(_UNCORRECTED),
        ctypes.c_uint(_VOLATILE),
        ctypes.byref(errors),
    )
    remapped = _integers(library, "nvmlDeviceGetRemappedRows", handle, 4)
    persistence = _integers(library, "nvmlDeviceGetPersistenceMode", handle, 1)
    temperature = ctypes.c_uint()
    has_temperature = _try(library, "nvmlDeviceGetTemperature", handle, ctypes.c_uint(0), ctypes.byref(temperature))
    limit = _integers(library, "nvmlDeviceGetEnforcedPowerLimit", handle, 1)
    width = _integers(library, "nvmlDeviceGetCurrPcieLinkWidth", handle, 1)
    most = _integers(library, "nvmlDeviceGetMaxPcieLinkWidth", handle, 1)
    return GpuState(
        index,
        _text(library, "nvmlDeviceGetUUID", handle),
        _text(library, "nvmlDeviceGetName", handle),
        ecc=bool(ecc[0]) if ecc else None,
        uncorrected=int(errors.value) if counted == 0 else None,
        remap_pending=bool(remapped[2]) if remapped else None,
        remap_failed=bool(remapped[3]) if remapped else None,
        persistence=bool(persistence[0]) if persistence else None,
        throttling=throttle_reasons(library, handle),
        temperature=int(temperature.value) if has_temperature == 0 else None,
        power_limit_w=limit[0] / 1000 if limit else None,
        link_width=(width[0], most[0]) if width and most else None,
        nvlinks=_nvlinks(library, handle),
    )


def _nvlinks(library: Any, handle: Any) -> tuple[int, int] | None:
    up = present = 0
    for link in range(_MOST_LINKS):
        is_up = ctypes.c_uint()
        if _try(library, "nvmlDeviceGetNvLinkState", handle, ctypes.c_uint(link), ctypes.byref(is_up)) == 0:
            present += 1
            up += is_up.value == 1
    return (up, present) if present else None


def _integers(library: Any, function: str, handle: Any, count: int) -> list[int]:
    """Return the unsigned integers that a function writes through pointers; empty if it fails."""
    values = [ctypes.c_uint() for _ in range(count)]
    code = _try(library, function, handle, *map(ctypes.byref, values))
    return [int(value.value) for value in values] if code == 0 else []


def _text(library: Any, function: str, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(96)
    code = _try(library, function, *arguments, buffer, ctypes.c_uint(len(buffer)))
    return buffer.value.decode(errors="replace") if code == 0 else ""


def _try(library: Any, function: str, *arguments: Any) -> int:
    """Return the code of a call; that of an unknown function if this version of the library lacks it."""
    try:
        called = getattr(library, function)
    except AttributeError:
        return 13  # NVML_ERROR_FUNCTION_NOT_FOUND
    return int(called(*arguments))
