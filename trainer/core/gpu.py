"""A GPU, and a description of who uses it."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

USED_BYTES, USED_SHARE = 1 << 30, 0.1
"""Memory in use, and its share of the total, above which a GPU is taken for used although no process is seen: those
outside of a container are not."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or an instance of a divided one (MIG)."""

    entry: str
    """Its name in CUDA_VISIBLE_DEVICES (ROCm: HIP_VISIBLE_DEVICES)."""
    index: int
    """Number in the order of the bus, as nvidia-smi prints it."""
    uuid: str
    """Empty if unknown."""
    name: str
    kind: Literal["cuda", "rocm"] = "cuda"
    is_mig: bool = False
    is_integrated: bool = False
    """Whether it is part of a processor and shares its memory."""
    holder: str | None = None
    """Who uses it, such as `python of anna (pid 77)`; None: nobody, as far as is known."""
    driver_cuda: int | None = None
    """Newest CUDA version of the driver: 1000 * major + 10 * minor."""

    @property
    def key(self) -> str:
        """Name for a lock."""
        return self.uuid or f"{self.kind}-{self.index}"

    def __str__(self) -> str:
        return f"{self.index} ({self.uuid})" if self.is_mig else str(self.index)


def hold_of(pids: Sequence[int], used_bytes: int | None, total_bytes: int | None) -> str | None:
    """Return who uses a GPU with these processes and this memory in use; None: nobody."""
    if pids:
        return ", ".join(map(_describe, pids[:3])) + (f" and {len(pids) - 3} more" if len(pids) > 3 else "")
    if used_bytes is not None and used_bytes > max(USED_BYTES, USED_SHARE * (total_bytes or 0)):
        return f"a process that is not visible here ({used_bytes / 1e9:.1f} GB)"
    return None


def _describe(pid: int) -> str:
    folder = Path("/proc") / str(pid)
    try:
        name = (folder / "comm").read_text().strip()
        owner = pwd.getpwuid(os.stat(folder).st_uid).pw_name
    except (OSError, KeyError):
        return f"pid {pid}"
    printable = "".join(character if character.isprintable() else "?" for character in name)
    return f"{printable} of {owner} (pid {pid})"
