"""What the hardware of a job reaches: shares of the data sheet for a GPU, measurements for CPU ranks. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.core.files import write_atomic
from trainer.core.paths import cache_root
from trainer.core.records import dumps, read_or_skip
from trainer.hardware.catalogue import Device
from trainer.plan.collectives import Links
from trainer.plan.roofline import Rates, StepTime
from trainer.plan.work import Counts, Work

MATRIX_SHARE = {"Hopper": 0.60, "Blackwell": 0.60, "CDNA 3": 0.45, "CDNA 4": 0.45}
MATRIX_SHARE_ELSEWHERE = 0.70
"""Share of the dense peak that matrix products reach in training. Hopper's peak is that of its highest clock, which its
power limit does not allow under load. Fitted to published throughputs: `benchmarks/planned_rows.py` prints them. AMD's
is what matrix products of the MI300X are reported to reach, no fit:
https://aiweekly.co/alerts/amd-mi300x-hits-only-45-of-peak-flops-in-practice"""
OF_MEASURED = 0.85
"""Share of what `trainer doctor` measures with large matrix products and copies that training reaches: 60% of Hopper's
peak where products of 8,192 rows reach 70%, 75% of a bandwidth of which copies reach 88%. An assumption."""
MEMORY_SHARE = 0.75
"""Share of the memory's bandwidth that other operators reach. Fitted to the same rows."""
LINK_SHARE = 0.80
"""Share of NVLink, PCIe or the network that large collectives reach. An assumption."""
OPERATOR_S = 8e-6
"""Host time to start an operator from Python, its backward pass included. An assumption."""
LATENCY_S, HOP_S = 15e-6, 2e-6
"""Start of a collective of NCCL, and each further rank of a ring. Assumptions."""
COMPILED_BYTES, COMPILED_OPERATORS = 0.6, 0.3
"""Shares that are left of other operators' bytes and of operators when blocks are compiled. Fitted to the same rows."""
_NETWORK = {"Hopper": 50e9, "Blackwell": 50e9, "CDNA 3": 50e9, "CDNA 4": 50e9, "Ampere": 25e9}
_NETWORK_ELSEWHERE = 12.5e9
"""Bytes a second of a GPU's share of the network: one adapter of 400, 200 or 100 Gb/s for each GPU. An assumption,
which `--network` replaces."""
_LANE = {"3": 0.985e9, "4": 1.969e9, "5": 3.938e9, "6": 7.563e9}
"""Bytes a second of a lane of PCI Express in one direction, by generation."""
_PCIE = 16e9
HOST_BYTES_S = 10e9
"""Bytes a second of host memory for each rank in an update on the host. An assumption."""


@dataclass(frozen=True)
class Machine:
    """Rates of one rank on CPUs, in its own CPU time: `rates/KEY.json` in the cache."""

    hardware: str
    flops_s: float
    """FLOP/s of matrix products in float32, of 512 x 512."""
    bytes_s: float
    operator_s: float
    """Seconds of a small operator."""
    time: float = 0.0
    """Seconds since 1970."""

    @property
    def rates(self) -> Rates:
        """The rates, with gloo over the loopback interface, whose speed was not measured."""
        links = Links(1e9, 1e9, 300e-6, 50e-6)
        return Rates(self.flops_s, self.bytes_s, self.operator_s, False, links, f"measured on {self.hardware}")


def of_device(
    device: Device,
    arithmetic: str,
    network_bytes_s: float | None = None,
    measured: Mapping[str, float] | None = None,
) -> Rates | None:
    """Return the rates of a GPU of the catalogue; None: it does not have the arithmetic.

    Args:
        device: The entry of the catalogue.
        arithmetic: What matrix products compute in, such as `bf16`.
        network_bytes_s: Measured or stated bytes a second of a rank's share of the network.
        measured: What `trainer doctor` measured of this GPU, in place of shares of the data sheet
            (`hardware.baseline.of_hardware`).
    """
    peak = dict(device.peak_tflops).get(arithmetic)  # type: ignore[call-overload]
    if peak is None:
        return None
    architecture = _architecture(device)
    share = MATRIX_SHARE.get(architecture, MATRIX_SHARE_ELSEWHERE)
    network = network_bytes_s or LINK_SHARE * _NETWORK.get(architecture, _NETWORK_ELSEWHERE)
    source = f"{share:.0%} of the peak, {MEMORY_SHARE:.0%} of the memory's bandwidth, {LINK_SHARE:.0%} of the links"
    flops_s, bytes_s = peak * 1e12 * share, device.bandwidth_bytes_s * MEMORY_SHARE
    link_bytes_s = LINK_SHARE * _link(device)
    known = measured or {}
    if f"matrix {arithmetic}" in known and "memory" in known:
        flops_s, bytes_s = OF_MEASURED * known[f"matrix {arithmetic}"], OF_MEASURED * known["memory"]
        source = f"{OF_MEASURED:.0%} of what trainer doctor measured, {LINK_SHARE:.0%} of the links"
    if reduced := _reduced_bytes_s(known):
        link_bytes_s, source = reduced, source.replace(f"{LINK_SHARE:.0%} of the links", "its all-reduce")
    return Rates(flops_s, bytes_s, OPERATOR_S, True, Links(link_bytes_s, network, LATENCY_S, HOP_S), source)


def _reduced_bytes_s(measured: Mapping[str, float]) -> float | None:
    """Return the bytes a second that a rank receives in the largest measured all-reduce, which a ring sends twice."""
    found = {int(words[2]): value for name, value in measured.items() if (words := name.split())[0] == "all-reduce"}
    if not found:
        return None
    ranks = max(found)
    return found[ranks] * 2 * (ranks - 1) / ranks


def compiled(work: Work) -> Work:
    """Return the work with `strategy.compile`, which fuses operators that are bound by memory."""

    def fused(counts: Counts) -> Counts:
        operators = int(counts.operators * COMPILED_OPERATORS)
        return replace(counts, other_bytes=counts.other_bytes * COMPILED_BYTES, operators=operators)

    return replace(work, forward=fused(work.forward), backward=fused(work.backward))


def offloaded(step: StepTime, work: Work, state_bytes: int, accumulate: int, device: Device) -> StepTime:
    """Return the time with FSDP2's `cpu_offload`: shards and gradients cross the PCI bus, the host updates them.

    Args:
        step: The time without it.
        work: The work of a rank, whose update moves what the host will move.
        state_bytes: Bytes of a rank's parameters and optimizer states.
        accumulate: Micro-batches of a step.
        device: The GPU.
    """
    shard = state_bytes / 3  # with two moments
    copies = 3 * accumulate * shard / (LINK_SHARE * _pcie(device))
    return replace(step, update=work.update.other_bytes / HOST_BYTES_S, exposed=step.exposed + copies)


def machine_path(hardware: str) -> Path:
    """Return the file of the measured rates of a kind of CPU rank."""
    return cache_root() / "rates" / f"{hashlib.sha256(hardware.encode()).hexdigest()[:16]}.json"


def machine(hardware: str) -> Machine | None:
    """Return the measured rates; None: they have not been measured."""
    found = read_or_skip(Machine, machine_path(hardware))
    return found if found is not None and found.hardware == hardware else None


def keep_machine(found: Machine) -> None:
    """Write measured rates to the cache; a file system that refuses is no error."""
    path = machine_path(found.hardware)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, dumps(found, indent=1) + "\n")
    except OSError:
        return


def cpu_hardware(threads: int, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the kind of a CPU rank: the model of the processor and the threads that it computes with."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def _architecture(device: Device) -> str:
    return str(device.architecture)


def _pcie(device: Device) -> float:
    """Return the bytes a second of the PCI bus in one direction."""
    generation, _, lanes = device.pcie.partition(" x")
    return _LANE[generation] * int(lanes) if generation in _LANE and lanes.isdigit() else _PCIE


def _link(device: Device) -> float:
    """Return the bytes a second that a GPU receives from others of its node, by the data sheet."""
    link = device.link
    if link is not None and link.reach in ("switch", "mesh"):
        return link.bytes_s / 2
    return _pcie(device)
