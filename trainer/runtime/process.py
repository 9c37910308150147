"""Set up a rank as a process: environment, output, signals. Does not import torch, which a rank may import later."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from trainer.core.secrets import MaskedStream
from trainer.runs.directory import RunDirectory

PR_SET_PDEATHSIG = 1
"""Option of prctl(2); Linux only."""

STORE_VARIABLE = "TRAINER_STORE"
"""Where the ranks find each other: `file:FOLDER` on one node, `tcp:TOKEN` on several; read by `store.py`."""

FULL_MESH_UP_TO = 128
"""Largest number of ranks that gloo connects each with each other (`cpu_groups.py`).

A job has up to four groups of all ranks, so that each rank then has 508 sockets. Many systems allow a process 1,024
open files."""
NODE_BEGAN_VARIABLE = "TRAINER_NODE_BEGAN"
"""When the node process was started, in seconds since 1970; read by `first_step.py`."""


@dataclass(frozen=True)
class Rank:
    """The position of this process in the job, from the environment of torchrun."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    attempt: int
    """TRAINER_ATTEMPT plus the restarts by torchrun."""

    @staticmethod
    def from_environment() -> Rank:
        """Read the environment; without one this is the only rank."""
        number = {key: int(os.environ.get(key, "0")) for key in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")}
        return Rank(
            rank=number["RANK"],
            local_rank=number["LOCAL_RANK"],
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            attempt=int(os.environ.get("TRAINER_ATTEMPT", "0")) + number["TORCHELASTIC_RESTART_COUNT"],
        )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """The number of nodes of the job."""
        return max(1, self.world_size // max(1, self.local_world_size))


def frozen_code_first() -> None:
    """Remove the working directory from the front of `sys.path`, so that PYTHONPATH with the frozen code is first.

    This is for Python 3.10; later versions obey PYTHONSAFEPATH (`trainer/supervise/rank_environment.py`).
    """
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):
        sys.path.pop(0)


def die_with_parent() -> None:
    """Have the kernel kill this rank when torchrun dies. It would otherwise keep training alongside its restart."""
    if sys.platform != "linux":
        return
    parent = int(os.environ.get("TRAINER_TORCHRUN_PID") or os.getppid())
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def dump_stacks_on_request(run_path: Path) -> None:
    """Dump the stacks of all threads to `rank-R.stacks` on SIGUSR2, and into the log on a crash (SIGSEGV, ...).

    faulthandler does it in C, so it works even if the rank holds the GIL for ever.
    """
    rank = Rank.from_environment()
    stacks = RunDirectory(run_path).stacks(rank.attempt, rank.rank)
    descriptor = os.open(stacks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGUSR2, file=descriptor, all_threads=True)
    faulthandler.enable(file=2)


def redirect_output(run_path: Path) -> None:
    """Redirect stdout and stderr to the log of this rank: the descriptors, so that C++ and child processes use it."""
    rank = Rank.from_environment()
    log = RunDirectory(run_path).rank_log(rank.attempt, rank.rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # Line-buffered, because the file is followed.
    sys.stdout = cast("TextIO", MaskedStream(open(1, "w", buffering=1, closefd=False)))  # noqa: SIM115
    sys.stderr = cast("TextIO", MaskedStream(open(2, "w", buffering=1, closefd=False)))  # noqa: SIM115
