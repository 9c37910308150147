"""Named moments at which a test can kill this process, to prove that a save survives being cut short there."""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = "TRAINER_FAULT"
"""`name:count` kills this process (SIGKILL) when the point `name` is reached for the `count`-th time.
`name:count:ENOSPC` raises that OSError there instead, each time from the `count`-th on; `name:count:SLOW0.5` waits so
many seconds there."""

POINTS = (
    "save.begin",
    "staging.created",
    "file.created",
    "file.write",
    "file.written",
    "file.synced",
    "commit.begin",
    "commit.written",
    "commit.renamed",
    "folder.renamed",
    "parent.synced",
    "prune.renamed",
    "prune.removed",
)
"""Every point, in the order in which a save with pruning meets them."""

_reached: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Die here if `TRAINER_FAULT` says so. Costs one look into the environment."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    assert name in POINTS, name
    point, count, error = [*wanted.split(":"), "", ""][:3]
    if point != name:
        return
    _reached[name] = _reached.get(name, 0) + 1
    if error.startswith("SLOW"):
        time.sleep(float(error.removeprefix("SLOW")))
        return
    if error and _reached[name] >= int(count or 1):
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))
    if not error and _reached[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
