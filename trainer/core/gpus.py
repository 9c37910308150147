"""The GPUs that a process started from here may use, who uses them now, and why one that is there cannot be used.

Without torch, which the control plane never imports: NVIDIA's GPUs from NVML, AMD's from the kernel's own table (the
source of ROCm's tools as well), and device files where a container or an integrated GPU has neither.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.core import nvml
from trainer.core.amd import amd_gpus
from trainer.core.errors import EnvironmentFault
from trainer.core.gpu import Gpu, hold_of
from trainer.core.nvml import NvmlDevice, NvmlError, NvmlReport

ON_CPU = "or write resources.gpus=0 to train on CPU"
_ROOT = Path("/")
_MIG_NOTE = "CUDA shows a process one MIG instance only"


@dataclass(frozen=True)
class TorchBuild:
    """For which GPUs the installed torch is built."""

    kind: Literal["cuda", "rocm", "cpu"]
    version: str = ""
    """Of CUDA or ROCm, such as 13.0."""


@dataclass(frozen=True)
class Inventory:
    """The GPUs of this machine, as far as the environment lets a process use them."""

    gpus: tuple[Gpu, ...] = ()
    """In the order of CUDA, if all are used."""
    problem: EnvironmentFault | None = None
    """Why there are none although this machine has some."""
    is_chosen: bool = False
    """Whether the environment names them (CUDA_VISIBLE_DEVICES)."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""

    @property
    def most(self) -> int:
        """The largest number of processes that can each use one of them: MIG instances cannot be used together."""
        whole = sum(not gpu.is_mig for gpu in self.gpus)
        return whole or min(1, len(self.gpus))


def inventory(
    environment: Mapping[str, str] = os.environ,
    root: Path = _ROOT,
    library: Any | None = None,
    build: TorchBuild | None = None,
) -> Inventory:
    """Return the GPUs that a process with this environment can use.

    Args:
        environment: The variables CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES count.
        root: Root of the file system; only the real one has a library and a torch.
        library: NVML; None: that of this machine.
        build: What torch is built for; None: the installed torch.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and _names_none(visible):
        return Inventory(is_chosen=True)
    if library is None and root == _ROOT:
        library = nvml.load()
    found = _nvidia(library, root) or _tegra(root)
    if found is None:
        found = Inventory(*amd_gpus(environment, root))
        visible = environment.get("HIP_VISIBLE_DEVICES", visible)
        if visible is not None and _names_none(visible):
            return Inventory(is_chosen=True)
    build = build or (torch_build() if found.gpus and root == _ROOT else None)
    found = _suited(found, build)
    if visible is None or not found.gpus:
        return found
    return _visible(found, visible, environment)


def _names_none(visible: str) -> bool:
    first = visible.split(",")[0].strip()
    return not re.match(r"\d+$|GPU-|MIG-", first)


def _nvidia(library: Any | None, root: Path) -> Inventory | None:
    """Return the NVIDIA GPUs; None if this machine has none."""
    files = _device_files(root)
    is_wsl = (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists()
    if library is None:
        # A container without the driver's tools, or WSL without them.
        present = files.usable or int(is_wsl)
        if not present and files.listed:
            return Inventory(problem=_no_access(files, root))
        gpus = tuple(Gpu(str(index), index, "", "NVIDIA GPU") for index in range(present))
        return Inventory(gpus) if gpus else None
    try:
        report = nvml.read(library)
    except NvmlError as error:
        is_there = bool(files.listed or files.usable or is_wsl)
        return Inventory(problem=_nvml_problem(error, files, root)) if is_there or error.code == nvml.MISMATCH else None
    if not report.devices:
        if report.lost:
            fix = f"see dmesg and nvidia-smi; a reset or a reboot helps a lost GPU; {ON_CPU}"
            return Inventory(problem=EnvironmentFault(f"no GPU can be used: {'; '.join(report.lost)}", fix))
        return Inventory(problem=_no_access(files, root)) if files.listed or files.usable else None
    return _usable(report)


def _usable(report: NvmlReport) -> Inventory:
    if not report.has_cuda_library:
        fix = "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility; else install the driver's libcuda"
        return Inventory(problem=EnvironmentFault("there are GPUs, but not CUDA's library libcuda.so.1", fix))
    gpus, notes = [], list(report.lost)
    for device in report.devices:
        if not device.is_mig:
            gpus.append(_gpu(device, str(device.index)))
        elif not device.instances:
            notes.append(f"GPU {device.index} is in MIG mode and has no instance")
        gpus += [replace(_gpu(one, one.uuid), is_mig=True) for one in device.instances]
    problem = None
    if not gpus:
        fix = f"create one with nvidia-smi mig, or turn MIG off; {ON_CPU}"
        problem = EnvironmentFault(f"no GPU can be used: {'; '.join(notes)}", fix)
    known = tuple(replace(gpu, driver_cuda=report.cuda_version) for gpu in gpus)
    return Inventory(known, problem, notes=tuple(notes))


def _gpu(device: NvmlDevice, entry: str) -> Gpu:
    # A desktop has graphics processes on its GPU; that does not make it someone else's.
    compute = [pid for pid in device.compute if pid not in device.graphics]
    used = None if device.graphics else device.used_bytes
    holder = hold_of(compute, used, device.total_bytes)
    return Gpu(entry, device.index, device.uuid, device.name, holder=holder)


@dataclass(frozen=True)
class _Files:
    listed: int
    """GPUs of which the driver tells."""
    numbers: tuple[int, ...]
    """Numbers of the device files."""

    @property
    def usable(self) -> int:
        """A container may see every GPU of its host under /proc, but only its own device files."""
        return min(self.listed, len(self.numbers)) if self.listed and self.numbers else len(self.numbers)


def _device_files(root: Path) -> _Files:
    def names(folder: Path, pattern: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(folder) if re.fullmatch(pattern, name))
        except OSError:
            return []

    numbers = tuple(int(name[6:]) for name in names(root / "dev", r"nvidia\d+"))
    return _Files(len(names(root / "proc/driver/nvidia/gpus", r".+")), numbers)


def _no_access(files: _Files, root: Path) -> EnvironmentFault:
    count = files.listed or len(files.numbers)
    what = f"this machine has {count} NVIDIA GPU{'s' * (count > 1)}, and this process may use none"
    closed = [number for number in files.numbers if not os.access(root / f"dev/nvidia{number}", os.R_OK | os.W_OK)]
    if closed:
        fix = f"permission denied on /dev/nvidia{closed[0]}: ask for access (often a group such as video)"
    elif not files.numbers:
        fix = "there are no device files: start the container with --gpus all; without a container, run nvidia-modprobe"
    else:
        fix = "request GPUs from the scheduler (SLURM: --gpus), or pass them to the container (--gpus all)"
    return EnvironmentFault(what, f"{fix}; {ON_CPU}")


def _nvml_problem(error: NvmlError, files: _Files, root: Path) -> EnvironmentFault:
    if error.code == nvml.MISMATCH:
        return EnvironmentFault(
            "the NVIDIA driver in the kernel and its libraries have different versions, so no GPU can be used",
            f"reboot after an update of the driver; in a container, start it again on the updated host; {ON_CPU}",
        )
    if error.code == nvml.NO_PERMISSION:
        return _no_access(files, root)
    if error.code == nvml.DRIVER_NOT_LOADED:
        fix = f"load it (modprobe nvidia, nvidia-modprobe) or install it again; {ON_CPU}"
        return EnvironmentFault("this machine has NVIDIA GPUs, but their driver is not loaded", fix)
    return EnvironmentFault(f"NVIDIA's GPUs cannot be used: {error}", f"see what nvidia-smi prints; {ON_CPU}")


def _tegra(root: Path) -> Inventory | None:
    """Return the integrated GPU of a Jetson, which older releases of its system do not show through NVML."""
    try:
        is_tegra = b"nvidia,tegra" in (root / "proc/device-tree/compatible").read_bytes()
    except OSError:
        return None
    devices = [root / "dev" / name for name in ("nvhost-gpu", "nvgpu/igpu0/power", "nvmap")]
    present = [device for device in devices if device.exists()]
    if not is_tegra or not present:
        return None
    if not os.access(present[0], os.R_OK | os.W_OK):
        fix = f"permission denied on /{present[0].relative_to(root)}: join the group video; {ON_CPU}"
        return Inventory(problem=EnvironmentFault("this Jetson's GPU cannot be used", fix))
    return Inventory((Gpu("0", 0, "", "NVIDIA Tegra"),))


def torch_build() -> TorchBuild | None:
    """Return what the installed torch is built for, from the text of its version.py; None without torch."""
    spec = importlib.util.find_spec("torch")
    try:
        text = Path(str(spec and spec.origin)).with_name("version.py").read_text()
    except OSError:
        return None
    for name, kind in (("cuda", "cuda"), ("hip", "rocm")):
        match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
        if match:
            return TorchBuild("cuda" if kind == "cuda" else "rocm", match[1])
    return TorchBuild("cpu")


def _suited(found: Inventory, build: TorchBuild | None) -> Inventory:
    """Return the GPUs for which torch is built, or the problem that there are none."""
    if not found.gpus or build is None:
        return found
    kind = found.gpus[0].kind
    name = {"cuda": "CUDA", "rocm": "ROCm", "cpu": "CPUs"}
    if build.kind != kind:
        if kind == "rocm" and all(gpu.is_integrated for gpu in found.gpus):
            return Inventory()  # the graphics of a processor, which nobody means
        count = len(found.gpus)
        return Inventory(
            problem=EnvironmentFault(
                f"this machine has {count} GPU{'s' * (count > 1)} ({found.gpus[0].name}), but torch is built for "
                f"{name[build.kind]} only",
                f"install torch for {name[kind]}: https://pytorch.org/get-started/locally; {ON_CPU}",
            )
        )
    driver = found.gpus[0].driver_cuda
    needed = build.version.split(".")[0]
    if driver and needed.isdigit() and driver // 1000 < int(needed):
        return Inventory(
            problem=EnvironmentFault(
                f"the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10} at most, and torch is built "
                f"for CUDA {build.version}",
                f"update the driver, or install torch for CUDA {driver // 1000}; {ON_CPU}",
            )
        )
    return found


def _visible(found: Inventory, visible: str, environment: Mapping[str, str]) -> Inventory:
    """Return the GPUs that the value names, in its order, as CUDA reads it: up to the first invalid entry."""
    # By default CUDA numbers GPUs of several types by speed, which NVML does not tell.
    is_ordered = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.name for gpu in found.gpus}) == 1
    chosen: list[Gpu] = []
    entries = [part.strip() for part in visible.split(",")]
    for entry in entries:
        gpu = _named(found.gpus, entry)
        if gpu is None:
            break
        is_known = is_ordered or not entry.isdigit()
        chosen.append(replace(gpu, entry=entry, holder=gpu.holder if is_known else None))
    if len(set(entries[: len(chosen)])) < len(chosen):
        chosen = []  # CUDA shows none if one is named twice
    notes = found.notes
    if any(gpu.is_mig for gpu in chosen) and len(chosen) > 1:
        notes = (*notes, _MIG_NOTE)
        chosen = [next(gpu for gpu in chosen if gpu.is_mig)]
    if not chosen:
        there = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in found.gpus)
        fault = EnvironmentFault(
            f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine",
            f"it has {there}; CUDA_VISIBLE_DEVICES= (empty) trains on CPU",
        )
        return Inventory(problem=fault, is_chosen=True, notes=notes)
    return Inventory(tuple(chosen), None, True, notes)


def _named(gpus: Iterable[Gpu], entry: str) -> Gpu | None:
    """Return the GPU of an entry of CUDA_VISIBLE_DEVICES: a number, or the beginning of a UUID."""
    if entry.isdigit():
        return next((gpu for gpu in gpus if gpu.index == int(entry)), None)
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    fitting = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    if fitting:
        return fitting[0] if len(fitting) == 1 else None
    unknown = [gpu for gpu in gpus if not gpu.uuid or entry.startswith("MIG-GPU-")]  # which cannot be verified
    return replace(unknown[0], uuid=entry, is_mig=entry.startswith("MIG-")) if unknown else None
