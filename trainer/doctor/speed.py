"""Checks of what the devices reach: precisions, matrix products, memory, all-reduce.

Held against the catalogue, and against what this machine reached before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainer.doctor.facts import DeviceFacts
from trainer.doctor.finding import Finding, error, ok, skipped, warning
from trainer.doctor.probe import Probe
from trainer.hardware.catalogue import known
from trainer.hardware.device import Arithmetic

LEAST_OF_PEAK = 0.5
"""A matrix product of 8192 rows reaches 60% to 80% of the peak of a GPU in order, a copy 80% to 95% of the memory's."""
_LEAST_OF_AMD = 0.35
"""Of the matrix peak of CDNA 3 and later, of which the MI300X reaches about 45%
(https://aiweekly.co/alerts/amd-mi300x-hits-only-45-of-peak-flops-in-practice)."""
_LEAST_OF_LINK = 0.4
_NOT_MEASURED = "not measured (--quick)"
_MATRIX_UNITS: tuple[Arithmetic, ...] = ("bf16", "fp16", "fp8")
_USABLE: tuple[Arithmetic, ...] = ("fp32", "bf16", "fp16", "fp8")


def measurements(probe: Probe) -> dict[str, float]:
    """Return what was measured, by the names of the baseline, in SI units."""
    values: dict[str, float] = {}
    facts = probe.facts
    if facts is not None and facts.cpu is not None:
        threads = f"of {facts.threads} threads"
        values |= {f"cpu matrix {kind} {threads}": rate for kind, rate in facts.cpu.matrix_flops.items()}
        values[f"cpu memory {threads}"] = facts.cpu.memory_bytes_s
    for one in facts.devices if facts is not None else ():
        values |= {f"matrix {kind} GPU {one.index}": rate for kind, rate in one.matrix_flops.items()}
        values[f"memory GPU {one.index}"] = one.memory_bytes_s
        values[f"host copy GPU {one.index}"] = one.host_bytes_s
    if facts is not None and facts.reduce_bytes_s:
        kind = "all-reduce" if facts.devices else "cpu all-reduce"
        values[f"{kind} of {facts.ranks}"] = facts.reduce_bytes_s
    if probe.storage is not None and not probe.storage.problem:
        where = probe.folder.absolute()
        values[f"storage write {where}"] = probe.storage.write_bytes_s
        values[f"storage read {where}"] = probe.storage.read_bytes_s
    return {name: value for name, value in values.items() if value > 0}


def precisions(probe: Probe) -> Iterator[Finding]:
    """Check that the arithmetic works that the hardware should have."""
    facts = probe.facts
    if facts is None or facts.problem:
        yield skipped(_NOT_MEASURED)
        return
    for one in facts.devices or ([facts.cpu] if facts.cpu else []):
        device = known(one.name)
        place = f"GPU {one.index}" if one.index >= 0 else "CPU"
        broken = [kind for kind in _MATRIX_UNITS if one.works.get(kind) and device and device.supports(kind)]
        broken += [kind for kind in ("fp32",) if one.works.get(kind)]
        for kind in broken:
            fix = "reinstall the driver and torch for each other; if another GPU of this type works, have it replaced"
            yield error(f"{place}: {kind} does not work: {one.works[kind]}", fix)
        if broken:
            continue
        usable = [kind for kind in _USABLE if one.works.get(kind) == ""]
        native = [kind for kind in usable if device is None or device.supports(kind)]
        text = f"{place}: {', '.join(native)}"
        if one.index >= 0 and device is not None and not device.supports("bf16"):
            text += "; bf16 is emulated: trainer.precision=16-mixed"
        yield ok(text)


def matrix_rate(probe: Probe) -> Iterator[Finding]:
    """Check the rate of matrix products and of the memory."""
    facts = probe.facts
    if facts is None or facts.problem or facts.cpu is None:
        yield skipped(_NOT_MEASURED)
        return
    if not facts.devices:
        rates = ", ".join(f"{kind} {flops / 1e9:.0f} GFLOP/s" for kind, flops in facts.cpu.matrix_flops.items())
        names = [name for name in measurements(probe) if name.startswith("cpu m")]
        slow = list(_slower(probe, names))
        yield from slow
        if not slow:
            yield ok(f"CPU: {rates}; memory {facts.cpu.memory_bytes_s / 1e9:.1f} GB/s")
    for one in facts.devices:
        yield from _of_gpu(probe, one)


def _of_gpu(probe: Probe, one: DeviceFacts) -> Iterator[Finding]:
    if one.is_busy:
        yield skipped(f"GPU {one.index} is in use, so it was not measured")
        return
    device = known(one.name)
    names = [name for name in measurements(probe) if name.endswith(f"GPU {one.index}")]
    slow = list(_slower(probe, names))
    yield from slow
    kind = next((kind for kind in ("bf16", "fp16", "fp32") if kind in one.matrix_flops), None)
    if kind is None:
        yield error(f"GPU {one.index} computes nothing", "see the precisions above")
        return
    rate = one.matrix_flops[kind]
    text = f"GPU {one.index}: {rate / 1e12:.0f} TFLOP/s in {kind}, memory {one.memory_bytes_s / 1e9:.0f} GB/s"
    if device is None or kind not in device.peak_tflops:
        yield ok(f"{text}; {one.name} is not in the catalogue: measured, not judged")
        return
    share = rate / (device.peak_tflops[kind] * 1e12)
    memory_share = one.memory_bytes_s / device.bandwidth_bytes_s
    text += f": {share:.0%} and {memory_share:.0%} of the peaks"
    least = _LEAST_OF_AMD if device.architecture in ("CDNA 3", "CDNA 4") else LEAST_OF_PEAK
    if share < least or memory_share < LEAST_OF_PEAK:
        fix = "see clocks, users and the kernel log above; a power cap, heat or a program on it slow a GPU down"
        yield warning(text, fix)
    elif not slow:
        yield ok(text)


def all_reduce(probe: Probe) -> Iterator[Finding]:
    """Check that the ranks of this machine can all-reduce, and how fast."""
    facts = probe.facts
    if facts is None or (not facts.ranks and not facts.reduce_problem):
        yield skipped(_NOT_MEASURED if facts is None else "a single rank needs no all-reduce")
        return
    if facts.reduce_problem:
        fix = "NCCL_DEBUG=INFO shows more; in a container add --ipc=host; see shared memory and links"
        yield error(f"the ranks of this machine cannot all-reduce: {facts.reduce_problem}", fix)
        return
    names = [name for name in measurements(probe) if "all-reduce" in name]
    slow = list(_slower(probe, names))
    yield from slow
    bus = facts.reduce_bytes_s * 2 * (facts.ranks - 1) / facts.ranks
    kind = "NCCL" if facts.devices else "gloo"
    text = f"{facts.ranks} ranks, {kind}: {facts.reduce_bytes_s / 1e9:.3g} GB/s (bus {bus / 1e9:.3g} GB/s)"
    device = known(facts.devices[0].name) if facts.devices else None
    link = device.link if device else None
    if link is not None and (link.reach in ("switch", "mesh") or facts.ranks == 2) and link.reach != "bridge":
        share = bus / (link.bytes_s / 2)
        text += f", {share:.0%} of {link.kind}"
        if share < _LEAST_OF_LINK:
            yield warning(text, "see links and NCCL above; NCCL_DEBUG=INFO shows which transport NCCL uses")
            return
    if not slow:
        yield ok(text)


def _slower(probe: Probe, names: list[str]) -> Iterator[Finding]:
    """Yield the measurements that are slower than this machine usually is."""
    if probe.baseline is None:
        return
    values: Mapping[str, float] = measurements(probe)
    for name in names:
        share = probe.baseline.slower(name, values[name])
        if share is not None:
            yield warning(
                f"{name} has {share:.0%} of what this machine usually reaches",
                "run it again; if it stays: sudo dmesg, heat, other users. --new-baseline accepts it",
            )
