"""Checks of the GPUs: who uses them, errors, clocks, settings, links. What they reach is in `speed.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.doctor import gpu_state
from trainer.doctor.finding import Finding, error, ok, skipped, warning
from trainer.doctor.gpu_state import THROTTLED, GpuState
from trainer.doctor.probe import Probe
from trainer.hardware.catalogue import known

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)(?:,\s*(.*))?")
_HARDWARE = {
    48: "uncorrected memory error",
    61: "microcontroller error",
    62: "microcontroller error",
    63: "a memory row was replaced",
    64: "a memory row could not be replaced",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor failed",
    140: "uncorrected memory error",
}
"""Xids that are faults of the hardware; the others (13, 31, 43, 45, ...) are mostly those of a program.
https://docs.nvidia.com/deploy/xid-errors/"""
_NONE = "no NVIDIA GPU"
_LOW_POWER = 0.95


def _states(probe: Probe) -> list[GpuState]:
    return [] if probe.library is None else gpu_state.states(probe.library)


def users(probe: Probe) -> Iterator[Finding]:
    """Check that nobody else uses the GPUs."""
    found = probe.gpus.gpus
    if not found:
        yield skipped("no GPU")
        return
    taken = [gpu for gpu in found if gpu.holder]
    for gpu in taken:
        free = ",".join(other.entry for other in found if not other.holder)
        fix = f"CUDA_VISIBLE_DEVICES={free} leaves it out" if free else "wait, or ask its owner; nvidia-smi shows more"
        yield warning(f"GPU {gpu.index} is used by {gpu.holder}", fix)
    if not taken:
        yield ok(f"{'both GPUs are' if len(found) == 2 else 'all are' if len(found) > 1 else 'the GPU is'} free")


def memory_errors(probe: Probe) -> Iterator[Finding]:
    """Check error correction (ECC): uncorrected errors, rows to replace, switched off."""
    states = _states(probe)
    if not states:
        yield skipped(_NONE)
        return
    is_good = True
    for one in states:
        reset = f"stop its jobs, sudo nvidia-smi --gpu-reset -i {one.index}, then dcgmi diag -r 3"
        if one.remap_failed:
            yield error(f"GPU {one.index}: a defective memory row cannot be replaced", "have the GPU replaced")
        elif one.uncorrected:
            yield error(f"GPU {one.index}: {one.uncorrected} uncorrected memory errors since the driver started", reset)
        elif one.remap_pending:
            yield error(f"GPU {one.index}: a defective memory row waits to be replaced", reset)
        elif one.ecc is False:
            fix = f"sudo nvidia-smi -i {one.index} --ecc-config=1, then reboot"
            yield warning(f"GPU {one.index}: error correction is off", fix)
        else:
            continue
        is_good = False
    if is_good:
        off = all(one.ecc is None for one in states)
        yield ok("these GPUs have no error correction" if off else "error correction on, no uncorrected errors")


def kernel_log(probe: Probe) -> Iterator[Finding]:
    """Check the kernel's log for Xid messages, by which NVIDIA's driver reports faults."""
    if not probe.gpus.gpus and not _states(probe):
        yield skipped(_NONE)
        return
    for command in (("dmesg",), ("journalctl", "--dmesg", "--no-pager", "--quiet")):
        ran = probe.run(command)
        if ran.code == 0 and ran.out.strip():
            break
    else:
        yield skipped("the kernel log cannot be read by this user", "sudo dmesg | grep Xid")
        return
    latest: dict[tuple[str, int], int] = {}
    for match in _XID.finditer(ran.out):
        key = (match[1], int(match[2]))
        latest[key] = latest.get(key, 0) + 1
    for (device, number), count in latest.items():
        times = f", {count} times" if count > 1 else ""
        if number in _HARDWARE:
            fix = "stop its jobs, reset the GPU (sudo nvidia-smi --gpu-reset) or reboot; if it recurs, replace the GPU"
            yield error(f"Xid {number} of {device}{times}: {_HARDWARE[number]}", fix)
        else:
            fix = "see https://docs.nvidia.com/deploy/xid-errors; often an error of a program that ran then"
            yield warning(f"Xid {number} of {device}{times}", fix)
    if not latest:
        yield ok("no Xid in the kernel log")


def clocks(probe: Probe) -> Iterator[Finding]:
    """Check that no GPU is slowed down: heat, power supply, a power limit, fewer lanes of the bus."""
    states = _states(probe)
    if not states:
        yield skipped(_NONE)
        return
    under_load = {} if probe.facts is None else {one.index: one.throttling for one in probe.facts.devices}
    is_good = True
    for place, one in enumerate(states):
        bits = one.throttling | under_load.get(place, 0)
        device = known(one.name)
        for bit, reason in THROTTLED.items():
            if bits & bit:
                is_good = False
                degrees = f" ({one.temperature} degrees C)" if one.temperature is not None else ""
                fix = "check its cooling and power cables; nvidia-smi -q -d PERFORMANCE,TEMPERATURE shows more"
                yield warning(f"GPU {one.index} is {reason}{degrees}", fix)
        if device is not None and one.power_limit_w and one.power_limit_w < _LOW_POWER * device.power_watts:
            is_good = False
            fix = f"sudo nvidia-smi -i {one.index} -pl {device.power_watts:g}, if the site allows it"
            yield warning(f"GPU {one.index} is limited to {one.power_limit_w:g} of {device.power_watts:g} W", fix)
        if one.link_width and one.link_width[0] < one.link_width[1]:
            is_good = False
            yield warning(
                f"GPU {one.index} uses {one.link_width[0]} of {one.link_width[1]} PCIe lanes",
                "reseat the card or its riser; some mainboards share lanes between slots",
            )
    if is_good:
        yield ok("no GPU is slowed down")


def persistence(probe: Probe) -> Iterator[Finding]:
    """Check the persistence mode, without which the driver unloads the GPUs after each process."""
    states = [one for one in _states(probe) if one.persistence is not None]
    if not states:
        yield skipped(_NONE)
        return
    off = [str(one.index) for one in states if not one.persistence]
    if off:
        text = f"persistence mode is off on GPU {', '.join(off)}: each first use takes seconds"
        yield warning(text, "sudo nvidia-smi -pm 1")
    else:
        yield ok("persistence mode is on")


def links(probe: Probe) -> Iterator[Finding]:
    """Check that the GPUs reach each other: NVLinks that are down, pairs without peer-to-peer access."""
    states, facts = _states(probe), probe.facts
    count = len(probe.gpus.gpus)
    if count < 2:
        yield skipped("fewer than two GPUs")
        return
    is_good = True
    for one in states:
        device = known(one.name)
        link = device.link if device else None
        if one.nvlinks and one.nvlinks[0] < one.nvlinks[1] and (link is None or link.reach != "bridge"):
            is_good = False
            up, present = one.nvlinks
            fix = "sudo systemctl restart nvidia-fabricmanager; nvidia-smi nvlink -s shows which; else reboot"
            yield error(f"GPU {one.index}: {up} of {present} NVLinks are up", fix)
    if facts is None or facts.problem or not facts.devices:
        yield skipped("peer-to-peer access: torch was not started")
        return
    if facts.no_peer:
        pairs = ", ".join(f"{first}-{second}" for first, second in facts.no_peer[:4])
        more = f" and {len(facts.no_peer) - 4} more" if len(facts.no_peer) > 4 else ""
        linked = [one.nvlinks for one in states if one.nvlinks and one.nvlinks[0]]
        text = f"no peer-to-peer access between GPUs {pairs}{more}: NCCL copies through the memory of the host"
        if linked:
            yield error(text, "sudo systemctl restart nvidia-fabricmanager, or reboot; nvidia-smi topo -m")
        else:
            yield warning(
                text, "boot with iommu=pt and switch ACS off (GeForce cards have none); nvidia-smi topo -p2p r"
            )
    elif is_good:
        kinds = {one.nvlinks for one in states if one.nvlinks}
        yield ok(f"all {count} GPUs reach each other" + (", over NVLink" if kinds else ", over PCIe"))
