"""Free space and quota of the file system on which a run is created. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_QUOTA_S = 3.0
_BLOCK = 1024
"""Bytes of a block of `quota`."""


@dataclass(frozen=True)
class Space:
    """Bytes that may still be written."""

    free_bytes: int | None
    """Of the file system."""
    quota_bytes: int | None
    """Of the user's quota; None: none, or not known."""

    @property
    def least(self) -> int | None:
        """The smaller of the known ones."""
        return min((one for one in (self.free_bytes, self.quota_bytes) if one is not None), default=None)


def space(folder: Path) -> Space:
    """Return the space of the nearest existing parent of `folder`."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return Space(None, None)
    return Space(found.f_bavail * found.f_frsize, _quota(folder))


def left_of_quota(output: str) -> int | None:
    """Return the bytes that are left by the output of `quota -w -p`; None: it has no limit of blocks.

    A line is: file system, blocks, quota, limit, grace (blocks of 1 KiB; `*` marks one that is exceeded; 0: no limit).
    """
    left = []
    for line in output.splitlines():
        numbers = [word.rstrip("*") for word in line.split()[1:4]]
        if len(numbers) == 3 and all(word.isdigit() for word in numbers):
            used, soft, hard = map(int, numbers)
            limit = min((one for one in (soft, hard) if one), default=None)
            if limit is not None:
                left.append(max(0, limit - used) * _BLOCK)
    return min(left, default=None)


def _quota(folder: Path) -> int | None:
    """Ask `quota` for the limits of this user on the file system of `folder`."""
    program = shutil.which("quota")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "-w", "-p", "-f", str(_mount_point(folder))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_QUOTA_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return left_of_quota(done.stdout)


def _mount_point(folder: Path) -> Path:
    while not folder.is_mount() and folder != folder.parent:
        folder = folder.parent
    return folder
