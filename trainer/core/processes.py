"""Processes of this machine, as the kernel knows them: who lives, whose child, which signals it handles. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""prctl(2)"""
_LIBC = ctypes.CDLL(None, use_errno=True)
"""Loaded here, not after a fork, where loading could deadlock."""


def die_with_parent(signum: int, parent: int) -> None:
    """Have the kernel send `signum` to this process when its parent, process `parent`, dies."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signum)


def children(pid: int) -> list[int]:
    """The live children of `pid`; none when it is gone."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in listed if is_alive(int(child))]


def descendants(pid: int) -> list[int]:
    """All live processes below `pid`, parents before children."""
    found: list[int] = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on; the second may hold spaces. Empty when gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid: int, started: int | None = None) -> bool:
    """Whether `pid` runs (a zombie does not) and, where `started` is given, is still the same process."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX" and (started is None or int(fields[19]) == started)


def started_ticks(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot: with the pid it names a process for good. None when gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def leads_session(pid: int) -> bool:
    """Whether `pid` has called setsid(2)."""
    fields = _stat(pid)
    return bool(fields) and int(fields[3]) == pid


def handles(pid: int, signum: int) -> bool:
    """Whether `pid` has a handler of its own for `signum`."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(masks) and bool(masks[0] >> (signum - 1) & 1)


def send(pid: int, signum: int) -> None:
    """Send a signal; a process that is gone already is no error."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass


def kill_tree(pid: int, timeout_s: float = 10.0) -> None:
    """SIGKILL `pid` and all below it, `pid` first so that it starts nothing anew, and wait until they are gone."""
    targets = [pid, *descendants(pid)]
    deadline = time.monotonic() + timeout_s
    while targets and time.monotonic() < deadline:
        for target in targets:
            send(target, signal.SIGKILL)
        time.sleep(0.05)
        targets = [target for target in targets if is_alive(target)]


def boot_id() -> str:
    """Changes with every boot of this machine, after which no recorded pid means anything."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
