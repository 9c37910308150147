"""Receive requests to stop. The signal handler only sets a flag; `callbacks/boundary.py` acts on it.

What a SIGTERM or SIGUSR1 passes through, in this order:

1. `slurm/job.sbatch` at the top of the repository ignores it, to outlive the ranks.
2. The node process forwards it to its ranks, and turns Ctrl-C of a local job into a stop (`supervise/node.py`).
3. The handler of each rank: here. It means "requeue" unless the run's `control/stop` exists.
4. `callbacks/boundary.py`: the ranks agree on a step, save at it, and raise `StopTraining`.
5. `train/run.py` records the outcome of the attempt, and exits with the code that belongs to it (`core/errors.py`).
6. `slurm/attempt.py` decides whether the job is requeued; `supervise/supervisor.py` ends a local one.
"""

from __future__ import annotations

import os
import signal
import threading
from enum import IntEnum
from types import FrameType

from trainer.core.errors import HUNG


class Request(IntEnum):
    """A request on which the ranks agree at a step boundary; the largest of all ranks wins."""

    NOTHING = 0
    TIME_IS_UP = 1
    """`trainer.max_time` has elapsed: end training."""
    REQUEUE = 2
    """Save a checkpoint and exit to be requeued: preemption, or the end of the allocation."""
    STOP = 3
    """Save a checkpoint and exit: the user stopped the run."""
    SAVE_FAILED = 4
    """A checkpoint could not be written, and `checkpoint.on_failure=stop`."""


class StopTraining(BaseException):
    """Raised to exit Lightning's loops once everything is saved.

    It is not an Exception, so that no `except Exception` in a user's hook catches it.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request.name)
        self.request = request


_signalled = threading.Event()


def _set_flag(signum: int, frame: FrameType | None) -> None:
    _signalled.set()


def install_handlers() -> None:
    """Handle SIGTERM and SIGUSR1 as requests to requeue.

    Ignore SIGINT; the process attached to the terminal handles it.
    """
    signal.signal(signal.SIGTERM, _set_flag)
    signal.signal(signal.SIGUSR1, _set_flag)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def signalled() -> bool:
    """Return whether this rank has received SIGTERM or SIGUSR1."""
    return _signalled.is_set()


def force_exit_after(timeout_s: float, code: int = HUNG) -> threading.Timer:
    """Start a timer that ends this process with `code` after `timeout_s`. Cancel it once everything is saved."""
    timer = threading.Timer(timeout_s, os._exit, args=(code,))
    timer.daemon = True
    timer.start()
    return timer
