"""AMD's Instinct GPUs, from the data sheet of each product: matrix cores, dense.

An MI250 or MI250X is two devices for torch, one per die; the entries have the figures of a die, half of the package's.
torch uses TF32 on the MI300 series only if HIPBLASLT_ALLOW_TF32=1 is set.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainer.hardware.device import GIB, Arithmetic, Device, Figure, Link, Reach

_DIE = "one of the two dies of a package; the power is half of the package's"
_MI300X_SEEN: dict[Figure, str] = dict.fromkeys(
    ("peak", "bandwidth", "power"), "https://github.com/alpharomercoma/MI300X-vs-H200"
)
_DIE_SEEN: dict[Figure, str] = {"link": "https://rocm.docs.amd.com/en/docs-7.14.0/_sources/reference/gpu-arch/mi250.md"}


def _instinct(
    name: str,
    chip: tuple[str, str, int],
    memory: tuple[int, str],
    bandwidth: float,
    peaks: Mapping[Arithmetic, float],
    *,
    fabric: tuple[float, Reach],
    watts: float,
    seen: Mapping[Figure, str] | None = None,
    note: str = "",
) -> Device:
    """Return an entry; bandwidth and fabric in GB/s, the fabric's in both directions, peaks in TFLOP/s."""
    document = f"{name} data sheet"
    bus = "4 x16" if chip[0] == "CDNA 2" else "5 x16"
    return Device(
        name,
        *chip,
        memory[0],
        memory[1] or document,
        bandwidth * 1e9,
        document,
        dict(peaks),
        document,
        Link("Infinity Fabric", fabric[0] * 1e9, fabric[1]),
        document,
        bus,
        watts,
        document,
        dict(seen or {}),
        note,
    )


def _reported(gib: float) -> tuple[int, str]:
    return int(gib * GIB), "torch's total capacity in an out-of-memory report (several repositories)"


_CDNA3: Mapping[Arithmetic, float] = {
    "fp64": 163.4,
    "fp32": 163.4,
    "tf32": 653.7,
    "bf16": 1307.4,
    "fp16": 1307.4,
    "fp8": 2614.9,
}
_MI250: Mapping[Arithmetic, float] = {"fp64": 45.3, "fp32": 45.3, "bf16": 181.0, "fp16": 181.0}
_MI250X: Mapping[Arithmetic, float] = {"fp64": 47.9, "fp32": 47.9, "bf16": 191.5, "fp16": 191.5}
_CDNA4: Mapping[Arithmetic, float] = {
    "fp64": 78.6,
    "fp32": 157.3,
    "bf16": 2516.6,
    "fp16": 2516.6,
    "fp8": 5033.2,
    "fp4": 10066.3,
}
_TWO_DIES, _ONE_DIE = ("CDNA 2", "gfx90a", 110), ("CDNA 2", "gfx90a", 104)

DEVICES = [
    _instinct("AMD Instinct MI210", _ONE_DIE, _reported(63.98), 1638, _MI250, fabric=(300, "bridge"), watts=300),
    _instinct(
        "AMD Instinct MI250",
        _ONE_DIE,
        _reported(63.98),
        1638,
        _MI250,
        fabric=(400, "package"),
        watts=280,
        seen=_DIE_SEEN,
        note=_DIE,
    ),
    *(
        _instinct(
            name,
            _TWO_DIES,
            _reported(63.98),
            1638,
            _MI250X,
            fabric=(400, "package"),
            watts=280,
            seen=_DIE_SEEN,
            note=_DIE,
        )  # older releases of ROCm do not tell them apart
        for name in ("AMD Instinct MI250X", "AMD Instinct MI250X / MI250")
    ),
    _instinct(
        "AMD Instinct MI300X",
        ("CDNA 3", "gfx942", 304),
        _reported(191.69),
        5300,
        _CDNA3,
        fabric=(896, "mesh"),
        watts=750,
        seen=_MI300X_SEEN,
    ),
    _instinct(
        "AMD Instinct MI325X",
        ("CDNA 3", "gfx942", 304),
        (int(256e9), ""),
        6000,
        _CDNA3,
        fabric=(896, "mesh"),
        watts=1000,
        seen=dict.fromkeys(("peak", "bandwidth", "memory", "power"), "https://awesomeagents.ai/hardware/amd-mi325x"),
    ),
    _instinct(
        "AMD Instinct MI355X",
        ("CDNA 4", "gfx950", 256),
        (int(287.98 * GIB), "torch's total capacity in https://github.com/ROCm/TheRock/issues/2118"),
        8000,
        _CDNA4,
        fabric=(1075, "mesh"),
        watts=1400,
        seen={"memory": "https://github.com/ROCm/TheRock/issues/2118"},
    ),
]
