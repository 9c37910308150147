"""Free memory of this machine, as far as this process may use it. Linux; does not import torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
_GROUPS = "sys/fs/cgroup"


def available_bytes(root: Path = _ROOT) -> int | None:
    """Return the bytes that this process can still allocate; None if that is not known.

    It is the smaller of `MemAvailable` of /proc/meminfo and what the cgroups (v2) of this process leave, whose page
    cache can be freed. SLURM and containers set such limits.
    """
    available = _memory(root).get("MemAvailable")
    free = [*([available] if available is not None else []), *_free_of_groups(root)]
    return max(0, min(free)) if free else None


def used_bytes(root: Path = _ROOT) -> int | None:
    """Return the bytes in use on this machine that cannot be freed; None if that is not known."""
    memory = _memory(root)
    return memory["MemTotal"] - memory["MemAvailable"] if {"MemTotal", "MemAvailable"} <= memory.keys() else None


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory; 0 if that is not known."""
    return _of_process("VmRSS")


def peak_bytes() -> int:
    """Return the most bytes of this process that have been in memory since `reset_peak`; 0 if that is not known."""
    return _of_process("VmHWM")


def reset_peak() -> None:
    """Start a new count of `peak_bytes`; nothing where the kernel has no such count."""
    with suppress(OSError):
        (_ROOT / "proc/self/clear_refs").write_text("5")  # man 5 proc_pid_clear_refs


def _of_process(name: str) -> int:
    try:
        lines = (_ROOT / "proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _memory(root: Path) -> dict[str, int]:
    """Return the bytes of /proc/meminfo by name; empty if it cannot be read."""
    try:
        lines = [line.split() for line in (root / "proc/meminfo").read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3 and line[1].isdigit()}


def _free_of_groups(root: Path) -> list[int]:
    """Return what the cgroup of this process and each group around it leaves; those without a limit are left out."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    place = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    folder = root / _GROUPS / place
    free = []
    while folder.is_relative_to(root / _GROUPS):
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free.append(int(limit) - used + int(stat.get("inactive_file", 0)))
        except (OSError, ValueError):  # no such file in the root group, or no cgroup v2
            pass
        folder = folder.parent
    return free
