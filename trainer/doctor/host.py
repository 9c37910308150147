"""Checks of the host: shared memory, limits, CPU cores, NUMA nodes."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from pathlib import Path

from trainer.core.host_memory import available_bytes
from trainer.doctor.finding import Finding, error, ok, skipped, warning
from trainer.doctor.probe import Probe

_LEAST_SHM, _LITTLE_SHM = 128 << 20, 1 << 30
_LEAST_FILES, _FEW_FILES = 1024, 4096
_LEAST_PROCESSES = 4096
_MOST_CORES = 1 << 16
_LITTLE_MEMORY = 2 << 30
_NVIDIA, _AMD = "0x10de", "0x1002"


def shared_memory(probe: Probe) -> Iterator[Finding]:
    """Check /dev/shm, through which data workers pass batches and NCCL passes data between the ranks of a node."""
    try:
        has = probe.space(probe.root / "dev/shm")
    except OSError as problem:
        yield error(f"/dev/shm: {problem.strerror}", "sudo mount -t tmpfs -o size=50% tmpfs /dev/shm")
        return
    total, free = has.f_blocks * has.f_frsize, has.f_bavail * has.f_frsize
    text = f"{_size(free)} of {_size(total)} free in /dev/shm"
    grow = "docker run --shm-size=16g (or --ipc=host); elsewhere sudo mount -o remount,size=50% /dev/shm"
    if total < _LEAST_SHM:
        yield error(f"{text}: data workers and NCCL fail (bus error)", grow)
    elif total < _LITTLE_SHM:
        yield warning(text, grow)
    elif free < _LEAST_SHM or free < total / 10:
        left = [name for name in probe.entries("dev/shm") if name.startswith(("torch_", "nccl-", "psm_", "sem."))]
        fix = f"rm /dev/shm/{{torch_*,nccl-*}} ({len(left)} left by ended processes)" if left else "ls -la /dev/shm"
        yield warning(text, fix)
    else:
        yield ok(text)


def limits(probe: Probe) -> Iterator[Finding]:
    """Check the limits of open files, processes and locked memory."""
    soft, hard = probe.limit(resource.RLIMIT_NOFILE)
    is_good = True
    if _finite(soft) < _FEW_FILES:
        is_good = False
        fix = f"ulimit -n {min(_finite(hard), 65536)}" if _finite(hard) > soft else "* hard nofile 65536 in limits.conf"
        found = error if _finite(soft) < _LEAST_FILES else warning
        yield found(f"{soft} files may be open at once: data workers and sockets need more", fix)
    soft_processes = _finite(probe.limit(resource.RLIMIT_NPROC)[0])
    if soft_processes < _LEAST_PROCESSES:
        is_good = False
        text = f"{soft_processes} processes and threads may run: ranks, data workers and their threads need more"
        yield warning(text, "ulimit -u 65536")
    locked = _finite(probe.limit(resource.RLIMIT_MEMLOCK)[0])
    if probe.entries("sys/class/infiniband") and locked < 1 << 40:
        is_good = False
        fix = "ulimit -l unlimited; on SLURM, LimitMEMLOCK=infinity in slurmd's unit and PropagateResourceLimitsExcept"
        yield error(f"{_size(locked)} may be locked in memory: InfiniBand needs it unlimited", fix)
    if is_good:
        yield ok(f"{'any number of' if _finite(soft) >= 1 << 40 else soft} files may be open")


def cpu_binding(probe: Probe) -> Iterator[Finding]:
    """Check how many cores this process may use, and the number of threads that is set."""
    bound = probe.affinity()
    there = _count(probe.read("sys/devices/system/cpu/online")) or len(bound)
    cores = min(len(bound), _quota(probe))
    threads = probe.environment.get("OMP_NUM_THREADS", "")
    needed = max(2, len(probe.gpus.gpus))
    is_good = True
    if cores < needed <= there:
        is_good = False
        in_step = "SLURM_STEP_ID" in probe.environment
        fix = (
            "srun --cpus-per-task=N (cluster.cpus_per_process=N)"
            if in_step
            else f"taskset -cp 0-{there - 1} $$; in a container, raise --cpus"
        )
        yield warning(f"this process may use {cores} of {there} cores: ranks and data workers share them", fix)
    if threads.isdigit() and int(threads) > cores:
        is_good = False
        yield warning(f"OMP_NUM_THREADS={threads}, but {cores} cores may be used", "unset OMP_NUM_THREADS")
    governor = probe.read("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor == "powersave" and "pstate" not in probe.read("sys/devices/system/cpu/cpu0/cpufreq/scaling_driver"):
        is_good = False
        yield warning("the cores run at their lowest clock (powersave)", "sudo cpupower frequency-set -g performance")
    if is_good:
        yield ok(f"{cores} of {there} cores may be used" + (f", OMP_NUM_THREADS={threads}" if threads else ""))


def _quota(probe: Probe) -> int:
    """Return the cores that a container's quota leaves, at least 1."""
    quota, _, period = probe.read("sys/fs/cgroup/cpu.max").partition(" ")
    return max(1, math.ceil(int(quota) / int(period))) if quota.isdigit() and period.isdigit() else _MOST_CORES


def memory(probe: Probe) -> Iterator[Finding]:
    """Check the free memory of the host, as far as this process may use it."""
    free = available_bytes(probe.root)
    if free is None:
        yield skipped("the free memory is not known")
    elif free < _LITTLE_MEMORY:
        fix = "end what is not needed (ps aux --sort=-rss | head); in a container or job, raise its limit"
        yield warning(f"{_size(free)} of memory may be used", fix)
    else:
        yield ok(f"{_size(free)} of memory may be used")


def numa(probe: Probe) -> Iterator[Finding]:
    """Check that the cores and the memory that this process may use are near the GPUs."""
    nodes = [name for name in probe.entries("sys/devices/system/node") if name[4:].isdigit() and name[:4] == "node"]
    if len(nodes) < 2:
        yield ok("one NUMA node")
        return
    is_good = True
    if probe.read("proc/sys/vm/zone_reclaim_mode") not in ("", "0"):
        is_good = False
        text = "zone_reclaim_mode is on: reading data evicts pages of the own node"
        yield warning(text, "sudo sysctl -w vm.zone_reclaim_mode=0")
    bound = probe.affinity()
    usable = {name for name in nodes if bound & numbers(probe.read(f"sys/devices/system/node/{name}/cpulist"))}
    for device, node in _gpus_by_node(probe):
        if node < 0:
            is_good = False
            yield warning(f"the NUMA node of GPU {device} is not known", "switch on NUMA (NPS, SNC) in the BIOS")
        elif f"node{node}" not in usable:
            is_good = False
            text = f"GPU {device} is on NUMA node {node}, whose cores this process may not use"
            yield warning(text, "resources.numa_binding=true, or numactl --cpunodebind")
    if is_good:
        yield ok(f"{len(usable)} of {len(nodes)} NUMA nodes may be used")


def _gpus_by_node(probe: Probe) -> Iterator[tuple[str, int]]:
    """Yield the PCI address of each GPU for computing, and its NUMA node (-1: not known)."""
    for address in probe.entries("sys/bus/pci/devices"):
        place = f"sys/bus/pci/devices/{address}"
        if probe.read(f"{place}/vendor") in (_NVIDIA, _AMD) and probe.read(f"{place}/class").startswith(
            ("0x0302", "0x0300", "0x1200")
        ):
            text = probe.read(f"{place}/numa_node")
            yield address, int(text) if text.lstrip("-").isdigit() else -1


def numbers(text: str) -> set[int]:
    """Return the numbers of a list such as `0-3,8`."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            found.update(range(int(first), min(int(last or first), _MOST_CORES) + 1))
    return found


def _count(text: str) -> int:
    return len(numbers(text))


def _finite(limit: int) -> int:
    return 1 << 62 if limit == resource.RLIM_INFINITY else limit


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def temporary(probe: Probe) -> Iterator[Finding]:
    """Check the folder for temporary files."""
    folder = Path(probe.environment.get("TMPDIR") or "/tmp")
    place = probe.root / str(folder).lstrip("/")
    try:
        has = probe.space(place)
    except OSError as problem:
        yield error(f"{folder}: {problem.strerror}", "unset TMPDIR, or mkdir it")
        return
    free = has.f_bavail * has.f_frsize
    if free < _LITTLE_SHM:
        yield warning(f"{_size(free)} free in {folder}", f"delete old files in {folder}, or set TMPDIR")
    else:
        yield ok(f"{_size(free)} free in {folder}")
