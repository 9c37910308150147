"""Exclusive locks of open files, which the system releases with the process that holds them."""

from __future__ import annotations

import fcntl
import os


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file without waiting.

    Returns:
        True: it is locked. False: another process has the lock. None: its file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def locked_or_closed(descriptor: int) -> int | None:
    """Return the descriptor with its lock; None if that cannot be had, and then it is closed."""
    if try_lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None
