"""What the measuring processes found: the content of their JSON output."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """A device as torch sees it, and what it reached."""

    name: str
    index: int
    memory_bytes: int = 0
    capability: str = ""
    multiprocessors: int = 0
    works: dict[str, str] = field(default_factory=dict)
    """Arithmetic to an empty text, or to the error of a small matrix product in it."""
    matrix_flops: dict[str, float] = field(default_factory=dict)
    """Arithmetic to FLOP/s of a large matrix product."""
    memory_bytes_s: float = 0.0
    """Read and written per second by a copy within the memory."""
    host_bytes_s: float = 0.0
    """Copied per second from pinned memory of the host."""
    throttling: int = 0
    """NVML's reasons for lower clocks during the matrix products."""
    is_busy: bool = False
    """Somebody else used it, so nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the process with torch found."""

    problem: str = ""
    """Why torch could not be imported, or the process failed."""
    torch: str = ""
    cuda: str = ""
    """The CUDA or ROCm version that torch is built for."""
    nccl: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    """Path from which a library of CUDA was loaded."""
    architectures: list[str] = field(default_factory=list)
    """GPU architectures that torch has kernels for, such as sm_90."""
    cuda_problem: str = ""
    """Why torch cannot use the GPUs."""
    threads: int = 0
    cpu: DeviceFacts | None = None
    devices: list[DeviceFacts] = field(default_factory=list)
    no_peer: list[list[int]] = field(default_factory=list)
    """Pairs of GPUs that cannot access each other's memory."""
    ranks: int = 0
    """Processes of the all-reduce; 0: it was not measured."""
    reduce_bytes_s: float = 0.0
    """Bytes of the tensor that an all-reduce of these ranks handles per second, of the slowest."""
    reduce_problem: str = ""


@dataclass(frozen=True, kw_only=True)
class StorageFacts:
    """What the process that used the file system found."""

    problem: str = ""
    write_bytes_s: float = 0.0
    read_bytes_s: float = 0.0
    renames_s: float = 0.0
    """Files made, flushed and renamed per second."""
    torn: str = ""
    """What a second process saw while files were renamed over each other; empty: always one of them, whole."""
    unlocked: list[str] = field(default_factory=list)
    """Kinds of lock that did not keep a second process out."""
    has_links: bool = True
    skew_s: float = 0.0
    """How far the time stamps of the file system are from this machine's clock."""
