"""Named points at which a test can kill this process, to prove that an interrupted save does no damage."""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = "TRAINER_FAULT"
"""`name:count` kills this process (SIGKILL) when the point `name` is reached for the `count`-th time.

`name:count:ENOSPC` raises that OSError instead, from the `count`-th time on. `name:count:SLOW0.5` sleeps for 0.5 s
every time.
"""

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
"""All points, in the order in which a save with pruning reaches them."""
UPLOAD_POINTS = ("upload.begin", "upload.file", "upload.files", "upload.committed", "remote.removed")
"""Those of an upload to an object store with pruning."""

_reached: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Inject the fault that `TRAINER_FAULT` requests at this point. Costs one look-up in the environment."""
    spec = os.environ.get(VARIABLE)
    if spec is None:
        return
    assert name in (*POINTS, *UPLOAD_POINTS), name
    point, count, error = [*spec.split(":"), "", ""][:3]
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
