"""Checks of the software: driver, torch, CUDA, NCCL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trainer.doctor import gpu_state
from trainer.doctor.finding import Finding, error, ok, skipped, warning
from trainer.doctor.probe import Probe

_PREFERRED = re.compile(r"lib(nccl|cudart|cublas)\.so")
_HARMFUL = {
    "NCCL_P2P_DISABLE": "GPUs of a node do not copy to each other directly",
    "NCCL_SHM_DISABLE": "ranks of a node exchange data over the network",
    "NCCL_IB_DISABLE": "InfiniBand is not used",
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before",
    "NCCL_NET_GDR_DISABLE": "the network copies through the memory of the host",
}
_OFF = ("", "0")


def driver(probe: Probe) -> Iterator[Finding]:
    """Check that the GPUs of this machine can be used."""
    found = probe.gpus
    if found.problem is not None:
        yield error(found.problem.message, found.problem.fix)
        return
    if not found.gpus:
        chosen = " (CUDA_VISIBLE_DEVICES names none)" if found.is_chosen else ""
        yield ok(f"no GPU on this machine{chosen}: jobs train on the CPU")
        return
    version = gpu_state.driver_version(probe.library) if probe.library is not None else ""
    cuda = found.gpus[0].driver_cuda
    names = {gpu.name: sum(other.name == gpu.name for other in found.gpus) for gpu in found.gpus}
    text = ", ".join(f"{count} x {name}" for name, count in names.items())
    parts = [f"driver {version}" if version else "", f"CUDA {_dotted(cuda)}" if cuda else ""]
    yield ok(f"{text}; {', '.join(filter(None, parts)) or 'driver not known'}")
    for note in found.notes:
        yield warning(note, "see nvidia-smi and `sudo dmesg | grep NVRM`")


def torch(probe: Probe) -> Iterator[Finding]:
    """Check that torch can be imported and has kernels for the GPUs."""
    facts = probe.facts
    if probe.build is None:
        yield error("torch is not installed", "pip install torch")
        return
    if facts is None:
        yield skipped("torch was not started (--quick)")
        return
    if facts.problem:
        yield error(
            f"torch does not start: {facts.problem}", "pip install --force-reinstall torch; see the message above"
        )
        return
    built = f"CUDA {facts.cuda}" if probe.build.kind == "cuda" else "ROCm" if probe.build.kind == "rocm" else "CPU"
    if not probe.gpus.gpus:
        yield ok(f"torch {facts.torch}, built for {built}, {facts.threads} threads")
        return
    if facts.cuda_problem:
        fix = "reboot after an update of the driver; in a container, check that it has /dev/nvidia-uvm (--gpus all)"
        yield error(f"torch cannot use the GPUs: {facts.cuda_problem}", fix)
        return
    if len(facts.devices) != len(probe.gpus.gpus):
        fix = "see `nvidia-smi -L` and CUDA_VISIBLE_DEVICES; MIG instances are seen one at a time"
        yield warning(f"torch sees {len(facts.devices)} GPUs, the driver {len(probe.gpus.gpus)}", fix)
    missing = [
        one.name
        for one in facts.devices
        if facts.architectures and not _has_kernels(one.capability, facts.architectures)
    ]
    if missing:
        newest = ", ".join(facts.architectures)
        fix = "install a build of torch for this GPU: https://pytorch.org/get-started/locally"
        yield error(f"torch {facts.torch} has no kernels for {missing[0]}: it has {newest}", fix)
        return
    driver_cuda = probe.gpus.gpus[0].driver_cuda
    needed = [int(part) for part in re.findall(r"\d+", facts.cuda)[:2]]
    if driver_cuda and len(needed) == 2 and driver_cuda < 1000 * needed[0] + 10 * needed[1]:
        fix = f"update the driver to one for CUDA {facts.cuda}, or install a torch for CUDA {_dotted(driver_cuda)}"
        yield warning(f"torch is built for CUDA {facts.cuda}, the driver is of {_dotted(driver_cuda)}: no new PTX", fix)
        return
    yield ok(f"torch {facts.torch}, built for {built}")


def _has_kernels(capability: str, architectures: list[str]) -> bool:
    """Return whether a build runs on a device: kernels of its major version and no newer minor one, or PTX."""
    if capability.startswith("gfx"):
        return any(one.partition(":")[0] == capability for one in architectures)
    wanted = int(capability.replace(".", ""))
    for one in architectures:
        kind, _, digits = one.partition("_")
        number = int(re.sub(r"\D", "", digits) or 0)
        if kind == "sm" and number <= wanted and number // 10 == wanted // 10:
            return True
        if kind == "compute" and number <= wanted:
            return True
    return False


def nccl(probe: Probe) -> Iterator[Finding]:
    """Check that torch uses its own CUDA libraries, and the variables of NCCL."""
    facts = probe.facts
    harmful = [name for name in _HARMFUL if probe.environment.get(name, "") not in _OFF]
    if harmful:
        text = "; ".join(f"{name} is set: {_HARMFUL[name]}" for name in harmful)
        yield warning(text, f"unset {' '.join(harmful)}")
    interface = probe.environment.get("NCCL_SOCKET_IFNAME", "").lstrip("^=").split(",")[0]
    names = {one.interface or "" for one in probe.addresses()}
    is_excluded = probe.environment.get("NCCL_SOCKET_IFNAME", "").startswith("^")
    if interface and not is_excluded and not any(name.startswith(interface) for name in names):
        there = ", ".join(sorted(names - {""}))
        yield error(
            f"NCCL_SOCKET_IFNAME={interface}: there is no such interface",
            f"unset NCCL_SOCKET_IFNAME, or set cluster.network_interface to one of: {there}",
        )
    foreign = _foreign(probe)
    if foreign:
        variable, library = foreign
        yield warning(
            f"{variable} puts {library} before torch's own",
            f"unset {variable}, or unload the module that sets it (module unload cuda nccl)",
        )
    if facts is None or facts.problem or not probe.gpus.gpus:
        yield skipped("no GPU: ranks exchange data through gloo" if not probe.gpus.gpus else "torch was not started")
    elif not facts.nccl:
        yield error("this torch has no NCCL: GPUs cannot train together", "install torch from pytorch.org or PyPI")
    elif not (harmful or foreign):
        yield ok(f"NCCL {facts.nccl}, of torch")


def _foreign(probe: Probe) -> tuple[str, str] | None:
    """Return a variable of the linker and a CUDA library that it would put before torch's own."""
    loaded = {} if probe.facts is None else probe.facts.libraries
    outside = {name: path for name, path in loaded.items() if "site-packages" not in path and "/torch/" not in path}
    if preload := [part for part in probe.environment.get("LD_PRELOAD", "").split(":") if _PREFERRED.search(part)]:
        return "LD_PRELOAD", preload[0]
    for folder in filter(None, probe.environment.get("LD_LIBRARY_PATH", "").split(":")):
        names = [name for name in probe.entries(folder) if _PREFERRED.match(name)]
        # Wheels of torch find their own libraries by a path of their own; only what was really loaded counts, if known.
        if names and (not loaded or any(Path(path).parent == Path(folder) for path in outside.values())):
            return "LD_LIBRARY_PATH", f"{folder}/{names[0]}"
    return None


def _dotted(version: int | None) -> str:
    return "?" if version is None else f"{version // 1000}.{version % 1000 // 10}"
