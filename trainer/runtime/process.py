"""What a rank knows and does as a process. Imports nothing heavy: it runs before torch is imported."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.runs.directory import RunDirectory

PR_SET_PDEATHSIG = 1
"""prctl(2); Linux only."""


@dataclass(frozen=True)
class Rank:
    """This process among the others, from the environment that torchrun sets."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    attempt: int
    """TRAINER_ATTEMPT, plus the restarts that torchrun made since."""

    @staticmethod
    def from_environment() -> Rank:
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
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        return max(1, self.world_size // max(1, self.local_world_size))


def frozen_code_first() -> None:
    """Python 3.10 looks in the working directory before PYTHONPATH, which has the code as it was at launch; later
    versions are told not to (`trainer/supervise/torchrun.py`)."""
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):
        sys.path.pop(0)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when torchrun dies: a rank without its agent would train on beside its own rerun."""
    if sys.platform != "linux":
        return
    parent = int(os.environ.get("TRAINER_TORCHRUN_PID") or os.getppid())
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def dump_stacks_when_asked(run_path: Path) -> None:
    """On SIGUSR2 each thread's stack goes to `rank-R.stacks` beside the log, on a crash (SIGSEGV, ...) into the log.

    Done in C by faulthandler, so a rank that holds the interpreter's lock for ever answers, too.
    """
    rank = Rank.from_environment()
    stacks = RunDirectory(run_path).stacks(rank.attempt, rank.rank)
    descriptor = os.open(stacks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGUSR2, file=descriptor, all_threads=True)
    faulthandler.enable(file=2)


def redirect_output(run_path: Path) -> None:
    """Point stdout and stderr (the descriptors, so C++ and children too) at this rank's log file."""
    rank = Rank.from_environment()
    log = RunDirectory(run_path).rank_log(rank.attempt, rank.rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  lines, not blocks: the file is followed
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
