"""Read the NVIDIA GPUs of this machine through NVML, the library of the driver that nvidia-smi uses too.

With ctypes, because the control plane has no other use for a package, and without CUDA, whose context would take memory
on each GPU. Functions and structures: https://docs.nvidia.com/deploy/nvml-api/, nvml.h of driver 580.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

LIBRARIES = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
"""The second is not on the library path of every WSL distribution."""
NOT_SUPPORTED, NO_PERMISSION, INSUFFICIENT_SIZE, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, MISMATCH = 3, 4, 7, 9, 12, 18
"""Members of nvmlReturn_t."""
_MOST_PROCESSES = 256


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class _MemoryV2(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint),
        *[(name, ctypes.c_ulonglong) for name in ("total", "reserved", "free", "used")],
    ]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class NvmlError(Exception):
    """A call of NVML failed."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function}: NVML error {code}")
        self.code = code


@dataclass(frozen=True)
class NvmlDevice:
    """A GPU, or an instance of one that is divided (MIG)."""

    index: int
    """Number of the GPU in the order of the bus, as nvidia-smi prints it."""
    uuid: str
    name: str
    used_bytes: int | None = None
    total_bytes: int | None = None
    compute: tuple[int, ...] = ()
    """Process ids with a compute context; in a container those outside of it may be missing."""
    graphics: tuple[int, ...] = ()
    instances: tuple[NvmlDevice, ...] = ()
    """Its MIG instances."""
    is_mig: bool = False
    """Whether it is divided; then only its instances can be used."""


@dataclass(frozen=True)
class NvmlReport:
    """What NVML knows of this machine."""

    devices: tuple[NvmlDevice, ...]
    lost: tuple[str, ...] = ()
    """Why GPUs were left out, one text each."""
    cuda_version: int | None = None
    """Newest CUDA version of the driver: 1000 * major + 10 * minor."""
    has_cuda_library: bool = True
    """Whether libcuda is there, which NVML does not need."""


def load() -> Any | None:
    """Return the library; None where there is none."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def read(library: Any) -> NvmlReport:
    """Return all GPUs that this process may see.

    Raises:
        NvmlError: NVML cannot be used: no driver, a library of another version, no permission.
    """
    _call(library, "nvmlInit_v2")
    try:
        count = ctypes.c_uint()
        _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        devices, lost = [], []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            try:
                _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
                devices.append(_device(library, handle, index))
            except NvmlError as error:
                lost.append(f"GPU {index}: {error}")
        version = ctypes.c_int()
        code = _try(library, "nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
        return NvmlReport(tuple(devices), tuple(lost), version.value if code == 0 else None, code != LIBRARY_NOT_FOUND)
    finally:
        _try(library, "nvmlShutdown")


def device_of(library: Any, uuid: str) -> ctypes.c_void_p | None:
    """Return the handle of the GPU with this UUID, for `load_of`; None if there is none. NVML stays initialized."""
    handle = ctypes.c_void_p()
    if _try(library, "nvmlInit_v2") != 0:
        return None
    code = _try(library, "nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
    return handle if code == 0 else None


def load_of(library: Any, handle: ctypes.c_void_p) -> tuple[float | None, float | None]:
    """Return the utilization of a GPU in percent and its power in watts; None for what the driver does not report."""
    utilization, milliwatts = _Utilization(), ctypes.c_uint()
    has_utilization = _try(library, "nvmlDeviceGetUtilizationRates", handle, ctypes.byref(utilization)) == 0
    has_power = _try(library, "nvmlDeviceGetPowerUsage", handle, ctypes.byref(milliwatts)) == 0
    return float(utilization.gpu) if has_utilization else None, milliwatts.value / 1000 if has_power else None


def energy_of(library: Any, handle: ctypes.c_void_p) -> float:
    """Return the joules that a GPU (Volta and later) has used since its driver was loaded.

    Raises:
        NvmlError: The GPU has no such counter, or is lost.
    """
    millijoules = ctypes.c_ulonglong()
    _call(library, "nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(millijoules))
    return millijoules.value / 1000


def _device(library: Any, handle: ctypes.c_void_p, index: int) -> NvmlDevice:
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    code = _try(library, "nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
    is_mig = code == 0 and current.value == 1
    used, total = _memory(library, handle)
    return NvmlDevice(
        index,
        _text(library, "nvmlDeviceGetUUID", handle),
        _text(library, "nvmlDeviceGetName", handle),
        used,
        total,
        _processes(library, "nvmlDeviceGetComputeRunningProcesses", handle),
        _processes(library, "nvmlDeviceGetGraphicsRunningProcesses", handle),
        _instances(library, handle, index) if is_mig else (),
        is_mig,
    )


def _instances(library: Any, parent: ctypes.c_void_p, index: int) -> tuple[NvmlDevice, ...]:
    most = ctypes.c_uint()
    if _try(library, "nvmlDeviceGetMaxMigDeviceCount", parent, ctypes.byref(most)) != 0:
        return ()
    found = []
    for number in range(most.value):
        handle = ctypes.c_void_p()
        where = (parent, ctypes.c_uint(number), ctypes.byref(handle))
        if _try(library, "nvmlDeviceGetMigDeviceHandleByIndex", *where) != 0:
            continue  # there is none of this number
        used, total = _memory(library, handle)
        compute = _processes(library, "nvmlDeviceGetComputeRunningProcesses", handle)
        uuid, name = (_text(library, f"nvmlDeviceGet{what}", handle) for what in ("UUID", "Name"))
        found.append(NvmlDevice(index, uuid, name, used, total, compute))
    return tuple(found)


def _memory(library: Any, handle: ctypes.c_void_p) -> tuple[int | None, int | None]:
    """Return used and total bytes. The older call counts the driver's own reserve, up to 600 MB, as used."""
    newer = _MemoryV2(version=ctypes.sizeof(_MemoryV2) | 2 << 24)
    if _try(library, "nvmlDeviceGetMemoryInfo_v2", handle, ctypes.byref(newer)) == 0:
        return int(newer.used), int(newer.total)
    older = _Memory()
    if _try(library, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(older)) == 0:
        return int(older.used), int(older.total)
    return None, None  # WSL, integrated GPUs


def _processes(library: Any, function: str, handle: ctypes.c_void_p) -> tuple[int, ...]:
    for version in ("_v3", "_v2"):
        count, processes = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
        code = _try(library, function + version, handle, ctypes.byref(count), processes)
        if code in (0, INSUFFICIENT_SIZE):
            return tuple(int(processes[number].pid) for number in range(min(count.value, _MOST_PROCESSES)))
    return ()  # not supported


def _text(library: Any, function: str, handle: ctypes.c_void_p) -> str:
    buffer = ctypes.create_string_buffer(96)
    _call(library, function, handle, buffer, ctypes.c_uint(len(buffer)))
    return buffer.value.decode(errors="replace")


def _call(library: Any, function: str, *arguments: Any) -> None:
    code = _try(library, function, *arguments)
    if code != 0:
        raise NvmlError(function, code)


def _try(library: Any, function: str, *arguments: Any) -> int:
    """Return the code of a call; that of an unknown function if this version of the library lacks it."""
    try:
        called = getattr(library, function)
    except AttributeError:
        return 13  # NVML_ERROR_FUNCTION_NOT_FOUND
    return int(called(*arguments))
