"""Processes of this machine, read from /proc: liveness, children, signal handlers. Linux only.

psutil is not used: importing it would take 30 ms of CPU in every command, and listing the children of a process takes
it 4.2 ms instead of 0.06 ms, because it reads /proc of all processes (psutil 7.2, 185 processes). It has no public
start time in clock ticks, which `launch.json` records, and does not tell which signals a process handles.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal to send when the parent dies."""
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl
"""Loaded and looked up at import: after a fork either could wait for ever for a lock that another thread had held."""


_WITHOUT_FLAG = (
    "import sys; sys.path[:] = [one for one in sys.path if one]; sys.argv = sys.argv[1:]; import runpy; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
"""What `python -P -m MODULE` does, for Python 3.10. At that point only the built-in `sys` has been imported."""


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module without the working directory on `sys.path`.

    `python -m` puts it first: a file `torch.py` there would be executed in place of the package.
    """
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module, *arguments]
    return [sys.executable, "-c", _WITHOUT_FLAG, module, *arguments]


def absolute_path_list(value: str) -> str:
    """Return a PYTHONPATH without the entries that mean another folder in each working directory."""
    return os.pathsep.join(entry for entry in value.split(os.pathsep) if os.path.isabs(entry))


def command_line(pid: int) -> list[str]:
    """Return the arguments of a process; empty if it has exited."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def die_with_parent(signum: int, parent: int) -> None:
    """Ask the kernel to send `signum` to this process when its parent, process `parent`, dies."""
    _PRCTL(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # the parent died before the call
        os.kill(os.getpid(), signum)


def children(pid: int) -> list[int]:
    """Return the live children of `pid`, or an empty list if it has exited."""
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in pids if is_alive(int(child))]


def descendants(pid: int) -> list[int]:
    """Return all live descendants of `pid`, parents before children."""
    pids: list[int] = []
    for child in children(pid):
        pids += [child, *descendants(child)]
    return pids


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (state) on, or an empty list if the process has exited.

    The second field, the command, may contain spaces.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid: int, started: int | None = None) -> bool:
    """Return whether `pid` is running (a zombie is not) and, if `started` is given, is still the same process.

    `started` is a start time from `started_ticks`.
    """
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX" and (started is None or int(fields[19]) == started)


def parent_of(pid: int) -> int | None:
    """Return the parent of `pid`, or None if it has exited."""
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def started_ticks(pid: int) -> int | None:
    """Return the start time of `pid` in clock ticks since boot, or None if it has exited.

    Together with the pid it identifies a process even after the pid was reused.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def age_s() -> float:
    """Return the seconds since this process was started (Linux; 0 elsewhere)."""
    ticks = started_ticks(os.getpid())
    if ticks is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def leads_session(pid: int) -> bool:
    """Return whether `pid` is a session leader, that is, has called setsid(2)."""
    try:
        return os.getsid(pid) == pid
    except OSError:  # it has exited
        return False


def handles(pid: int, signum: int) -> bool:
    """Return whether `pid` has installed a handler for `signum`."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(masks) and bool(masks[0] >> (signum - 1) & 1)


def send(pid: int, signum: int) -> None:
    """Send a signal; do nothing if the process has exited."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass


def kill_tree(pid: int, timeout_s: float = 10.0) -> None:
    """Kill `pid` and all its descendants with SIGKILL, and wait up to `timeout_s` seconds until they have exited.

    `pid` is killed first, so that it starts no new processes.
    """
    targets = [pid, *descendants(pid)]
    deadline = time.monotonic() + timeout_s
    while targets and time.monotonic() < deadline:
        for target in targets:
            send(target, signal.SIGKILL)
        time.sleep(0.05)
        targets = [target for target in targets if is_alive(target)]


def boot_id() -> str:
    """Return the id of this boot of the machine, or an empty string. Recorded pids are invalid after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
