"""What torch finds and reaches on this machine: `python -m trainer.doctor.measure BUSY`, which prints `Facts` as JSON.

BUSY are the UUIDs of GPUs that somebody else uses, separated by commas; they are not measured.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import torch

from trainer.core import nvml, records
from trainer.doctor.facts import DeviceFacts, Facts
from trainer.doctor.gpu_state import throttle_reasons
from trainer.hardware.catalogue import known as known_device
from trainer.hardware.device import Arithmetic
from trainer.runtime import speed

_LIBRARIES = re.compile(r"(/\S*/(lib(?:nccl|cudart|cublas|rccl))\.so\S*)")
_ON_GPU: tuple[Arithmetic, ...] = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8")
_ON_CPU = ("fp32", "bf16")


def main(busy: str = "") -> int:
    """Print the facts; returns the exit code."""
    sys.stdout.write(records.dumps(facts(set(busy.split(",")) - {""})) + "\n")
    return 0


def facts(busy: set[str]) -> Facts:
    """Return what torch finds, and the speed of the CPU and of each GPU that is free."""
    found = Facts(
        torch=torch.__version__,
        cuda=str(torch.version.cuda or torch.version.hip or ""),
        threads=torch.get_num_threads(),
        cpu=_cpu(),
    )
    if not torch.version.cuda and not torch.version.hip:
        return found
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        devices = [_gpu(index, busy) for index in range(torch.cuda.device_count())]
    except Exception as problem:  # of the driver, in many classes
        return replace(found, cuda_problem=f"{type(problem).__name__}: {problem}".splitlines()[0])
    pairs = [[a.index, b.index] for a in devices for b in devices if a.index < b.index]
    return replace(
        found,
        nccl=_nccl(),
        architectures=list(torch.cuda.get_arch_list()),
        devices=devices,
        no_peer=[pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)],
        libraries=_libraries(),
    )


def _cpu() -> DeviceFacts:
    device = torch.device("cpu")
    works = {kind: speed.works(device, kind) for kind in _ON_CPU}
    rates = {kind: speed.matrix_flops(device, kind) for kind in _ON_CPU if not works[kind]}
    return DeviceFacts(
        name="CPU", index=-1, works=works, matrix_flops=rates, memory_bytes_s=speed.memory_bytes_s(device)
    )


def _gpu(index: int, busy: set[str]) -> DeviceFacts:
    device, known = torch.device("cuda", index), torch.cuda.get_device_properties(index)
    uuid = f"GPU-{getattr(known, 'uuid', '')}"
    found = DeviceFacts(
        name=torch.cuda.get_device_name(index),
        index=index,
        memory_bytes=known.total_memory,
        capability=f"{known.major}.{known.minor}" if torch.version.cuda else str(known.gcnArchName).partition(":")[0],
        multiprocessors=known.multi_processor_count,
        is_busy=uuid in busy,
    )
    works: dict[str, str] = {kind: speed.works(device, kind) for kind in _ON_GPU}
    if found.is_busy:
        return replace(found, works=works)
    seen = [0]

    def look() -> None:
        seen[0] |= _throttling(uuid)

    entry = known_device(found.name)
    # What the matrix units lack is emulated, and takes many times as long.
    kinds = [kind for kind in _ON_GPU if not works[kind] and (entry is None or kind == "fp64" or entry.supports(kind))]
    rates: dict[str, float] = {kind: speed.matrix_flops(device, kind, look) for kind in kinds}
    memory, host = speed.memory_bytes_s(device), speed.host_bytes_s(device)
    torch.cuda.empty_cache()
    return replace(found, works=works, matrix_flops=rates, throttling=seen[0], memory_bytes_s=memory, host_bytes_s=host)


def _throttling(uuid: str) -> int:
    library = nvml.load()
    handle: Any = nvml.device_of(library, uuid) if library is not None else None
    return 0 if handle is None else throttle_reasons(library, handle)


def _nccl() -> str:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except Exception:  # a build without NCCL
        return ""


def _libraries() -> dict[str, str]:
    """Return the paths of the libraries of CUDA that this process has loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            return {match[2]: match[1] for line in file if (match := _LIBRARIES.search(line))}
    except OSError:
        return {}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
