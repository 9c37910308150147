"""How a rank is asked to leave. A handler sets a flag and nothing else; `callbacks/boundary.py` acts on it."""

from __future__ import annotations

import os
import signal
import threading
from enum import IntEnum
from types import FrameType

from trainer.core.errors import HUNG


class Request(IntEnum):
    """What the ranks may agree on at a step boundary; the largest of all ranks' wins."""

    NOTHING = 0
    TIME_IS_UP = 1
    """`trainer.max_time` is used up: finish."""
    REQUEUE = 2
    """Save, leave, be run again: preemption or the end of the allocation."""
    STOP = 3
    """Save and leave for good: the user asked."""
    SAVE_FAILED = 4
    """A checkpoint could not be written, and `checkpoint.on_failure=stop`."""


class StopTraining(BaseException):
    """Leaves Lightning's loops after everything is saved. Not an Exception: no handler of a user's hook takes it."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.name)
        self.request = request


_signalled = threading.Event()


def _set_flag(signum: int, frame: FrameType | None) -> None:
    _signalled.set()


def install_handlers() -> None:
    """SIGTERM and SIGUSR1 ask for a requeue. SIGINT reaches the whole terminal's group: the follower acts on it."""
    signal.signal(signal.SIGTERM, _set_flag)
    signal.signal(signal.SIGUSR1, _set_flag)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def signalled() -> bool:
    """Whether this rank has received SIGTERM or SIGUSR1."""
    return _signalled.is_set()


def force_exit_after(timeout_s: float) -> threading.Timer:
    """A daemon timer that ends this process with code 124 after `timeout_s`; cancel it once everything is saved."""
    timer = threading.Timer(timeout_s, os._exit, args=(HUNG,))
    timer.daemon = True
    timer.start()
    return timer
