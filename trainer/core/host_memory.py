"""Free memory of this machine, as far as this process may use it. Linux; does not import torch."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/")
_GROUPS = "sys/fs/cgroup"


def available_bytes(root: Path = _ROOT) -> int | None:
    """Return the bytes that this process can still allocate; None if that is not known.

    It is the smaller of `MemAvailable` of /proc/meminfo and what the cgroups (v2) of this process leave, whose page
    cache can be freed. SLURM and containers set such limits.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    free += _free_of_groups(root)
    return max(0, min(free)) if free else None


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
