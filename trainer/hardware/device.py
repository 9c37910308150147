"""A GPU model as the catalogue describes it, and where each of its figures comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

GIB = 2**30

Arithmetic = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4"]
"""What a matrix product computes in; the sum is in fp32 (fp64: in fp64)."""
Reach = Literal["switch", "mesh", "bridge", "package"]
"""`switch`, `mesh`: all GPUs of a node; `bridge`: the pair (or four) that a bridge joins, if one is fitted; `package`:
the other half of the same package."""
Figure = Literal["memory", "bandwidth", "peak", "link", "power"]


@dataclass(frozen=True)
class Link:
    """How a GPU reaches its peers without the PCI bus."""

    kind: str
    """NVLink or Infinity Fabric."""
    bytes_s: float
    """Of one GPU over all its links, both directions together, as data sheets give it: half of it goes one way."""
    reach: Reach


@dataclass(frozen=True)
class Device:
    """A GPU model. Half of a package that torch shows as two devices (MI250, MI250X) is a device."""

    name: str
    """What `torch.cuda.get_device_name` returns."""
    architecture: str
    compute_capability: str
    """Such as `9.0`; AMD: the target, such as `gfx942`."""
    multiprocessors: int | None
    """Streaming multiprocessors or compute units that torch counts; None: not published."""
    memory_bytes: int
    """Memory that torch reports, or the data sheet's if no report is known. Error correction is on where it is by
    default."""
    memory_source: str
    bandwidth_bytes_s: float
    """Of the memory."""
    bandwidth_source: str
    peak_tflops: dict[Arithmetic, float] = field(default_factory=dict)
    """Dense peak (no sparsity) by arithmetic, in TFLOP/s. What is not in it, the matrix units do not have."""
    peak_source: str = ""
    link: Link | None = None
    """None: only the PCI bus."""
    link_source: str = ""
    pcie: str = ""
    """Generation and lanes, such as `5 x16`."""
    power_watts: float = 0.0
    """Most that the board takes, as configured by the vendor."""
    power_source: str = ""
    seen: dict[Figure, str] = field(default_factory=dict)
    """Figures that were compared with a page that quotes the source, and the address of that page. The others were
    entered from the source by name and have not been compared since."""
    note: str = ""

    def supports(self, arithmetic: Arithmetic) -> bool:
        """Return whether the matrix units compute in it. What they lack is emulated, or refused."""
        return arithmetic in self.peak_tflops
