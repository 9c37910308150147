"""How the checks look at the machine. Tests put files, commands and libraries of their own in its place."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.core import network, nvml
from trainer.core.gpus import Inventory, TorchBuild, inventory
from trainer.doctor.facts import Facts, StorageFacts
from trainer.hardware.baseline import Baseline

_COMMAND_S = 10.0
_TIME_ERROR, _NOT_SYNCHRONIZED = 5, 0x0040
"""TIME_ERROR and STA_UNSYNC of adjtimex(2)."""


@dataclass(frozen=True)
class Ran:
    """A command that was run; `code` 127: there is no such program, 124: it took too long."""

    code: int
    out: str
    errors: str = ""


def run(command: Sequence[str], timeout_s: float = _COMMAND_S) -> Ran:
    """Run a command and return what it printed; never raises for what the command does."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError:
        return Ran(127, "", f"{command[0]} is not installed")
    except OSError as problem:
        return Ran(126, "", str(problem))
    try:
        out, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        give_up(process)
        return Ran(124, "", f"no answer within {timeout_s:.0f} s")
    return Ran(process.returncode, out, errors)


def give_up(process: subprocess.Popen[str]) -> None:
    """Kill a process. One that waits for a dead file server cannot be killed, and is left behind."""
    process.kill()
    try:
        process.communicate(timeout=1)
    except subprocess.TimeoutExpired:
        pass


def resolve(name: str) -> list[str]:
    """Return the addresses of a host name, in the order of the resolver; empty if it has none."""
    try:
        return list(dict.fromkeys(str(one[4][0]) for one in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))
    except OSError:
        return []


def is_clock_synchronized() -> bool | None:
    """Return whether the kernel considers its clock synchronized; None if it is not known."""
    # struct timex of adjtimex(2): `modes` is its first field, `status` the sixth word; with modes 0 it only reads.
    buffer = (ctypes.c_long * 64)()
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(buffer))
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    status = ctypes.cast(ctypes.byref(buffer, 5 * ctypes.sizeof(ctypes.c_long)), ctypes.POINTER(ctypes.c_int))[0]
    return state != _TIME_ERROR and not status & _NOT_SYNCHRONIZED


def fetch(url: str, timeout_s: float) -> str:
    """Open a URL and return an empty text, or why it cannot be reached. Any answer of a server counts as reached."""
    if not url.startswith(("https://", "http://")):
        return "not an address of a server"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as problem:
        return str(getattr(problem, "reason", problem))


def can_listen(address: str) -> str:
    """Listen on a free port of an address; return an empty text, or why that is not possible."""
    try:
        network.listen(address).close()
    except OSError as problem:
        return str(problem.strerror or problem)
    return ""


@dataclass(frozen=True)
class Probe:
    """The machine, and what was measured on it before the checks."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: Path = Path("runs")
    """Folder of the runs, whose file system is checked."""
    library: Any | None = None
    """NVML; None: this machine has none."""
    build: TorchBuild | None = None
    """What the installed torch is built for; None: torch is not installed."""
    facts: Facts | None = None
    """What the process with torch measured; None: it was not started."""
    storage: StorageFacts | None = None
    baseline: Baseline | None = None
    """Earlier measurements on this machine; None: none are kept."""
    tracking_mode: str = "auto"
    """`tracking.mode`."""
    is_on_slurm: bool = False
    """Whether jobs are meant to run on SLURM: `cluster.name`."""
    run: Callable[..., Ran] = run
    hostname: Callable[[], str] = socket.gethostname
    resolve: Callable[[str], list[str]] = resolve
    addresses: Callable[[], list[network.LocalAddress]] = network.addresses
    affinity: Callable[[], set[int]] = lambda: os.sched_getaffinity(0)
    limit: Callable[[int], tuple[int, int]] = resource.getrlimit
    space: Callable[[Path], os.statvfs_result] = os.statvfs
    is_clock_synchronized: Callable[[], bool | None] = is_clock_synchronized
    fetch: Callable[[str, float], str] = fetch
    can_listen: Callable[[str], str] = can_listen

    def read(self, path: str) -> str:
        """Return the text of a file below the root, or an empty text."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return ""

    def entries(self, path: str) -> list[str]:
        """Return the sorted names in a folder below the root; empty if it cannot be listed."""
        try:
            return sorted(os.listdir(self.root / path.lstrip("/")))
        except OSError:
            return []

    @cached_property
    def gpus(self) -> Inventory:
        """The GPUs that a job started from here may use."""
        return inventory(self.environment, self.root, self.library, self.build)


def this_machine(folder: Path) -> Probe:
    """Return the probe of this machine, without measurements."""
    from trainer.core.gpus import torch_build

    return Probe(folder=folder, library=nvml.load(), build=torch_build())
