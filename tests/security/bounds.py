"""Bounds of what an attack may cost. They hold on a machine that is busy with other work, too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BLOCKED_S = 600.0
"""Seconds after which what uses no CPU is taken to wait for ever: an open pipe, a socket, a lock."""


@contextmanager
def ends_within(cpu_s: float, what: str = "it", blocked_s: float = BLOCKED_S) -> Iterator[None]:
    """Fail if the block takes more CPU time of this process than `cpu_s`, or waits for ever."""

    def busy(*_: object) -> None:
        pytest.fail(f"{what} took more than {cpu_s} s of CPU time")  # no Exception, which the block might catch

    def blocked(*_: object) -> None:
        pytest.fail(f"{what} did not end within {blocked_s} s")

    before = signal.signal(signal.SIGPROF, busy), signal.signal(signal.SIGALRM, blocked)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, blocked_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])
